"""Pruning the scale factors of edits from the smallest up, and what of the edit is left (Fig. 7b)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.forward import evaluating
from ..core.records import EditRecord
from ..core.tokens import context_length, encode_requests
from .readings import Asked, chunks, read_targets

FRACTIONS = tuple(i / 10 for i in range(11))
MEASURES = (
    "reliability_confidence",
    "reliability_rank",
    "generality_confidence",
    "generality_rank",
    "locality_similarity",
)


@dataclass(frozen=True)
class PruningCurves:
    """What is left of n edits as their scale factors are pruned.

    Attributes:
        fractions: The k shares of an edit's factors that are set to zero, the smallest first.
        values: By measure (k, n), the mean over the requests or cases of each record; NaN where it has none.
            Confidence is the mean probability of the target tokens, rank their mean place among all predictions (1 is
            the best), similarity 1 - JS divergence (base 2) from the unedited model.
        successful: (n,) of bool: nothing pruned, every target token of the requests is the best prediction.
    """

    fractions: tuple[float, ...]
    values: dict[str, Tensor]
    successful: Tensor

    def means(self, kept: Tensor | None = None) -> dict[str, list[float | None]]:
        """Average each measure over records.

        Args:
            kept: (n,) of bool, the records that count; by default the successful ones.

        Returns:
            By measure k means; None where no record has such cases.
        """
        chosen = self.successful if kept is None else kept
        means = {name: values[:, chosen].nanmean(1).tolist() for name, values in self.values.items()}
        return {name: [None if math.isnan(v) else v for v in values] for name, values in means.items()}


def pruned(gates: Sequence[Tensor], masks: Sequence[Tensor], owners: Tensor, fraction: float) -> list[Tensor]:
    """Set the smallest scale factors of each edit to zero, over all its tokens and layers.

    Args:
        gates: Per layer (b, l_e), before the sigmoid.
        masks: Per layer (b, l_e), True on real tokens.
        owners: (b,) which edit each request belongs to, 0 … n-1.
        fraction: Share of an edit's factors that are pruned, rounded to a whole number of them.

    Returns:
        The gates, -inf where pruned.
    """
    result = [gate.clone() for gate in gates]
    for owner in range(int(owners.max()) + 1):
        rows = owners == owner
        real = [mask & rows.unsqueeze(-1).to(mask.device) for mask in masks]
        values = torch.cat([gate[places].float().cpu() for gate, places in zip(gates, real, strict=True)])
        smallest = torch.zeros(len(values), dtype=torch.bool)
        smallest[values.argsort(stable=True)[: round(fraction * len(values))]] = True
        sizes = [int(places.sum()) for places in real]
        for gate, places, part in zip(result, real, smallest.split(sizes), strict=True):
            gate[places] = gate[places].masked_fill(part.to(gate.device), -math.inf)
    return result


@torch.no_grad()
def pruning_curves(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    fractions: Sequence[float] = FRACTIONS,
    *,
    batch_size: int = 32,
) -> PruningCurves:
    """Edit each record into the model with ever fewer scale factors, and read confidence, rank and similarity.

    The requests of a record are edited jointly; supporting hops are not edited in.

    Args:
        editor: An editor with scale factors.
        model: The backbone, unchanged by the call.
        tokenizer: Its tokenizer.
        records: n records.
        fractions: Shares that are pruned, 0 … 1.
        batch_size: Records whose edits are held at once, and texts of a forward pass.

    Raises:
        ValueError: If the editor has no scale factor, a fraction is out of range or there is no record.
    """
    if not records:
        raise ValueError("no record is given; pruning needs at least one")
    if wrong := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(f"fractions must be between 0 and 1, found {wrong[0]}")
    parts = []
    with evaluating(model), evaluating(editor):
        for members in chunks(len(records), batch_size):
            part = [records[i] for i in members]
            parts.append(_curves(editor, model, tokenizer, part, fractions, batch_size))
    values = {name: torch.cat([part[name] for part, _ in parts], 1) for name in MEASURES}
    return PruningCurves(tuple(fractions), values, torch.cat([successful for _, successful in parts]))


def _curves(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    fractions: Sequence[float],
    batch_size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    requests = list(chain.from_iterable(record.requests for record in records))
    owners = torch.tensor([i for i, record in enumerate(records) for _ in record.requests])
    captured = editor.capture(model, encode_requests(tokenizer, requests, max_length=context_length(model)))
    gates = [factors.gates for factors in editor(captured)]
    if any(gate is None for gate in gates):
        raise ValueError("the editor has no scale factor to prune; give one whose config says use_scale_factor")
    masks = [factors.mask for factors in captured]
    curves: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    successful = _read(editor, model, tokenizer, records, captured, gates, owners, batch_size)[1]
    for fraction in fractions:
        means, _ = _read(
            editor, model, tokenizer, records, captured, pruned(gates, masks, owners, fraction), owners, batch_size
        )
        for name in MEASURES:
            curves[name].append(means[name])
    return {name: torch.stack(values) for name, values in curves.items()}, successful


def _read(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    captured: Any,
    gates: Sequence[Tensor],
    owners: Tensor,
    batch_size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the measures of each record under its edit with these gates, and whether its requests are answered."""
    edit = editor.as_edit(editor(captured, gates=gates), owners)
    number, means = len(records), {}
    successful = torch.zeros(number)
    for role, cases in _cases(records).items():
        rows = [i for i, _ in cases]
        similar = role == "locality"
        readings = read_targets(
            model, tokenizer, [case for _, case in cases], edit, rows, similar=similar, batch_size=batch_size
        )
        if similar:
            means["locality_similarity"] = _mean_by(readings.similarity, rows, number)
            continue
        means[f"{role}_confidence"] = _mean_by(readings.confidence, rows, number)
        means[f"{role}_rank"] = _mean_by(readings.rank, rows, number)
        if role == "reliability":
            successful = _mean_by(readings.first.float(), rows, number) == 1
    return means, successful


def _cases(records: Sequence[EditRecord]) -> dict[str, list[tuple[int, Asked]]]:
    return {
        "reliability": [(i, request) for i, record in enumerate(records) for request in record.requests],
        "generality": [(i, case) for i, record in enumerate(records) for case in record.generality],
        "locality": [(i, case) for i, record in enumerate(records) for case in record.locality],
    }


def _mean_by(values: Tensor, rows: Sequence[int], number: int) -> Tensor:
    """Average values (p,) over the records that they belong to -> (number,), NaN for those without any."""
    places = torch.tensor(rows, dtype=torch.long)
    total = torch.zeros(number).index_add(0, places, values.float())
    return total / torch.bincount(places, minlength=number)
