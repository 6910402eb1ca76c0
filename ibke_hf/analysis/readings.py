"""How sure a model is of targets: probability and rank of their tokens, and how far an edit moves predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.capture import mean_per_row
from ..core.edit_values import Edit
from ..core.forward import evaluating, target_logits
from ..core.records import EditCase, EditRequest
from ..core.tokens import IGNORED, context_length, encode_requests
from ..evaluation.scores import js_similarity, token_ranks

Asked = EditRequest | EditCase


@dataclass(frozen=True)
class Readings:
    """What a model predicts where targets are due, a value for each of n texts: the mean over its target tokens.

    Attributes:
        confidence: (n,) probability of the target tokens, 0 … 1.
        rank: (n,) place of the target tokens among all predictions, 1 for the best.
        first: (n,) of bool, whether every target token is the best prediction.
        similarity: (n,) 1 - JS divergence (base 2) between the edited and the unedited model; 1 without an edit.
    """

    confidence: Tensor
    rank: Tensor
    first: Tensor
    similarity: Tensor


@torch.no_grad()
def read_targets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    edit: Edit | None = None,
    rows: Sequence[int] | None = None,
    *,
    similar: bool = False,
    batch_size: int = 64,
) -> Readings:
    """Read what a model predicts at the targets of requests or cases, teacher-forced.

    Args:
        model: The backbone, unchanged by the call.
        tokenizer: Its tokenizer.
        asked: n prompts with their targets.
        edit: What the model carries; None for nothing.
        rows: For an edit of several independent ones, which of them each text is asked under.
        similar: Ask the unedited model too, for the similarity.
        batch_size: Texts of a forward pass.

    Raises:
        RequestError: If a text is unusable; names it by its index.
    """
    lengths = [len(one.prompt) + len(one.target) for one in asked]
    order = sorted(range(len(asked)), key=lengths.__getitem__)  # like lengths pad each other less
    parts: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            parts.append(_read(model, tokenizer, [asked[i] for i in members], edit, _of(rows, members), similar))
    values = torch.cat(parts, 1)[:, torch.tensor(order).argsort()] if parts else torch.zeros(4, 0)
    return Readings(values[0], values[1], values[2] > 0, values[3])


def _of(rows: Sequence[int] | None, members: Sequence[int]) -> Tensor | None:
    return None if rows is None else torch.tensor([rows[i] for i in members])


def _read(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    edit: Edit | None,
    rows: Tensor | None,
    similar: bool,
) -> Tensor:
    """Return (4, b): confidence, rank, whether all are first, and similarity, each a mean per text."""
    batch = encode_requests(tokenizer, asked, max_length=context_length(model))  # type: ignore[arg-type]
    with nullcontext() if edit is None else edit.attached(model, rows=rows):
        logits, labels = target_logits(model, batch)
    places, columns = (labels != IGNORED).nonzero(as_tuple=True)
    targets, edited = labels[places, columns], logits[places, columns].float()
    ranks = token_ranks(edited, targets)
    values = [edited.softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1), ranks.float() + 1, (ranks < 1).float()]
    if similar and edit is not None:
        values.append(js_similarity(edited, target_logits(model, batch)[0][places, columns]))
    else:
        values.append(torch.ones_like(values[0]))
    means = torch.stack([mean_per_row(value, places, len(asked)) for value in values]).cpu()
    means[2] = (means[2] > 1 - 1e-6).float()
    return means


def chunks(number: int, size: int) -> Iterator[range]:
    """Cut 0 … number-1 into ranges of `size`."""
    for start in range(0, number, size):
        yield range(start, min(start + size, number))
