"""The formulas of PROTOCOL: token hits, similarities, exact match, and rows -> a summary in percent.

Pure functions on tensors and plain values. Nothing here runs a model or knows a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]
CASES = ("generality", "locality")
ROLES = ("reliability", *CASES)
TEACHER_FORCED = ("reliability", "generality_top1", "locality_top1", "generality", "locality", "avg", "f1")
ANSWERED = ("answered_reliability", "answered_generality", "answered_locality")  # by free generation, if asked for
REPORTED = (  # what every table, card and report shows: what is right first, then what the paper counts as a hit
    "exact_match",
    "reliability",
    "generality_top1",
    "locality_top1",
    "generality",
    "locality",
    "avg",
    "f1",
)
TITLES = {  # in words
    "exact_match": "exact match of generated answers (generality)",
    "reliability": "reliability, top 1",
    "generality_top1": "generality, top 1",
    "locality_top1": "locality, top 1",
    "generality": "generality, in the top 5",
    "locality": "locality, in the top 5",
    "avg": "average of reliability, generality and locality, in the top 5",
    "f1": "F1 of generality and locality, in the top 5",
    "answered_reliability": "free answer contains the target, of the edit (reliability)",
    "answered_generality": "free answer contains the target, of what follows (generality)",
    "answered_locality": "free answer is the one from before the edit (locality)",
}

# --- tokens -------------------------------------------------------------------------------------------------------


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """Rank of each id among the predictions at its position, 0 for the best; ties go to the lowest id.

    A rank counts what comes before the id, in fp32: greater logits, and equal logits of lower ids. Nothing is sorted.
    Whatever does not compare as smaller counts as greater, so that NaN logits score no hit.

    Args:
        logits: (p, vocabulary) in any precision.
        ids: (p,) on the same device.

    Returns:
        (p,) ranks, 0 … vocabulary.
    """
    values = logits.float()
    value = values.gather(-1, ids.unsqueeze(-1))
    lower = torch.arange(values.shape[-1], device=values.device) < ids.unsqueeze(-1)
    return (~(values <= value) | ((values == value) & lower)).sum(-1)


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Return the k best ids at each position, the best first, ties to the lowest id: (p, vocabulary) -> (p, k)."""
    values, best = logits.float().clone(), []
    for _ in range(min(k, values.shape[-1])):
        best.append(values.argmax(-1, keepdim=True))
        values.scatter_(-1, best[-1], -math.inf)
    return torch.cat(best, -1)


def ranks_among(ordered: Sequence[Sequence[int]], ids: Sequence[int]) -> Tensor:
    """Rank of each id among the ordered predictions at its position, 0 for the best; behind them all if absent.

    Args:
        ordered: For each of p positions the predicted ids, the best first; as many as have to be told apart.
        ids: The p ids that are looked up.

    Returns:
        (p,) ranks, which are :func:`token_ranks`' as far down as the predictions go.
    """
    return torch.tensor([(*best, i).index(i) for best, i in zip(ordered, ids, strict=True)])


def case_scores(hits: Tensor, first: Tensor) -> dict[str, float]:
    """Scores of one case: ``score``, ``top1`` and ``first_token`` as fractions.

    Args:
        hits: (p,) of bool, whether each target token is within the case's top k.
        first: (p,) of bool, whether it is the top-1 prediction.
    """
    return {"score": fraction(hits), "top1": fraction(first), "first_token": float(first[0])}


def fraction(hits: Tensor) -> float:
    """Fraction of a case's target tokens that are hits: (p,) of bool -> 0 … 1."""
    return int(hits.sum()) / hits.numel()


def js_similarity(logits: Tensor, other: Tensor) -> Tensor:
    """1 - Jensen-Shannon divergence (base 2) of the distributions at each position, in fp32.

    Args:
        logits: (p, vocabulary).
        other: (p, vocabulary).

    Returns:
        (p,) from 0 (no id in common) to 1 (equal); 0 where a distribution is not finite.
    """
    one, two = logits.float().softmax(-1), other.float().softmax(-1)
    middle = torch.special.entr((one + two) / 2)
    divergence = (middle - (torch.special.entr(one) + torch.special.entr(two)) / 2).sum(-1) / math.log(2)
    return (1 - divergence).clamp(0, 1).nan_to_num(0.0)


# --- aggregation --------------------------------------------------------------------------------------------------


def mean(values: Iterable[float | bool | None]) -> float | None:
    """Mean of the values that exist; None if none does."""
    present = [float(value) for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def f1(generality: float | None, locality: float | None) -> float | None:
    """Harmonic mean of generality and locality, 0 if both are 0; None if either is absent."""
    if generality is None or locality is None:
        return None
    return 2 * generality * locality / (generality + locality) if generality + locality else 0.0


def average(*scores: float | None) -> float | None:
    """Mean of those of reliability, generality and locality that the dataset has."""
    return mean(scores)


def mean_over_lists(rows: Iterable[Row], field: str) -> float | None:
    """Mean of a row field over the cases of each list, then over the lists, unweighted, in percent."""
    lists: dict[str, list[Any]] = {}
    for row in rows:
        lists.setdefault(row["list"], []).append(row.get(field))
    result = mean(mean(values) for values in lists.values())
    return None if result is None else 100 * result


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Aggregate rows as PROTOCOL says: over cases per list, then over lists; reliability over requests.

    Args:
        rows: What :func:`~ibke_hf.evaluation.protocol.evaluate_records` makes of each request and case.

    Returns:
        ``reliability``, ``generality``, ``locality``, ``f1``, ``avg``, ``generality_top1``, ``locality_top1``,
        ``exact_match`` and ``first_token`` (of generality cases), ``reliability_exact_match`` (of requests) and
        ``js_similarity`` (of locality cases), and by free generation ``answered_reliability``, ``answered_generality``
        and ``answered_locality``, all in percent and None where there is nothing to average; ``records``, and
        ``cases`` by role. Besides, ``by_domain[domain]`` with all of these, and ``by_criterion[role][name]`` and
        ``by_hops[role][hops]`` with score, top1, exact_match and cases, and answered where answers were free.
    """
    judged = {role: [row for row in rows if row["role"] == role] for role in CASES}
    domains = sorted({row["domain"] for row in rows})
    return {
        **_scores(rows),
        "by_criterion": {role: scores_by(judged[role], "criteria") for role in CASES},
        "by_hops": {role: scores_by(judged[role], "hops") for role in CASES},
        "by_domain": {domain: _scores([row for row in rows if row["domain"] == domain]) for domain in domains},
    }


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    requests, generality, locality = ([row for row in rows if row["role"] == role] for role in ROLES)
    hit = mean(row["score"] for row in requests)
    said, answered = (mean(row.get(field) for row in requests) for field in ("exact_match", "answered"))
    reliability = None if hit is None else 100 * hit
    general, local = mean_over_lists(generality, "score"), mean_over_lists(locality, "score")
    return {
        "reliability": reliability,
        "generality": general,
        "locality": local,
        "f1": f1(general, local),
        "avg": average(reliability, general, local),
        "generality_top1": mean_over_lists(generality, "top1"),
        "locality_top1": mean_over_lists(locality, "top1"),
        "exact_match": mean_over_lists(generality, "exact_match"),
        "reliability_exact_match": None if said is None else 100 * said,
        "first_token": mean_over_lists(generality, "first_token"),
        "js_similarity": mean_over_lists(locality, "js_similarity"),
        "answered_reliability": None if answered is None else 100 * answered,
        "answered_generality": mean_over_lists(generality, "answered"),
        "answered_locality": mean_over_lists(locality, "answered"),
        "records": len({(row["dataset"], row["record"]) for row in rows}),
        "cases": {"reliability": len(requests), "generality": len(generality), "locality": len(locality)},
    }


def scores_by(rows: Sequence[Row], field: str) -> dict[str, dict[str, Any]]:
    """Score the rows of each value of a field; a row with several values (criteria) counts for each of them.

    Args:
        rows: Of one role.
        field: Whose values part the rows, such as ``"hops"``.

    Returns:
        By value, as text, ``score``, ``top1``, ``exact_match`` (and ``answered``) in percent, and ``cases``.
    """
    parts: dict[Any, list[Row]] = {}
    for row in rows:
        values = row[field] if isinstance(row[field], (list, tuple)) else [row[field]]
        for value in values:
            parts.setdefault(value, []).append(row)
    return {str(value): _cell(part) for value, part in sorted(parts.items())}


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    answered = mean_over_lists(rows, "answered")
    return {
        "score": mean_over_lists(rows, "score"),
        "top1": mean_over_lists(rows, "top1"),
        "exact_match": mean_over_lists(rows, "exact_match"),
        **({} if answered is None else {"answered": answered}),
        "cases": len(rows),
    }
