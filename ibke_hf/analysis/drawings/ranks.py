"""The figure of ranks: quality, interference and size of edits that are cut to a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...evaluation.report.drawing import SMALL, Theme
from ..ranks import FULL
from ..trainings import mean_and_error
from .frames import frame, legend, line_style, new_figure, say, seeds_in_words

Data = Mapping[str, Any]


def draw_ranks(data: Data, theme: Theme) -> Any:
    """Draw what is left of edits by rank: alone, together, and their size."""
    lines = data["editors"]
    ranks = sorted({rank for line in lines.values() for rank in line}, key=_order)
    seeds = sorted({seed for line in lines.values() for cells in line.values() for seed in cells})
    panels = [("alone", "generality", "Generality, one edit (%)"), ("alone", "avg", "Average, one edit (%)")]
    if data["many"]:
        panels.append(("together", "avg", f"Average, {data['many']} edits solved (%)"))
    panels.append(("bytes", "", "Size of an edit (kB)"))
    figure = new_figure(3.0 * len(panels) + 0.4, 4.1)
    note = f"{data['records']} edits, {seeds_in_words(seeds)}; a whole edit has a rank for each token of its request"
    top = say(figure, title_of_ranks(data), note)
    share = 1 / len(panels)
    for place, (group, score, label) in enumerate(panels):
        axes = figure.add_axes((place * share + 0.19 * share, 0.14, 0.75 * share, top - 0.28))
        for i, (line, by_rank) in enumerate(lines.items()):
            points = [(ranks.index(rank), *_point(by_rank[rank], group, score)) for rank in by_rank]
            shown = sorted((x, mean, error or 0.0) for x, mean, error in points if mean is not None)
            bars = [error for _, _, error in shown] if len(seeds) > 1 else None
            axes.errorbar(
                [x + 0.05 * (2 * i - len(lines) + 1) for x, _, _ in shown],
                [mean for _, mean, _ in shown],
                bars,
                label=line,
                capsize=2.5,
                elinewidth=0.9,
                **line_style(theme, i),
            )
        axes.set_xticks(range(len(ranks)), ranks)
        axes.set_xlim(-0.4, len(ranks) - 0.6)
        axes.set_xlabel("rank of an edit", fontsize=SMALL)
        axes.set_ylabel(label, labelpad=4, fontsize=SMALL)
        if group == "bytes":
            axes.set_ylim(bottom=0)
        frame(axes, theme, grid="y")
    legend(figure, axes, top - 0.005, len(lines))
    return figure


def _order(rank: str) -> float:
    return float("inf") if rank == FULL else int(rank)


def _point(by_seed: Mapping[str, Data], group: str, score: str) -> tuple[float | None, float | None]:
    """Return mean and error of a panel's value at one rank."""
    if group == "bytes":
        return mean_and_error(cell["bytes"] / 1000 for cell in by_seed.values())
    return mean_and_error(_values(by_seed.values(), group, score))


def _values(cells: Iterable[Data], group: str, score: str) -> list[float | None]:
    return [cell.get(group, {}).get(score) for cell in cells]


def title_of_ranks(data: Data) -> str:
    """Say what an edit of the lowest rank keeps of a whole one, and what of its size."""
    parts = []
    for line, by_rank in data["editors"].items():
        low = min(by_rank, key=_order)
        if FULL not in by_rank or low == FULL:
            continue
        (kept, _), (whole, _) = (_point(by_rank[rank], "alone", "avg") for rank in (low, FULL))
        (small, _), (large, _) = (_point(by_rank[rank], "bytes", "") for rank in (low, FULL))
        if kept is not None and whole is not None and small and large:
            parts.append(
                f"{line}, rank {low} has average {kept:.1f} of {whole:.1f} at 1/{large / small:.0f} of the size"
            )
    text = "; ".join(parts)
    return text[0].upper() + text[1:] if text else "Edits by rank"
