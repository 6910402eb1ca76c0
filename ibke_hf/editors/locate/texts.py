"""The texts of a value search: each request behind every prefix, and where its subject ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.prompts import RequestError, chat_offsets, spaced_target
from ...core.records import EditRequest
from ...core.tokens import TokenBatch, encode, encode_prompt, pad_and_label


@dataclass(frozen=True)
class SubjectTexts:
    """Texts of some requests, each with the place of its subject.

    Attributes:
        batch: t texts, left-padded.
        subjects: (t,) column of the subject's last token, counted from the right edge: -1 is the last column.
        owners: (t,) index of the request that each text belongs to, ascending.
        number: n, how many requests there are.
    """

    batch: TokenBatch
    subjects: Tensor
    owners: Tensor
    number: int

    def only(self, request: int) -> SubjectTexts:
        """Return the texts of one request."""
        rows = self.owners == request
        return SubjectTexts(self.batch[rows].trimmed(), self.subjects[rows], torch.zeros_like(self.owners[rows]), 1)

    def where(self, chosen: Tensor) -> SubjectTexts:
        """Return the texts of the requests that `chosen` (n,) is True for; the requests keep their numbers."""
        rows = chosen[self.owners]
        return (
            self
            if bool(rows.all())
            else SubjectTexts(self.batch[rows], self.subjects[rows], self.owners[rows], self.number)
        )

    def parts(self, size: int) -> Iterator[SubjectTexts]:
        """Cut into lots of at most `size` texts, in order."""
        for start in range(0, len(self.owners), size):
            rows = slice(start, start + size)
            yield SubjectTexts(self.batch[rows].trimmed(), self.subjects[rows], self.owners[rows], self.number)

    def columns(self) -> Tensor:
        """Mark each text's subject: (t, l) bool."""
        width = self.batch.input_ids.shape[1]
        return torch.arange(width) == (width + self.subjects).unsqueeze(1)

    def mean(self, values: Tensor) -> Tensor:
        """Average values (t, …) over the texts of each request -> (n, …)."""
        owners = self.owners.to(values.device)
        total = torch.zeros(self.number, *values.shape[1:], dtype=values.dtype, device=values.device).index_add(
            0, owners, values
        )
        counts = torch.bincount(owners, minlength=self.number).clamp(min=1)
        return total / counts.reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True)
class SearchTexts:
    """The requests behind every prefix, and the essence prompts of their subjects."""

    requests: SubjectTexts
    essences: SubjectTexts

    def only(self, request: int) -> SearchTexts:
        """Return those of one request."""
        return SearchTexts(self.requests.only(request), self.essences.only(request))


def ask(
    tokenizer: Any, requests: Sequence[EditRequest], prefixes: Sequence[str], essence: str, max_length: int | None
) -> SearchTexts:
    """Tokenise requests, bare and behind each prefix that leaves room for them, and their essence prompts.

    Raises:
        RequestError: If a request is unusable or its subject is missing; names it by its index.
    """
    if not requests:
        raise RequestError("no edit request was given; pass at least one EditRequest(prompt, target, subject)")
    texts: list[tuple[list[int], int]] = []
    places: list[tuple[int, int]] = []  # request, subject from the right
    essences, essence_places = [], []
    for k, request in enumerate(requests):
        name = f"request {k}"
        end = subject_end(request, name)
        for prefix in ("", *prefixes):
            ids, start = encode(
                tokenizer,
                prefix + request.prompt,
                request.target,
                name=name,
                max_length=None if prefix else max_length,
                prompt_format=request.format,
            )
            if prefix and max_length is not None and len(ids) - 1 > max_length:
                continue
            texts.append((ids, start))
            last = subject_token(tokenizer, prefix + request.prompt, len(prefix) + end, request)
            places.append((k, min(last, start - 1) - (len(ids) - 1)))
        subject = str(request.subject).strip()
        text = essence.replace("{}", subject)
        ids = encode_prompt(tokenizer, text)
        essences.append(([*ids, 0], len(ids)))  # the last token of a padded text is not fed
        essence_places.append((k, _token_at(tokenizer, text, text.index(subject) + len(subject)) - len(ids)))
    return SearchTexts(
        _subject_texts(texts, places, len(requests)), _subject_texts(essences, essence_places, len(requests))
    )


def _subject_texts(
    texts: Sequence[tuple[list[int], int]], places: Sequence[tuple[int, int]], number: int
) -> SubjectTexts:
    owners, subjects = torch.tensor(places).unbind(1)
    return SubjectTexts(pad_and_label(texts), subjects, owners, number)


def subject_end(request: EditRequest, name: str) -> int:
    """Return where the subject ends in the prompt, in characters: its last mention, as whole words if there is one.

    Raises:
        RequestError: If the request has no subject or the prompt does not mention it.
    """
    subject = (request.subject or "").strip()
    if not subject:
        raise RequestError(
            f"{name}: it has no subject; pass EditRequest(prompt, target, subject), to `ibke edit` --subject, "
            f"with the entity that the prompt is about"
        )
    plain = re.escape(subject)
    for pattern, flags in ((rf"(?<!\w){plain}(?!\w)", 0), (plain, 0), (plain, re.IGNORECASE)):
        mentions = list(re.finditer(pattern, request.prompt, flags))
        if mentions:
            return mentions[-1].end()
    raise RequestError(
        f"{name}: the subject {subject!r} is not in the prompt {request.prompt!r}; give it as the prompt spells it"
    )


def subject_token(tokenizer: Any, prompt: str, end: int, request: EditRequest) -> int:
    """Index of the token that holds the prompt's character before `end`, as the request's format encodes the prompt.

    Raises:
        RequestError: If a chat template leaves it unknown.
    """
    if not request.format.chat:
        return _token_at(tokenizer, prompt + spaced_target(prompt, request.target, request.format.leading_space), end)
    offsets = chat_offsets(tokenizer, prompt, request.format.chat_options)
    if offsets is None:
        raise RequestError(
            f"{prompt!r}: where its subject stands behind the chat template is unknown; it takes a fast tokenizer and "
            "a template that leaves the prompt as it is"
        )
    return _last_before(offsets, end)


def _token_at(tokenizer: Any, text: str, end: int) -> int:
    """Index of the token that holds the character before `end`."""
    if not tokenizer.is_fast:
        return len(encode_prompt(tokenizer, text[:end])) - 1
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return _last_before(offsets, end)


def _last_before(offsets: Sequence[tuple[int, int]], end: int) -> int:
    return max((i for i, (first, last) in enumerate(offsets) if first < end and first < last), default=0)
