"""Lines of a sweep -> the arrays of Figures 3, 4 and 5, as JSON values: by configuration a score for each seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
Values = list[float | None]  # one for each seed, None where its training is not done
METRICS = ("reliability", "generality", "locality")
PAPER = {  # what a line is compared with unless a figure varies it: the paper's own network and settings
    "editor": "ibke_paper",
    "latent_length": 10,
    "beta": 0.1,
    "use_information_bottleneck": True,
    "use_scale_factor": True,
    "domain": "all",
    "edits": "all",
    "few_shot": 0,
    "edit_rank": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "IBKE (paper)": {},
    "- IB": {"use_information_bottleneck": False},
    "- SF": {"use_scale_factor": False},
    "- IB - SF": {"use_information_bottleneck": False, "use_scale_factor": False},
    "IBKE (ours)": {"editor": "ibke"},
}


class NoTrainingsError(ValueError):
    """A sweep without the trainings that a figure is of; the message names the figure and the cure."""


def seeds_of(lines: Iterable[Line]) -> list[int]:
    """Return the seeds of some lines, in order."""
    return sorted({line["seed"] for line in lines})


def values_of(lines: Iterable[Line], seeds: Sequence[int], read: Callable[[Line], Any], **fields: Any) -> Values:
    """Return for each seed what `read` gives of the line whose fields are the paper's but for those named.

    Args:
        lines: Of a sweep.
        seeds: Those that are wanted.
        read: Reads a line.
        fields: See :data:`PAPER`.
    """
    wanted = {**PAPER, **fields}
    by_seed = {line["seed"]: line for line in lines if all(line[name] == value for name, value in wanted.items())}
    return [read(by_seed[seed]) if seed in by_seed else None for seed in seeds]


def mean_and_error(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation of the values that exist; None where they are too few."""
    present = [value for value in values if value is not None]
    mean = statistics.fmean(present) if present else None
    return mean, statistics.stdev(present) if len(present) > 1 else None


def differences(one: Sequence[float | None], other: Sequence[float | None]) -> Values:
    """Subtract seed by seed; None where either is missing."""
    return [None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)]


def _score(metric: str) -> Callable[[Line], Any]:
    return lambda line: line["scores"][metric]


def hyper_parameters(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the scores of Figure 3 by l_m and β.

    Returns:
        ``seeds``, ``latent_lengths``, ``betas``, and by metric ``values[i][j]``, those of the i-th length and j-th β.

    Raises:
        NoTrainingsError: If the sweep varies neither.
    """
    fixed = {name: value for name, value in PAPER.items() if name not in ("latent_length", "beta")}
    chosen = [line for line in lines if all(line[name] == value for name, value in fixed.items())]
    lengths, betas = (sorted({line[name] for line in chosen}) for name in ("latent_length", "beta"))
    if len(lengths) * len(betas) < 2:
        raise NoTrainingsError("Figure 3 compares l_m and β, and the sweep has no such trainings; run `ibke sweep`")
    seeds = seeds_of(chosen)
    return {
        "figure": "3",
        "seeds": seeds,
        "latent_lengths": lengths,
        "betas": betas,
        "values": {
            metric: [
                [values_of(chosen, seeds, _score(metric), latent_length=length, beta=beta) for beta in betas]
                for length in lengths
            ]
            for metric in METRICS
        },
    }


def ablation(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the scores of Figure 4 by variant.

    Returns:
        ``seeds``, ``variants`` (names), and by metric ``values[i]``, those of the i-th variant.

    Raises:
        NoTrainingsError: If fewer than two variants are done.
    """
    seeds = seeds_of(lines)
    of = {
        name: {metric: values_of(lines, seeds, _score(metric), **fields) for metric in METRICS}
        for name, fields in VARIANTS.items()
    }
    done = [name for name, values in of.items() if any(value is not None for value in values["generality"])]
    if len(done) < 2:
        raise NoTrainingsError(
            "Figure 4 compares variants, of which the sweep has fewer than two; run the rest of `ibke sweep`"
        )
    return {
        "figure": "4",
        "seeds": seeds,
        "variants": done,
        "values": {metric: [of[name][metric] for name in done] for metric in METRICS},
    }


def domains(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the scores of Figure 5a: trained on one domain, tested on each, with and without IB.

    Returns:
        ``seeds``, ``trained``, ``tested`` (the trained ones first), and by metric and ``with`` or ``without``
        ``values[i][j]``, those of the i-th tested and j-th trained domain.

    Raises:
        NoTrainingsError: If no domain is trained on both with and without.
    """
    of_domains, trained = _pairs_by_domain(lines, "5a")
    everywhere = {domain for line in of_domains for domain in line["by_domain"]}
    tested = [*(domain for domain in trained if domain in everywhere), *sorted(everywhere - {*trained})]
    seeds = seeds_of(of_domains)

    def read(metric: str, domain: str) -> Callable[[Line], Any]:
        return lambda line: line["by_domain"].get(domain, {}).get(metric)

    return {
        "figure": "5a",
        "seeds": seeds,
        "trained": trained,
        "tested": tested,
        "values": {
            metric: {
                name: [
                    [
                        values_of(
                            lines, seeds, read(metric, test), domain=train, use_information_bottleneck=name == "with"
                        )
                        for train in trained
                    ]
                    for test in tested
                ]
                for name in ("with", "without")
            }
            for metric in METRICS
        },
    }


def criteria(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the generality of Figure 5b, a mean over the trained domains for each seed, with and without IB.

    Returns:
        ``seeds``, ``trained``, and as ``by_combination`` of criteria and ``by_hops`` rows of ``name``, ``cases``, and
        the values ``with`` and ``without``, those that score highest with IB first.

    Raises:
        NoTrainingsError: If no domain is trained on both with and without.
    """
    of_domains, trained = _pairs_by_domain(lines, "5b")
    seeds = seeds_of(of_domains)
    parts: dict[str, Any] = {}
    for part in ("by_combination", "by_hops"):
        names = list(dict.fromkeys(name for line in of_domains for name in line[part]))
        rows = [_criteria_row(of_domains, part, name, seeds, trained) for name in names]
        parts[part] = sorted(rows, key=lambda row: -(mean_and_error(row["with"])[0] or 0.0))
    parts["by_hops"].sort(key=lambda row: int(row["name"]))
    return {"figure": "5b", "seeds": seeds, "trained": trained, **parts}


def _criteria_row(
    lines: Sequence[Line], part: str, name: str, seeds: Sequence[int], trained: Sequence[str]
) -> dict[str, Any]:
    def read(line: Line) -> Any:
        return line[part].get(name, {}).get("score")

    row: dict[str, Any] = {"name": name, "cases": max(line[part].get(name, {}).get("cases", 0) for line in lines)}
    for key in ("with", "without"):
        by_domain = [
            values_of(lines, seeds, read, domain=domain, use_information_bottleneck=key == "with")
            for domain in trained
        ]
        by_seed = [list(values) for values in zip(*by_domain, strict=True)]
        row[key] = [None if None in values else statistics.fmean(values) for values in by_seed]
    return row


def _pairs_by_domain(lines: Sequence[Line], figure: str) -> tuple[list[Line], list[str]]:
    """Return the lines of trainings on one domain, and the domains with and without IB for some seed."""
    of_domains = [line for line in lines if line["domain"] != "all"]
    both = [
        {line["domain"] for line in of_domains if line["use_information_bottleneck"] is switch}
        for switch in (True, False)
    ]
    trained = [
        domain for domain in dict.fromkeys(line["domain"] for line in of_domains) if domain in both[0] & both[1]
    ]
    if not trained:
        raise NoTrainingsError(
            f"Figure {figure} compares trainings on one domain with and without IB, and the sweep has no such pair; "
            f"run the rest of `ibke sweep`"
        )
    return [line for line in of_domains if line["domain"] in trained], trained
