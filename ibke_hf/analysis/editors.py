"""Editors side by side -> the data of Figures 6 and 7, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.records import EditRecord
from .latents import Latents, edit_latents, frequent_relations, plane, silhouette
from .pruning import FRACTIONS, pruning_curves
from .scale_factors import gate_statistics, scale_factors

RELATIONS = 8  # as many as there are marks
LETTERS = 60  # of a prompt that is shown


@dataclass(frozen=True)
class Compared:
    """An editor of a figure.

    Attributes:
        label: What the figure calls it, such as ``"with IB"``.
        editors: By seed of its training, or one alone; drawn is the first, numbers are of all.
    """

    label: str
    editors: Mapping[int, Any] = field(default_factory=dict)


def label_of(editor: Any) -> str:
    """Say whether an editor has an information bottleneck."""
    return "with IB" if editor.config.use_information_bottleneck else "without IB"


def latent_maps(
    compared: Sequence[Compared],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    seed: int = 0,
    relations: int = RELATIONS,
) -> dict[str, Any]:
    """Return the data of Figure 6: maps of the latents of each layer, and how clear their clusters are.

    Args:
        compared: The editors.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The edits; those of the most frequent relations are taken, the first request of each.
        seed: Of the map.
        relations: Number of relations.

    Returns:
        ``relations`` (of each point), ``records``, and ``editors``: by label ``confidence`` (n,) and ``layers``: by
        name ``points`` (n, 2), ``silhouette_of_map``, and ``silhouette``, that of the latents themselves, by seed of
        the training.

    Raises:
        ValueError: If an editor has no latent, or too few records have a relation.
    """
    chosen = frequent_relations(records, relations)
    names = [record.relation for record in chosen]
    if len(set(names)) < 2:
        raise ValueError("Figure 6 colours edits by relation; give records of at least two relations")
    requests = [record.requests[0] for record in chosen]
    editors = {}
    for one in compared:
        read = {number: edit_latents(editor, model, tokenizer, requests) for number, editor in one.editors.items()}
        editors[one.label] = _map_of(read, names, seed)
    return {"figure": "6", "relations": names, "records": [record.id for record in chosen], "editors": editors}


def _map_of(read: Mapping[int, Latents], names: Sequence[str], seed: int) -> dict[str, Any]:
    first = next(iter(read.values()))
    layers = {}
    for layer, points in first.layers.items():
        mapped = plane(points, seed)
        layers[layer] = {
            "points": [[round(value, 3) for value in point] for point in mapped.tolist()],
            "silhouette_of_map": silhouette(mapped, names),
            "silhouette": {str(number): silhouette(latents.layers[layer], names) for number, latents in read.items()},
        }
    return {"layers": layers, "confidence": [round(value, 4) for value in first.confidence.tolist()]}


def scale_factor_maps(
    compared: Sequence[Compared],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    drawn: int = 3,
) -> dict[str, Any]:
    """Return the data of Figure 7a: scale factors over the tokens and layers of some edits, and how sparse all are.

    Args:
        compared: The editors.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The edits, of which the first request counts.
        drawn: Number of edits that are drawn, spread over the records.

    Returns:
        ``edits``, those that are drawn (``record``, ``prompt``, ``target``, ``tokens``, ``judged``, and
        ``editors``: by label and layer the factors); ``statistics``: by label, seed of the training and layer what
        :func:`~ibke_hf.analysis.scale_factors.gate_statistics` says of all records; ``measured``, their number.

    Raises:
        ValueError: If an editor has no scale factor.
    """
    requests = [record.requests[0] for record in records]
    statistics: dict[str, dict[str, Any]] = {}
    for one in compared:
        statistics[one.label] = {}
        for number, editor in one.editors.items():
            found = gate_statistics(editor, model, tokenizer, requests)
            if found is None:
                raise ValueError(f"{one.label}: this editor has no scale factor to draw; leave it out")
            statistics[one.label][str(number)] = found
    edits = [_drawn_edit(compared, model, tokenizer, record) for record in _spread(records, drawn)]
    return {"figure": "7a", "measured": len(records), "statistics": statistics, "edits": edits}


def _spread(records: Sequence[EditRecord], number: int) -> list[EditRecord]:
    """Return some records: the first of each kind first, then evenly."""
    kinds = list({record.kind: record for record in reversed(records)}.values())[::-1]
    step = max(len(records) // max(number, 1), 1)
    spread = {record.id: record for record in [*kinds, *records[::step], *records]}
    return list(spread.values())[:number]


def _drawn_edit(
    compared: Sequence[Compared], model: Any, tokenizer: PreTrainedTokenizerBase, record: EditRecord
) -> dict[str, Any]:
    request = record.requests[0]
    of = {
        one.label: scale_factors(next(iter(one.editors.values())), model, tokenizer, request) or {} for one in compared
    }
    first = next(iter(of.values()))
    layers = {
        label: {name: [round(value, 4) for value in values] for name, values in factors["layers"].items()}
        for label, factors in of.items()
    }
    return {
        "record": record.id,
        "prompt": request.prompt,
        "target": request.target,
        "tokens": first["tokens"],
        "judged": first["judged"],
        "editors": layers,
    }


def pruning(
    compared: Sequence[Compared],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    fractions: Sequence[float] = FRACTIONS,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the data of Figure 7b: what is left of edits as their scale factors are pruned from the smallest up.

    The curves are means over the edits that succeed under every editor, so that all are of the same ones.

    Args:
        compared: The editors.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The edits.
        fractions: Shares that are pruned.
        told: Called with the name of each editor before it is measured.

    Returns:
        ``fractions``, ``records``, ``successful`` (the number of edits that count), and ``editors``: by label and seed
        of the training by measure a value for each fraction.

    Raises:
        ValueError: If an editor has no scale factor, or no edit succeeds under all.
    """
    curves = {}
    for one in compared:
        for number, editor in one.editors.items():
            told(f"pruning: {one.label}, seed {number}")
            curves[one.label, number] = pruning_curves(editor, model, tokenizer, records, fractions)
    kept = torch.stack([curve.successful for curve in curves.values()]).all(0)
    if not bool(kept.any()):
        raise ValueError("Figure 7b averages over successful edits, and no edit succeeds under all editors")
    editors: dict[str, dict[str, Any]] = {one.label: {} for one in compared}
    for (label, number), curve in curves.items():
        editors[label][str(number)] = curve.means(kept)
    return {
        "figure": "7b",
        "fractions": list(fractions),
        "records": len(records),
        "successful": int(kept.sum()),
        "editors": editors,
    }
