"""Batches for a router: requests that look alike, with the prompts that are about them and those that are not."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.records import EditCase, EditRecord, EditRequest, subject_key
from ..core.tokens import RequestError, TokenBatch, encode, encode_prompt, pad_and_label

ALIKE = 4  # records of one relation that a batch has together, and half as many of one subject
NONE = -1  # the request that a prompt is about, where it is about none
ABSENT_SHARE = 0.25  # of the prompts whose own request is taken to be missing: none is right, however like one may be
PREFIX_SHARE = 0.1  # of the prompts that stand behind another text, as in a chat


@dataclass(frozen=True)
class Asked:
    """A prompt with the facts that answering it runs through, and the request of its record that it is about."""

    ids: tuple[int, ...]
    facts: frozenset[Hashable]
    hops: int
    about: bool


@dataclass(frozen=True)
class RoutedRecord:
    """A record as a router sees it.

    Attributes:
        request: Ids of the request's prompt and target.
        key: What tells the edited fact apart: the hop's key, else subject and prompt.
        subject: The subject, empty where the record names none.
        relation: The relation, or the prompt without its subject.
        prompts: What is asked; the request's own prompt first.
    """

    request: tuple[int, ...]
    key: Hashable
    subject: str
    relation: str
    prompts: tuple[Asked, ...]


@dataclass(frozen=True)
class RouterBatch:
    """Prompts and requests as tokens.

    Attributes:
        prompts: q prompts.
        requests: r requests.
        owner: (q,) the request that each prompt is about, -1 for none.
        ignored: (q, r) of bool: requests that state a fact that the prompt runs through besides its own.
        hops: (q,) triples that a prompt runs through.
    """

    prompts: TokenBatch
    requests: TokenBatch
    owner: Tensor
    ignored: Tensor
    hops: Tensor


def routed_records(tokenizer: Any, records: Sequence[EditRecord], max_length: int | None = None) -> list[RoutedRecord]:
    """Tokenise what a router is trained on; requests and cases that cannot be asked are left out.

    Args:
        tokenizer: The backbone's.
        records: Edit records; of a record with several requests each is a record of its own, whose cases are the
            record's where it is the only one.
        max_length: The backbone's context.
    """
    routed = []
    for record in records:
        for place, request in enumerate(record.requests):
            edit = record.edits[place] if place < len(record.edits) else None
            key = (subject_key(request.subject or ""), request.prompt) if edit is None else edit.key()
            alone = len(record.requests) == 1
            asked: list[tuple[Any, bool]] = [
                (request, True),
                *((c, True) for c in record.generality),
                *((c, False) for c in record.locality),
            ]
            try:
                ids, _ = encode(
                    tokenizer, request.prompt, request.target, max_length=max_length, prompt_format=request.format
                )
                prompts = [
                    _asked(tokenizer, case, about, max_length) for case, about in (asked if alone else asked[:1])
                ]
            except RequestError:
                continue
            subject = subject_key(request.subject or "")
            relation = record.relation or request.prompt.replace(request.subject or "\0", "")
            routed.append(RoutedRecord(tuple(ids), key, subject, relation, tuple(filter(None, prompts))))
    return routed


def _asked(tokenizer: Any, case: EditRequest | EditCase, about: bool, max_length: int | None) -> Asked | None:
    try:
        ids = encode_prompt(tokenizer, case.prompt, case.format)
    except RequestError:
        return None
    if not ids or (max_length is not None and len(ids) > max_length):
        return None
    facts = frozenset(hop.key() for hop in getattr(case, "facts", ()))
    return Asked(tuple(ids), facts, getattr(case, "hops", 1), about)


class RouterBatches(torch.utils.data.Dataset[RouterBatch]):
    """Batches by number, each drawn anew from a seed: like relations and like subjects stand together.

    Args:
        records: What is drawn from.
        number: Batches.
        size: Records of a batch, all of other facts.
        seed: Seeds the draws.
        candidates: Further requests of a batch, to tell apart from.
    """

    def __init__(
        self, records: Sequence[RoutedRecord], number: int, size: int, seed: int = 0, candidates: int = 0
    ) -> None:
        self.records, self.number, self.size, self.seed, self.candidates = records, number, size, seed, candidates
        self.by_relation, self.by_subject = (
            _grouped(records, lambda r: r.relation),
            _grouped(records, lambda r: r.subject),
        )

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> RouterBatch:
        if not 0 <= index < self.number:
            raise IndexError(f"batch {index} of {self.number}")
        rng = random.Random(f"{self.seed}-{index}")
        drawn = self._draw(rng, self.size + self.candidates)
        prompts: list[tuple[int, Asked]] = []
        for place, record in enumerate(drawn[: self.size]):
            first, *rest = record.prompts
            prompts += [(place, first)] if rng.random() < 0.5 or not rest else []
            for about, most in ((True, 2), (False, 2)):
                of_kind = [one for one in rest if one.about == about]
                prompts += [(place, one) for one in rng.sample(of_kind, min(most, len(of_kind)))]
        texts = [self._maybe_behind_another(rng, one.ids) for _, one in prompts]
        return _without_own(batch_of(drawn, prompts, texts), [rng.random() < ABSENT_SHARE for _ in prompts])

    def _draw(self, rng: random.Random, number: int) -> list[RoutedRecord]:
        """Draw records of different facts, some of one relation or subject together."""
        drawn: dict[Hashable, RoutedRecord] = {}
        while len(drawn) < min(number, self._facts):
            seed = rng.choice(self.records)
            group = [
                seed,
                *rng.sample(self.by_relation[seed.relation], min(ALIKE, len(self.by_relation[seed.relation]))),
            ]
            if seed.subject:
                subject = self.by_subject[seed.subject]
                group += rng.sample(subject, min(ALIKE // 2, len(subject)))
            for record in group:
                drawn.setdefault(record.key, record)
        order = list(drawn.values())[:number]
        rng.shuffle(order)
        return order

    @property
    def _facts(self) -> int:
        if not hasattr(self, "_number_of_facts"):
            self._number_of_facts = len({record.key for record in self.records})
        return self._number_of_facts

    def _maybe_behind_another(self, rng: random.Random, ids: tuple[int, ...]) -> tuple[int, ...]:
        if rng.random() >= PREFIX_SHARE:
            return ids
        other = rng.choice(self.records)
        return (*(other.request if rng.random() < 0.5 else rng.choice(other.prompts).ids), *ids)


def batch_of(
    records: Sequence[RoutedRecord], prompts: Sequence[tuple[int, Asked]], texts: Sequence[Sequence[int]] | None = None
) -> RouterBatch:
    """Return prompts, each with the place of its record, and the requests of the records as one batch."""
    texts = [one.ids for _, one in prompts] if texts is None else texts
    owner = torch.tensor([place if one.about else NONE for place, one in prompts])
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        places[record.key].append(place)
    ignored = torch.zeros(len(prompts), len(records), dtype=torch.bool)
    for row, (_, one) in enumerate(prompts):
        for key in one.facts:
            ignored[row, places.get(key, [])] = True
    rows = (owner != NONE).nonzero().flatten()
    ignored[rows, owner[rows]] = False
    hops = torch.tensor([one.hops for _, one in prompts])
    return RouterBatch(padded(texts), padded([record.request for record in records]), owner, ignored, hops)


def _without_own(batch: RouterBatch, absent: Sequence[bool]) -> RouterBatch:
    """Return the batch as if the requests that some prompts are about were not there: those are about none then.

    What stands beside them of the same subject or relation makes the hardest negatives.
    """
    rows = (torch.tensor(absent) & (batch.owner != NONE)).nonzero().flatten()
    owner, ignored = batch.owner.clone(), batch.ignored.clone()
    ignored[rows, owner[rows]] = True
    owner[rows] = NONE
    return replace(batch, owner=owner, ignored=ignored)


def padded(texts: Sequence[Sequence[int]]) -> TokenBatch:
    """Return token ids of unlike lengths as one batch, padded on the left; the last token is judged by nothing."""
    return pad_and_label([([*ids, 0], len(ids)) for ids in texts])


def _grouped(records: Sequence[RoutedRecord], name: Callable[[RoutedRecord], str]) -> dict[str, list[RoutedRecord]]:
    groups: dict[str, list[RoutedRecord]] = defaultdict(list)
    for record in records:
        groups[name(record)].append(record)
    return groups
