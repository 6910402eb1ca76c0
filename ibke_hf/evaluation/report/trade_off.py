"""Scores of many editors -> the paper's Fig. 2: generality against locality, with lines of equal F1, as SVG.

Drawing needs matplotlib, the extra "plots"; it is imported when a figure is drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..scores import f1
from .drawing import LIGHT, SMALL, TEXT, Theme, drawing, svg_of
from .table import UNEDITED, Cell, CellError, Column, Row, table_of

SIZE = (7.2, 5.2)  # inches; 72 units of the SVG each
STYLES: dict[str, dict[str, Any]] = {
    "W/O": {"marker": "D", "s": 50},
    "DE": {"marker": "o", "s": 68},
    "ET": {"marker": "^", "s": 88},
}
COLOURS = {"W/O": 7, "DE": 0, "ET": 1}  # of the theme; shapes tell the same
MEANINGS = {"W/O": "unedited model (W/O)", "DE": "direct editing (DE)", "ET": "edit training (ET)"}
LEAST_SPAN, PADDING, MOST_LEVELS = 5.0, 0.09, 6
Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True)
class Point:
    """An editor in the plot: its label, style, and mean scores in percent."""

    label: str
    style: str
    generality: float
    locality: float


# --- what is drawn ------------------------------------------------------------------------------------------------


def points_of(cells: Iterable[Cell]) -> tuple[Point, ...]:
    """Return a point for each editor: means over the column groups of single edits with generality and locality.

    An editor that some of these column groups miss says so in its label, since its mean is of other cases.

    Raises:
        CellError: If a cell is unusable.
    """
    table = table_of(cells)
    by_row = [(row, _scored(row, table.columns)) for row in table.rows]
    most = len({column for _, scored in by_row for column in scored})
    return tuple(
        Point(
            row.name if len(scored) == most else f"{row.name} ({len(scored)} of {most})",
            "W/O" if row.editor == UNEDITED else row.group,
            statistics.fmean(general for general, _ in scored.values()),
            statistics.fmean(local for _, local in scored.values()),
        )
        for row, scored in by_row
        if scored
    )


def _scored(row: Row, columns: Sequence[Column]) -> dict[Column, tuple[float, float]]:
    scores = {}
    for column, entry in zip(columns, row.entries, strict=True):
        if entry is None or column.sequential != 1:
            continue
        general, local = entry.values["generality"].mean, entry.values["locality"].mean
        if general is not None and local is not None:
            scores[column] = (general, local)
    return scores


def limits_of(values: Sequence[float]) -> tuple[float, float]:
    """Return an axis around percentages: some room beside them, five points at least, little beyond 0 and 100."""
    low, high = min(values), max(values)
    span = max(high - low, LEAST_SPAN)
    middle = (low + high) / 2
    room = span * (0.5 + PADDING)
    start, end = max(middle - room, -0.02 * span), min(middle + room, 100 + 0.03 * span)
    return min(start, low - 0.04 * span), max(end, high + 0.04 * span)


def levels_of(x_limits: tuple[float, float], y_limits: tuple[float, float]) -> list[float]:
    """Return round values of F1 that lie between two corners of the axes, six at most."""
    (x_low, x_high), (y_low, y_high) = x_limits, y_limits
    low, high = (f1(max(x, 0.0), max(y, 0.0)) or 0.0 for x, y in ((x_low, y_low), (x_high, y_high)))
    high = min(high, 99.9)
    step = next((step for step in (1, 2, 5, 10, 20) if (high - low) / step <= MOST_LEVELS), 50)
    return [float(level) for level in range(step * math.ceil(max(low, 1e-9) / step), 100, step) if low < level < high]


def partner(level: float, value: float) -> float:
    """Return the other score at which F1 is `level`; infinite where there is none."""
    return level * value / (2 * value - level) if 2 * value > level else math.inf


# --- drawing ------------------------------------------------------------------------------------------------------


def trade_off_figure(cells: Iterable[Cell]) -> str:
    """Draw editors by generality and locality, with lines of equal F1, as in the paper's Fig. 2.

    The same cells give the same text.

    Args:
        cells: Of :func:`~ibke_hf.evaluation.report.table.table_of`.

    Returns:
        SVG, with a background, 700 pixels wide; its texts are texts.

    Raises:
        CellError: If no editor has generality and locality of single edits, or a cell is unusable.
        ImportError: If the extra "plots" is missing.
    """
    points = drawn_points(cells)
    with drawing(LIGHT):
        return svg_of(draw_trade_off(points, LIGHT))


def drawn_points(cells: Iterable[Cell]) -> tuple[Point, ...]:
    """Return the points of :func:`points_of`, of which there has to be one.

    Raises:
        CellError: If no editor has generality and locality of single edits, or a cell is unusable.
    """
    points = points_of(cells)
    if not points:
        raise CellError(
            "no cell of single edits has both generality and locality, so there is no point to draw; evaluate an "
            "editor first"
        )
    return points


def draw_trade_off(points: Sequence[Point], theme: Theme, title: str = "") -> Any:
    """Draw points as a figure of matplotlib, within :func:`~ibke_hf.evaluation.report.drawing.drawing`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0.09, 0.115, 0.83, 0.74 if title else 0.80))
    if title:
        figure.text(0.02, 0.965, title, fontsize=TEXT, va="center")
    _frame(axes, points, theme)
    taken = _contours(axes, theme)
    _draw(axes, points, taken, theme)
    return figure


def _frame(axes: Any, points: Sequence[Point], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(limits_of([point.generality for point in points]))
    axes.set_ylim(limits_of([point.locality for point in points]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("Generality, in the top 5 (%)", color=theme.ink)
    axes.set_ylabel("Locality, in the top 5 (%)", color=theme.ink)
    axes.tick_params(colors=theme.faint, labelsize=SMALL, length=3)
    for place, spine in axes.spines.items():
        spine.set_color(theme.lines)
        spine.set_visible(place in ("left", "bottom"))


def _contours(axes: Any, theme: Theme) -> list[Box]:
    """Draw lines of equal F1, each with its value where it leaves the axes; return what these labels cover."""
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    boxes = []
    for level in levels_of((x_low, x_high), (y_low, y_high)):
        start = max(x_low, level / 2 + 1e-6, partner(level, y_high))
        xs = [start + (x_high - start) * i / 200 for i in range(201)]
        line = [(x, partner(level, x)) for x in xs if partner(level, x) <= y_high + 1e-9]
        axes.plot(*zip(*line, strict=True), color=theme.lines, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        text = f"F1 {level:g}"
        if (end := partner(level, x_high)) >= y_low:
            axes.annotate(
                text,
                (x_high, end),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=theme.faint,
                annotation_clip=False,
            )
            continue
        x, y = axes.transData.transform((partner(level, y_low), y_low)) * 72 / axes.figure.dpi
        boxes.append(_box(text, x, y + 8, SMALL, "center"))
        axes.annotate(
            text,
            (partner(level, y_low), y_low),
            (0, 8),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=theme.faint,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5},
            zorder=2,
        )
    return boxes


def _draw(axes: Any, points: Sequence[Point], taken: list[Box], theme: Theme) -> None:
    for style, look in STYLES.items():
        members = [point for point in points if point.style == style]
        if members:
            axes.scatter(
                [point.generality for point in members],
                [point.locality for point in members],
                zorder=3,
                clip_on=False,
                edgecolor=theme.paper,
                linewidth=0.8,
                label=MEANINGS[style],
                color=theme.colours[COLOURS[style]],
                **look,
            )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        borderaxespad=0.2,
        handletextpad=0.2,
        columnspacing=1.4,
    )
    scale = 72 / axes.figure.dpi
    places = [tuple(axes.transData.transform((point.generality, point.locality)) * scale) for point in points]
    bounds = tuple(value * scale for value in axes.bbox.extents)
    for point, (dx, dy, side) in zip(
        points, label_offsets([point.label for point in points], places, bounds, taken), strict=True
    ):
        far = math.hypot(dx, dy) > FAR
        axes.annotate(
            point.label,
            (point.generality, point.locality),
            (dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            color=theme.ink,
            fontsize=TEXT,
            zorder=2.5,
            annotation_clip=False,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": theme.faint, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
            if far
            else None,
        )


# --- labels -------------------------------------------------------------------------------------------------------

FAR = 12.5  # points; from here on a line leads to the label
FARTHER = ((13.0, (18.0, -18.0, 28.0, -28.0)), (22.0, (0.0, 18.0, -18.0, 40.0, -40.0, 54.0, -54.0)))
OFFSETS = [  # (right, up) of the point, and which side of the text is there; the nearest first
    *((side * 8.0, up, "left" if side > 0 else "right") for up in (0.0, 7.0, -7.0) for side in (1, -1)),
    *((0.0, up, "center") for up in (13.0, -13.0)),
    *((side * right, up, "left" if side > 0 else "right") for right, ups in FARTHER for up in ups for side in (1, -1)),
]


def label_offsets(
    labels: Sequence[str], places: Sequence[tuple[float, float]], bounds: Box, taken: Iterable[Box] = ()
) -> list[tuple[float, float, str]]:
    """Find a place beside each point for its label, where it covers neither points nor labels, as far as possible.

    Args:
        labels: The texts.
        places: Of the points, in points from the lower left.
        bounds: The axes, which labels leave only if they must.
        taken: What is covered already.

    Returns:
        For each label the way from its point, right and up, and which side of the text lies there.
    """
    covered = [*taken, *((x - 5, y - 5, x + 5, y + 5) for x, y in places)]
    crowded = sorted(
        range(len(places)), key=lambda i: (min(_apart(places, i)), i)
    )  # those have the fewest places to go
    offsets: dict[int, tuple[float, float, str]] = {}
    for i in crowded:
        x, y = places[i]
        costs = []
        for rank, (dx, dy, side) in enumerate(OFFSETS):
            box = _box(labels[i], x + dx, y + dy, TEXT, side)
            costs.append((sum(_overlap(box, other) for other in covered) + 2 * _outside(box, bounds) + rank, rank))
        offsets[i] = OFFSETS[min(costs)[1]]
        covered.append(_box(labels[i], x + offsets[i][0], y + offsets[i][1], TEXT, offsets[i][2]))
    return [offsets[i] for i in range(len(labels))]


def _apart(places: Sequence[tuple[float, float]], i: int) -> list[float]:
    return [math.dist(places[i], other) for j, other in enumerate(places) if j != i] or [math.inf]


def _box(text: str, x: float, y: float, size: float, side: str) -> Box:
    """Return what a text covers; its width is a guess on the wide side, since readers have other typefaces."""
    width, height = 0.64 * size * len(text), 1.15 * size
    left = x - {"left": 0.0, "center": width / 2, "right": width}[side]
    return left, y - height / 2, left + width, y + height / 2


def _overlap(one: Box, other: Box) -> float:
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Box, bounds: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, bounds)
