"""What all figures of the analysis share: titles, frames, legends, and words for numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ...evaluation.report.drawing import DASHES, MARKERS, SMALL, TEXT, Theme

METRIC_LABELS = {
    "reliability": "Reliability, top 1 (%)",
    "generality": "Generality, in the top 5 (%)",
    "locality": "Locality, in the top 5 (%)",
}
LETTER = 0.075  # inches that a letter of a title takes at most


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def say(figure: Any, title: str, note: str = "") -> float:
    """Write the title at the top and a note of what is drawn below it; return the share of the height left."""
    width, height = figure.get_size_inches()
    y = height - 0.12
    for text, size, color in ((title, TEXT + 1, None), (note, SMALL, "faint")):
        lines = textwrap.wrap(text, int((width - 0.4) / (LETTER * size / SMALL)))
        options = {} if color is None else {"alpha": 0.8}
        figure.text(0.2 / width, y / height, "\n".join(lines), fontsize=size, va="top", linespacing=1.25, **options)
        y -= len(lines) * size * 1.3 / 72 + 0.06
    return y / height


def frame(axes: Any, theme: Theme, *, grid: str = "") -> None:
    """Leave the left and lower spine, and a faint grid along an axis where one is named."""
    for place, spine in axes.spines.items():
        spine.set_visible(place in ("left", "bottom"))
    axes.tick_params(labelsize=SMALL, length=3)
    if grid:
        axes.grid(axis=grid, color=theme.lines, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)


def line_style(theme: Theme, number: int) -> dict[str, Any]:
    """Return how a line is drawn; colour, mark and dashes tell the same, so that one of them is enough."""
    return {
        "color": theme.colours[number % len(theme.colours)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
        "markersize": 6,
        "linewidth": 1.5,
    }


def legend(figure: Any, axes: Any, top: float, columns: int, title: str = "") -> None:
    """Put the legend of one of the axes into a row of its own, below the title."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.1 / figure.get_size_inches()[0], top),
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        title=title or None,
        title_fontsize=SMALL,
        alignment="left",
        handlelength=3.2,
        columnspacing=1.6,
    )


def seeds_in_words(seeds: Sequence[Any]) -> str:
    """Say what error bars are of."""
    if len(seeds) < 2:
        return "one seed, so no error bars"
    return f"means over {len(seeds)} seeds, bars: their standard deviation"


def two_digits(value: float) -> str:
    """Write a number with two digits, and no zero with a sign."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """Write a difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def shortened(text: str, most: int) -> str:
    """Cut a text that is too long for its place."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def layer_label(name: str) -> str:
    """Name a layer by its number where it has just one."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else name
