"""The paper's claims against our own measurements: *held*, *not held*, *not testable here*, or not measured yet.

A claim is about differences between runs of the same seed. It holds where the mean difference over seeds has the
claim's sign and is at least as large as its error, the standard deviation over seeds; a claim of several parts holds
where each part does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .drawings.frames import signed
from .files import Evidence
from .trainings import (
    METRICS,
    NoTrainingsError,
    ablation,
    criteria,
    differences,
    domains,
    hyper_parameters,
    mean_and_error,
    values_of,
)

HELD, NOT_HELD, NOT_TESTABLE, NOT_MEASURED = "held", "not held", "not testable here", "not measured yet"
SEEDS = 3  # without which nothing is said of a claim
DIRECT = ("ft", "rome", "alphaedit", "t_patcher", "lemoe", "grace")
Values = Sequence[float | None]
PAGE = """# The paper's claims, held against our own measurements

Of {number} claims: {counts}. Made by `ibke claims` from the table, the sweep and the figures beside this page; nothing
here is typed by hand.

Differences are points of 100 unless they are of a silhouette or a sparsity, means ± standard deviation over {seeds}
seeds; both runs of a difference have the same seed. *Held*: every difference is positive and at least as large as its
error. *Not measured yet*: runs are missing; `ibke sweep` and `ibke figures` make them. All of it is on Atlas, a small
model and its own facts: what does not hold there may hold on the paper's models, and the other way round.

| Claim | In the paper | Here | Our figures |
|:--|:--|:--|:--|
{rows}

## How each was tested

{notes}
"""


@dataclass(frozen=True)
class Part:
    """One difference that a claim says is positive.

    Attributes:
        text: What is subtracted from what.
        values: The difference by seed, None where a run is missing.
        digits: Behind the point.
    """

    text: str
    values: Values
    digits: int = 1

    @property
    def word(self) -> str:
        """Whether the mean is positive and at least as large as its error; fewer than `SEEDS` seeds say nothing."""
        mean, error = mean_and_error(self.values)
        if mean is None or error is None or len([v for v in self.values if v is not None]) < SEEDS:
            return NOT_MEASURED
        return HELD if mean > 0 and mean >= error else NOT_HELD

    def said(self) -> str:
        """Return the difference with its error."""
        mean, error = mean_and_error(self.values)
        if mean is None:
            return f"{self.text}: –"
        spread = "" if error is None else f" ± {error:.{self.digits}f}"
        return f"{self.text}: {signed(mean, self.digits)}{spread}"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with our evidence.

    Attributes:
        text: The claim.
        figure: Where the paper makes it.
        parts: What it says is positive.
        why: What the reader has to know of how it was tested.
        testable: False where our data could not tell, whatever they were.
    """

    text: str
    figure: str
    parts: tuple[Part, ...]
    why: str
    testable: bool = True

    @property
    def word(self) -> str:
        """The verdict: one part that fails decides, else one that is not measured."""
        if not self.testable:
            return NOT_TESTABLE
        words = [part.word for part in self.parts]
        if NOT_HELD in words:
            return NOT_HELD
        return HELD if words and all(word == HELD for word in words) else NOT_MEASURED


def claims_of(evidence: Evidence) -> list[Claim]:
    """Return all claims, with what the evidence says of each; what is missing is said to be."""
    lines = evidence.lines
    return [
        *_of_domains(lines),
        *_of_hyper_parameters(lines),
        *_of_ablation(lines),
        _sparser(evidence.figures.get("7a")),
        _clearer(evidence.figures.get("6")),
        _ahead(evidence.cells),
        _few_shot(lines),
    ]


def _made(make: Callable[[Sequence[Any]], dict[str, Any]], lines: Sequence[Any]) -> dict[str, Any] | None:
    try:
        return make(lines)
    except NoTrainingsError:
        return None


def _means(rows: Iterable[Values]) -> list[float | None]:
    """Average over rows, seed by seed; None for a seed that any row lacks."""
    return [None if None in values else mean_and_error(values)[0] for values in zip(*rows, strict=True)]


# --- Figure 5 -----------------------------------------------------------------------------------------------------


def _of_domains(lines: Sequence[Any]) -> list[Claim]:
    data, by_criteria = _made(domains, lines), _made(criteria, lines)
    inside: dict[str, list[Values]] = {metric: [] for metric in METRICS}
    outside: dict[str, list[Values]] = {metric: [] for metric in METRICS}
    for metric in METRICS if data else ():
        both = data["values"][metric]  # type: ignore[index]
        for tested, one, other in zip(data["tested"], both["with"], both["without"], strict=True):  # type: ignore[index]
            for trained, a, b in zip(data["trained"], one, other, strict=True):  # type: ignore[index]
                (inside if trained == tested else outside)[metric].append(differences(a, b))
    home, away = ({metric: _means(rows) for metric, rows in side.items() if rows} for side in (inside, outside))
    helps = [Part(f"{metric} with IB − without, other domains", away.get(metric, [])) for metric in METRICS[:2]]
    more = [
        Part(f"{metric}: gain on other domains − gain at home", differences(away[metric], home[metric]))
        for metric in METRICS[:2]
        if metric in away and metric in home
    ]
    return [
        Claim(
            "The bottleneck helps most out of domain",
            "Figure 5a",
            (*helps, *more),
            "Trained on one domain of each sector, tested on all 16; in the paper 25 domains and Qwen3-1.7B.",
        ),
        _harder(by_criteria),
    ]


def _harder(data: Mapping[str, Any] | None) -> Claim:
    parts = []
    rows = {int(row["name"]): row for row in data["by_hops"]} if data else {}
    if rows:
        low, high = min(rows), max(rows)
        gains = {hops: differences(rows[hops]["with"], rows[hops]["without"]) for hops in (low, high)}
        parts += [Part(f"gain at {high} hops", gains[high])]
        parts += [Part(f"gain at {high} hops − gain at {low}", differences(gains[high], gains[low]))]
    named = [row for row in data["by_combination"] if mean_and_error(row["without"])[0] is not None] if data else []
    named.sort(key=lambda row: mean_and_error(row["without"])[0] or 0.0)
    if len(named) >= 4:
        half = len(named) // 2
        hard, easy = (
            _means([differences(row["with"], row["without"]) for row in part])
            for part in (named[:half], named[-half:])
        )
        parts.append(
            Part("gain on the harder half of the criteria − gain on the easier half", differences(hard, easy))
        )
    return Claim(
        "The bottleneck helps most on harder criteria and more hops",
        "Figure 5b",
        tuple(parts),
        "Generality; the harder criteria are those that editors without the bottleneck score lowest on.",
    )


# --- Figure 3 -----------------------------------------------------------------------------------------------------


def _of_hyper_parameters(lines: Sequence[Any]) -> list[Claim]:
    data = _made(hyper_parameters, lines)
    lengths, betas = (data["latent_lengths"], data["betas"]) if data else ([], [])
    longer = [i for i, length in enumerate(lengths) if length > 1]

    def at(metric: str, rows: Sequence[int], beta: float) -> list[float | None]:
        return _means([data["values"][metric][i][betas.index(beta)] for i in rows]) if data and rows else []

    def over(metric: str, beta: float, rows: Sequence[int], others: Sequence[float]) -> list[Part]:
        return [
            Part(
                f"{metric}: β = {beta:g} − β = {other:g}", differences(at(metric, rows, beta), at(metric, rows, other))
            )
            for other in others
            if beta in betas and other in betas
        ]

    whole = [Part(text, ()) for text in ("no cells",)] if not data else []
    length_parts: list[Part] = []
    if len(lengths) > 1 and data:
        averages = [[_means(metric[i]) for metric in data["values"].values()] for i in (0, len(lengths) - 1)]
        length_parts = [
            Part(f"{metric}: l_m = {lengths[-1]} − l_m = {lengths[0]}, a mean over β", differences(long, short))
            for metric, short, long in zip(METRICS, *averages, strict=True)
        ]
    best = [part for metric in ("reliability", "locality") for part in over(metric, 0.1, longer, (0.01, 1.0, 10.0))]
    short = [i for i, length in enumerate(lengths) if length == 1]
    falling = [
        Part(f"{metric}: β = {low:g} − β = {high:g}", differences(at(metric, short, low), at(metric, short, high)))
        for metric in METRICS
        for low, high in pairwise(betas)
        if short
    ]
    means = "Means over l_m > 1."
    return [
        Claim("A longer latent (larger l_m) helps", "Figure 3", (*whole, *length_parts), "All three metrics."),
        Claim("β = 0.1 is best for reliability and locality", "Figure 3", (*whole, *best), means),
        Claim(
            "β = 1 is best for generality",
            "Figure 3",
            (*whole, *over("generality", 1.0, longer, (0.01, 0.1, 10.0))),
            means,
        ),
        Claim(
            "β = 10 hurts all three metrics",
            "Figure 3",
            (*whole, *(part for metric in METRICS for part in over(metric, 0.1, longer, (10.0,)))),
            f"{means} Against β = 0.1.",
        ),
        Claim(
            "At l_m = 1 any increase of β hurts",
            "Figure 3",
            (*whole, *falling),
            "Every step up to the next β, for each metric.",
        ),
    ]


# --- Figure 4 -----------------------------------------------------------------------------------------------------


def _of_ablation(lines: Sequence[Any]) -> list[Claim]:
    data = _made(ablation, lines)

    def cost(metric: str, left_out: str) -> list[float | None]:
        if not data or left_out not in data["variants"] or "IBKE (paper)" not in data["variants"]:
            return []
        values = dict(zip(data["variants"], data["values"][metric], strict=True))
        return differences(values["IBKE (paper)"], values[left_out])

    return [
        Claim(
            "Leaving out the scale factor hurts generality and locality",
            "Figure 4",
            tuple(Part(f"{metric}: whole − without", cost(metric, "- SF")) for metric in METRICS[1:]),
            "The paper's network; reliability is said to change little.",
        ),
        Claim(
            "Leaving out the bottleneck hurts generality",
            "Figure 4",
            (Part("generality: whole − without", cost("generality", "- IB")),),
            "The paper's network.",
        ),
    ]


# --- Figures 6 and 7 ----------------------------------------------------------------------------------------------


def _pair(by_label: Mapping[str, Any]) -> tuple[Any, Any] | None:
    one, other = by_label.get("with IB"), by_label.get("without IB")
    return None if one is None or other is None else (one, other)


def _by_seed(one: Mapping[str, float], other: Mapping[str, float]) -> list[float]:
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def _sparser(data: Mapping[str, Any] | None) -> Claim:
    pair = _pair(data["statistics"]) if data else None
    values: list[float] = []
    if pair:
        means = [
            {seed: sum(layer["sparsity"] for layer in layers.values()) / len(layers) for seed, layers in side.items()}
            for side in pair
        ]
        values = _by_seed(*means)
    return Claim(
        "The bottleneck makes scale factors sparser",
        "Figure 7a",
        (Part("sparsity with IB − without", values, 3),),
        "Hoyer's measure of the factors of an edit (0: all equal, 1: one alone), a mean over layers and edits.",
    )


def _clearer(data: Mapping[str, Any] | None) -> Claim:
    pair = _pair(data["editors"]) if data else None
    values: list[float] = []
    if pair:
        sides = []
        for side in pair:
            layers = [layer["silhouette"] for layer in side["layers"].values()]
            seeds = set(layers[0]).intersection(*map(set, layers))
            sides.append({seed: sum(layer[seed] for layer in layers) / len(layers) for seed in seeds})
        values = _by_seed(*sides)
    return Claim(
        "The bottleneck makes the clusters of latents clearer",
        "Figure 6",
        (Part("silhouette with IB − without", values, 3),),
        "Of the latents themselves, by relation, a mean over layers.",
    )


# --- Table II -----------------------------------------------------------------------------------------------------


def _ahead(cells: Sequence[Mapping[str, Any]]) -> Claim:
    singles = [cell for cell in cells if cell.get("sequential", 1) == 1]
    seeds = sorted({cell["seed"] for cell in singles})

    def scores(editor: str) -> list[float | None]:
        of = [[c["avg"] for c in singles if (c["editor"], c["seed"]) == (editor, seed)] for seed in seeds]
        return [mean_and_error(values)[0] for values in of]

    names = [name for name in ("mend", "serac", *DIRECT) if any(cell["editor"] == name for cell in singles)]
    missing = [Part("no table", ())] if not names else []
    parts = [
        Part(f"average: IBKE (paper) − {name}", differences(scores("ibke_paper"), scores(name))) for name in names
    ]
    return Claim(
        "IBKE is ahead of MEND, SERAC and the direct editors",
        "Table II",
        (*missing, *parts),
        "The paper's network; mean of reliability, generality and locality over the columns of single edits.",
    )


def _few_shot(lines: Sequence[Any]) -> Claim:
    seeds = sorted({line["seed"] for line in lines if line["edits"] == "unknown"})

    def read(line: Mapping[str, Any]) -> Any:
        return line["parts"].get("counterfactual", {}).get("generality")

    numbers = sorted({line["few_shot"] for line in lines if line["edits"] == "unknown"})
    without, with_few = (
        values_of(lines, seeds, read, edits="unknown", few_shot=number) for number in (0, max(numbers, default=0))
    )
    values = differences(with_few, without) if len(numbers) > 1 else []
    return Claim(
        "A few records of counterfactual data help on counterfactual edits",
        "Table II, asterisks",
        (Part("generality of counterfactual edits: with − without", values),),
        "Trained on true facts alone, or with 512 counterfactual records among them; the paper adds 512 records of "
        "each of three other datasets, which Atlas does not have.",
    )


# --- the page -----------------------------------------------------------------------------------------------------


def as_markdown(claims: Sequence[Claim]) -> str:
    """Write the claims as the page CLAIMS.md."""
    words = [claim.word for claim in claims]
    counts = ", ".join(
        f"{words.count(word)} {word}" for word in (HELD, NOT_HELD, NOT_TESTABLE, NOT_MEASURED) if word in words
    )
    rows = [
        f"| {claim.text} | {claim.figure} | **{claim.word}** | {'<br>'.join(part.said() for part in claim.parts)} |"
        for claim in claims
    ]
    notes = [f"- *{claim.text}*: {claim.why}" for claim in claims]
    return PAGE.format(number=len(claims), counts=counts, seeds=SEEDS, rows="\n".join(rows), notes="\n".join(notes))
