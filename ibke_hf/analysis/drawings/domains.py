"""Figure 5: trained on one domain and tested on all, and generality by criteria and hops, with and without IB."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.report.drawing import SMALL, Theme
from ..trainings import METRICS, differences, mean_and_error
from .frames import frame, legend, new_figure, say, seeds_in_words, shortened, signed

Data = Mapping[str, Any]
PANELS = {"with": "with IB", "without": "without IB", "difference": "difference"}
ORDINAL, AROUND_ZERO = "cividis", "PuOr_r"  # both are told apart without colour vision; numbers stand in each cell
NUMBER = 8.0  # points


def domain_gains(data: Data, metric: str) -> list[list[float | None]]:
    """Return the mean difference that IB makes, by tested and trained domain."""
    both = data["values"][metric]
    return [
        [mean_and_error(differences(a, b))[0] for a, b in zip(one, other, strict=True)]
        for one, other in zip(both["with"], both["without"], strict=True)
    ]


def gains_in_and_out(data: Data, metric: str) -> tuple[float | None, float | None]:
    """Return the mean difference that IB makes on the trained domain itself, and on all others."""
    inside: list[float] = []
    outside: list[float] = []
    for tested, row in zip(data["tested"], domain_gains(data, metric), strict=True):
        for trained, gain in zip(data["trained"], row, strict=True):
            if gain is not None:
                (inside if trained == tested else outside).append(gain)
    return (statistics.fmean(inside) if inside else None, statistics.fmean(outside) if outside else None)


def draw_domains(data: Data, theme: Theme) -> Any:
    """Draw Figure 5a: heat maps of each metric with IB, without, and of the difference."""
    tested, trained = data["tested"], data["trained"]
    width, high = 2.6 + 3 * (0.68 * len(trained) + 0.4), 0.235 * len(tested) + 0.62
    figure = new_figure(width, 3 * high + 1.3)
    height = figure.get_size_inches()[1]
    note = "rows: tested domains, columns: the one trained on (framed where both are the same); points of 100; "
    say(figure, title_of_domains(data), note + f"means over {len(data['seeds'])} seed{'s' * (len(data['seeds']) > 1)}")
    panel = (width - 1.5) / 3
    for i, metric in enumerate(METRICS):
        values = _panels(data, metric)
        levels = [v for name in ("with", "without") for row in values[name] for v in row if v is not None]
        most = max((abs(v) for row in values["difference"] for v in row if v is not None), default=1.0)
        for j, (name, label) in enumerate(PANELS.items()):
            bottom = height - 1.05 - (i + 1) * high + 0.12
            axes = figure.add_axes(
                ((1.2 + j * panel) / width, bottom / height, (panel - 0.25) / width, (high - 0.62) / height)
            )
            scale = (-most, most) if name == "difference" else (min(levels), max(levels))
            heat_map(axes, values[name], scale, AROUND_ZERO if name == "difference" else ORDINAL, name == "difference")
            _name_domains(axes, trained, tested, theme, rows=j == 0)
            axes.set_title(f"{metric}, {label}", fontsize=SMALL, pad=20)
    return figure


def _panels(data: Data, metric: str) -> dict[str, list[list[float | None]]]:
    both = {
        name: [[mean_and_error(values)[0] for values in row] for row in data["values"][metric][name]]
        for name in ("with", "without")
    }
    return {**both, "difference": domain_gains(data, metric)}


def heat_map(
    axes: Any, rows: Sequence[Sequence[float | None]], scale: tuple[float, float], colours: str, is_signed: bool
) -> None:
    """Draw values as a heat map with a number in each cell, black or white as the cell is light or dark."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    low, high = scale
    norm = Normalize(low, high if high > low else low + 1)
    table = [[float("nan") if value is None else value for value in row] for row in rows]
    axes.imshow(table, cmap=colours, norm=norm, aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is None:
                continue
            red, green, blue, _ = colormaps[colours](norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            text = signed(value) if is_signed else f"{value:.1f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=NUMBER, color="black" if light else "white")


def _name_domains(axes: Any, trained: Sequence[str], tested: Sequence[str], theme: Theme, *, rows: bool) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xticks(range(len(trained)), [shortened(name, 10) for name in trained], fontsize=NUMBER)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(tested)), tested if rows else [""] * len(tested), fontsize=SMALL)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for j, name in enumerate(trained):
        if name in tested:
            i = list(tested).index(name)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=theme.colours[1], linewidth=2.2))


def title_of_domains(data: Data) -> str:
    """Say what IB does on the trained domain and on the others."""
    parts = []
    for metric in METRICS:
        inside, outside = gains_in_and_out(data, metric)
        if inside is not None and outside is not None:
            parts.append(f"{metric} by {signed(inside)} at home and {signed(outside)} elsewhere")
    return f"The bottleneck moves {'; '.join(parts)}" if parts else "Trained on one domain, tested on all"


def draw_criteria(data: Data, theme: Theme) -> Any:
    """Draw Figure 5b: generality by combination of criteria and by hops, with and without IB."""
    combinations, hops = data["by_combination"], data["by_hops"]
    figure = new_figure(10.2, 2.2 + 0.34 * max(len(combinations), 4))
    many = f"means over {len(data['trained'])} trained domains; {seeds_in_words(data['seeds'])}"
    top = say(figure, title_of_criteria(data), f"Atlas, {many}")
    height = figure.get_size_inches()[1]
    bottom, room = 0.65 / height, top - 1.1 / height
    for left, width, rows, label in (
        (0.27, 0.35, combinations, lambda row: f"{row['name']}  ({row['cases']})"),
        (0.76, 0.215, hops, lambda row: f"{row['name']} hop{'s' * (row['name'] != '1')}  ({row['cases']})"),
    ):
        axes = figure.add_axes((left, bottom, width, room))
        for k, (name, text) in enumerate((("with", "with IB"), ("without", "without IB"))):
            means, errors = zip(*(mean_and_error(row[name]) for row in rows), strict=True)
            places = [i for i, mean in enumerate(means) if mean is not None]
            axes.errorbar(
                [means[i] for i in places],
                [len(rows) - 1 - i + 0.12 * (1 - 2 * k) for i in places],
                xerr=[errors[i] or 0.0 for i in places],
                label=text,
                marker="os"[k],
                color=theme.colours[k],
                markerfacecolor=theme.paper if k else None,
                markersize=6.5,
                linestyle="none",
                capsize=2.5,
                elinewidth=0.9,
            )
        axes.set_yticks(range(len(rows)), [label(row) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("Generality, in the top 5 (%)", fontsize=SMALL)
        frame(axes, theme, grid="both")
    legend(figure, axes, top - 0.01, 2)
    return figure


def hop_gains(data: Data) -> dict[int, float]:
    """Return the mean difference in generality that IB makes, by number of hops."""
    gains = {int(row["name"]): mean_and_error(differences(row["with"], row["without"]))[0] for row in data["by_hops"]}
    return {hops: gain for hops, gain in gains.items() if gain is not None}


def title_of_criteria(data: Data) -> str:
    """Say what IB does by number of hops."""
    gains = hop_gains(data)
    each = [f"{signed(gain)} at {hops} hop{'s' * (hops > 1)}" for hops, gain in sorted(gains.items())]
    return f"The bottleneck moves generality by {', '.join(each)}" if each else "Generality by criteria and hops"
