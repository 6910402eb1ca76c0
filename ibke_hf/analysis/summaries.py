"""Rows of an evaluation -> what the figures of a sweep need of one training: scores whole and in parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..evaluation.scores import Row, scores_by, summarise

KEPT = ("reliability", "generality", "locality", "avg", "f1", "generality_top1", "locality_top1", "records")
KINDS = ("counterfactual", "unknown")


def scores_of_training(rows: Sequence[Row], held_out: Collection[str]) -> dict[str, Any]:
    """Summarise what an editor scored.

    Args:
        rows: Of :func:`~ibke_hf.evaluation.protocol.evaluate_records`.
        held_out: Domains that no training sees.

    Returns:
        ``scores`` of all rows, in percent; ``parts`` by name, those of the domains that may be trained on (``test``),
        of the others (``held_out``), and of counterfactual and unknown edits; ``by_domain``; and of generality cases
        ``by_combination`` of criteria and ``by_hops`` (score, top1, cases).
    """
    general = [row for row in rows if row["role"] == "generality"]
    parts = {
        "test": [row for row in rows if row["domain"] not in held_out],
        "held_out": [row for row in rows if row["domain"] in held_out],
        **{kind: [row for row in rows if row["kind"] == kind] for kind in KINDS},
    }
    summary = summarise(rows)
    return {
        "scores": _kept(summary),
        "parts": {name: _kept(summarise(part)) for name, part in parts.items() if part},
        "by_domain": {domain: _kept(scores) for domain, scores in summary["by_domain"].items()},
        "by_combination": scores_by_combination(general),
        "by_hops": {hops: _case_scores(scores) for hops, scores in scores_by(general, "hops").items()},
    }


def scores_by_combination(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Score cases by the combination of criteria that they meet, such as ``"Multi-Hop + Subject Alias"``, in percent.

    Args:
        rows: Of generality or of locality cases.
    """
    combined = [{**row, "combination": " + ".join(sorted(row["criteria"])) or "none"} for row in rows]
    return {name: _case_scores(scores) for name, scores in scores_by(combined, "combination").items()}


def _case_scores(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: scores[name] for name in ("score", "top1", "cases")}


def _kept(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in KEPT}
