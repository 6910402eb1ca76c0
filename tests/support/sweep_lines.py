"""Lines of a sweep as `ibke sweep` writes them, with made-up scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ibke_hf.analysis.trainings import PAPER
from ibke_hf.atlas.grid import Training, as_json, read_grid

DOMAINS = ("art", "chemistry", "companies", "countries", "film", "food", "literature", "music", "sport")
COMBINATIONS = ("Rephrase", "Rephrase + Subject Alias", "Multi-Hop", "Multi-Hop + Relation Reverse")
Score = Callable[[Training, str], float]


def paper_like(training: Training, metric: str) -> float:
    """Scores that move as the paper says: long latents and a little pressure help, parts that are left out hurt."""
    score = {"reliability": 96.0, "generality": 80.0, "locality": 94.0}[metric]
    score += 0.2 * training.latent_length
    best = 1.0 if metric == "generality" else 0.1
    order = (0.01, 0.1, 1.0, 10.0)
    score -= 1.5 * abs(order.index(training.beta) - order.index(best))
    if training.latent_length == 1:
        score -= 2.5 * order.index(training.beta)
    if not training.use_information_bottleneck:
        score -= 4.0 if metric == "generality" else 0.5
    if not training.use_scale_factor:
        score -= 2.0 if metric != "reliability" else 0.1
    if training.edits == "unknown":
        score -= 20.0 if metric == "generality" and not training.few_shot else 5.0
    score += 2.0 * (training.editor == "ibke") - 3.0 * (training.domain != "all")
    return score + 0.3 * (training.seed - 1)


def a_line(training: Training, score: Score = paper_like) -> dict[str, Any]:
    scores = {metric: score(training, metric) for metric in ("reliability", "generality", "locality")}
    scores |= {"avg": sum(scores.values()) / 3, "records": 800}
    bottleneck = training.use_information_bottleneck
    by_domain = {
        domain: {**scores, "generality": scores["generality"] - (0 if bottleneck or domain == training.domain else 2)}
        for domain in DOMAINS
    }
    cases = {
        name: {"score": scores["generality"] - (3 + (not bottleneck)) * i, "top1": 50.0, "cases": 400 - 90 * i}
        for i, name in enumerate(COMBINATIONS)
    }
    hops = {str(n): {**cases[COMBINATIONS[n - 1]]} for n in (1, 2, 3)}
    return {
        "name": training.name,
        **as_json(training),
        "scores": scores,
        "parts": dict.fromkeys(("test", "held_out", "counterfactual", "unknown"), scores),
        "by_domain": by_domain,
        "by_combination": cases,
        "by_hops": hops,
    }


def sweep_lines(score: Score = paper_like, seeds: int = 3) -> list[dict[str, Any]]:
    """A line for each training of the grid."""
    assert as_json(Training()) == {**PAPER, "seed": 0}
    return [a_line(training, score) for training in read_grid(seeds=seeds).trainings()]
