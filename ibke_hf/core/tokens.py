"""Prompt and target -> token ids, labels, masks and positions: the only padding and leading-space code.

Prompt + target is tokenised once, and the target span starts at ``len(tokenise(prompt))`` (PROTOCOL); what stands
between them is :mod:`.prompts`' matter. A chat turn has its template's own ids. The last target token predicts
nothing and is not fed, so a request has l_e = prompt + target - 1 tokens (SPEC §2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .prompts import RequestError, chat_ids, encode_chat, is_unspaced_text, spaced_target, with_leading_space
from .records import PLAIN, EditRequest, PromptFormat

__all__ = [
    "IGNORED",
    "RequestError",
    "Side",
    "Span",
    "TokenBatch",
    "context_length",
    "encode",
    "encode_prompt",
    "encode_requests",
    "pad_and_label",
    "with_leading_space",
]

logger = logging.get_logger(__name__)
IGNORED = -100
Span = Literal["prompt", "offsets"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class TokenBatch:
    """Padded prompts with their targets.

    Attributes:
        input_ids: (b, l) token ids.
        attention_mask: (b, l) 1 on real tokens, 0 on padding.
        labels: (b, l) id of the token to be predicted *at* each position, -100 where none is judged.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def position_ids(self) -> Tensor:
        """(b, l) positions that follow the mask, so that the padding side changes nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def kept(self) -> int:
        """Number of trailing columns that hold every label: all that the vocabulary projection has to see."""
        columns = (self.labels != IGNORED).any(0).nonzero()
        return self.labels.shape[1] - int(columns[0]) if len(columns) else 1

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def trimmed(self, multiple: int = 1) -> TokenBatch:
        """Drop the leading columns that are padding in every row, down to a multiple of `multiple` columns.

        Few different widths let a backend reuse what it has compiled for a shape.
        """
        length = self.input_ids.shape[1]
        needed = length - int(self.attention_mask.any(0).int().argmax())
        extra = -(-needed // multiple) * multiple - length
        sides = ((self.input_ids, 0), (self.attention_mask, 0), (self.labels, IGNORED))
        return TokenBatch(*(torch.nn.functional.pad(tensor, (extra, 0), value=value) for tensor, value in sides))

    def __getitem__(self, rows: Any) -> TokenBatch:
        return TokenBatch(self.input_ids[rows], self.attention_mask[rows], self.labels[rows])

    @classmethod
    def cat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Stack left-padded batches of unequal lengths."""
        width = max(batch.input_ids.shape[1] for batch in batches)
        return cls(
            *(
                torch.cat(
                    [
                        torch.nn.functional.pad(getattr(b, name), (width - b.input_ids.shape[1], 0), value=value)
                        for b in batches
                    ]
                )
                for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
            )
        )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str,
    *,
    name: str = "request 0",
    span: Span = "prompt",
    max_length: int | None = None,
    prompt_format: PromptFormat = PLAIN,
) -> tuple[list[int], int]:
    """Tokenise prompt + target once; return the ids and the index of the first target token.

    Args:
        tokenizer: Adds its default special tokens to prompt and full text alike; an appended EOS is excluded.
        prompt: Text before the target.
        target: Text to be predicted.
        name: Names the request or case in errors.
        span: ``"prompt"`` for PROTOCOL's rule, ``"offsets"`` to let the token that covers the seam start the span.
            Of a chat turn, which has ids of its own, the span is known.
        max_length: The model's context in tokens, if it is limited.
        prompt_format: Plain or a chat turn, and what stands between prompt and target.

    Raises:
        RequestError: If a text is empty, the target span is empty, the text is longer than the context, or the
            tokenizer cannot do it.
    """
    if not prompt.strip() or not target.strip():
        missing = "prompt" if not prompt.strip() else "target"
        raise RequestError(f"{name}: the {missing} is empty ({prompt!r} -> {target!r}); give it at least one word")
    _require_unicode(prompt + target, name)
    ids, start = (
        _named(name, encode_chat, tokenizer, prompt, target, prompt_format)
        if prompt_format.chat
        else _encode_plain(tokenizer, prompt, target, name, span, prompt_format.leading_space)
    )
    if max_length is not None and len(ids) - 1 > max_length:
        raise RequestError(
            f"{name}: {len(ids) - 1} tokens do not fit the model's context of {max_length}; shorten prompt or target"
        )
    return ids, start


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, name: str, span: Span, rule: str
) -> tuple[list[int], int]:
    text = prompt + spaced_target(prompt, target, rule)
    if rule == "protocol" and target[:1] != " " and is_unspaced_text(prompt):
        logger.warning_once(  # type: ignore[attr-defined]
            f"{name}: by PROTOCOL's rule a space stands before {target!r}, where its script has none; the leading "
            'space "auto" leaves it out'
        )
    ids = encode_prompt(tokenizer, text)
    if not ids:
        raise RequestError(
            f"{name}: the tokenizer makes no token of {text!r}; its vocabulary files are missing or empty"
        )
    start = _span_start(tokenizer, prompt, text) if span == "offsets" else len(encode_prompt(tokenizer, prompt))
    if start >= len(ids) or start < 1:
        raise RequestError(
            f"{name}: the tokenizer merges prompt and target, which leaves no target token ({prompt!r} -> "
            f"{target!r}); "
            'end the prompt at a word boundary or use span="offsets"'
        )
    return ids, start


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_format: PromptFormat = PLAIN) -> list[int]:
    """Tokenise a text to be continued.

    A chat turn has its template's own ids; a plain text has the special tokens that the tokenizer adds by default, but
    no appended EOS.

    Raises:
        RequestError: If the text is no Unicode, or the chat template cannot render it.
    """
    _require_unicode(prompt, "the prompt")
    if prompt_format.chat:
        return chat_ids(tokenizer, prompt, prompt_format.chat_options)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    ended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return (
        ids[:-1] if ended and tokenizer("a")["input_ids"][-1] == ids[-1] else ids
    )  # unless the text itself ends in it


def _require_unicode(text: str, name: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{name}: {text[:80]!r} holds half of a character (a lone surrogate); write it again")


def _named(name: str, call: Any, *arguments: Any) -> Any:
    """Call, and let an error begin with the name of the request or case."""
    try:
        return call(*arguments)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def pad_and_label(encoded: Sequence[tuple[list[int], int]], *, side: Side = "left", pad: int = 0) -> TokenBatch:
    """Pad encoded texts to one batch; each position before a target token is labelled with it.

    Left padding (the default) aligns the targets at the end, so that logits are needed on few columns only.
    `pad` is never attended to, so any id serves: a tokenizer without a pad token is no obstacle.
    """
    width = max(len(ids) for ids, _ in encoded) - 1
    shape = (len(encoded), width)
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (ids, start) in enumerate(encoded):
        length = len(ids) - 1
        first = width - length if side == "left" else 0
        input_ids[row, first : first + length] = torch.tensor(ids[:-1])
        mask[row, first : first + length] = 1
        labels[row, first + start - 1 : first + length] = torch.tensor(ids[start:])
    return TokenBatch(input_ids, mask, labels)


def encode_requests(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    name: str = "request",
    span: Span = "prompt",
    side: Side = "left",
    max_length: int | None = None,
) -> TokenBatch:
    """Tokenise and pad requests (or cases, which also have a prompt and a target); errors name them by index."""
    if not requests:
        raise RequestError("no edit request was given; pass at least one EditRequest(prompt, target)")
    encoded = [
        encode(
            tokenizer,
            r.prompt,
            r.target,
            name=f"{name} {i}",
            span=span,
            max_length=max_length,
            prompt_format=r.format,
        )
        for i, r in enumerate(requests)
    ]
    return pad_and_label(encoded, side=side)


def context_length(model: Any) -> int | None:
    """Return the number of positions of a model, None where its config states none."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _span_start(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> int:
    """Index of the first token that reaches past the prompt."""
    if not tokenizer.is_fast:
        raise RequestError(
            'span="offsets" needs a fast tokenizer, which knows the offsets of its tokens; use span="prompt"'
        )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
