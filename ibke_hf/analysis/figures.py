"""The figures by name: how each is drawn from its data, and the files of each, for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.report.drawing import THEMES, Theme, drawing, png_of, svg_of
from ..evaluation.report.trade_off import Point, draw_trade_off, drawn_points
from ..evaluation.scores import f1
from ..io import read_json, write_json, write_text, written_file
from .drawings import domains, edits, ranks, trainings

Data = Mapping[str, Any]
FIGURES = ("2", "3", "4", "5a", "5b", "6", "7a", "7b", "ranks")


def trade_off(cells: Any) -> dict[str, Any]:
    """Return the data of Figure 2: means of generality and locality by editor.

    Args:
        cells: Of a table, see :func:`~ibke_hf.evaluation.report.table.table_of`.

    Raises:
        CellError: If no editor has generality and locality of single edits, or a cell is unusable.
    """
    return {"figure": "2", "points": [asdict(point) for point in drawn_points(cells)]}


def _title_of_trade_off(data: Data) -> str:
    best = max(_points(data), key=lambda point: f1(point.generality, point.locality) or 0.0)
    return f"{best.label} has the best trade-off, F1 {f1(best.generality, best.locality) or 0.0:.1f}"


def _draw_trade_off(data: Data, theme: Theme) -> Any:
    return draw_trade_off(_points(data), theme, _title_of_trade_off(data))


def _points(data: Data) -> list[Point]:
    return [Point(**point) for point in data["points"]]


DRAWN: dict[str, tuple[Callable[[Data, Theme], Any], Callable[[Data], str]]] = {  # how it is drawn, and its title
    "2": (_draw_trade_off, _title_of_trade_off),
    "3": (trainings.draw_hyper_parameters, trainings.title_of_hyper_parameters),
    "4": (trainings.draw_ablation, trainings.title_of_ablation),
    "5a": (domains.draw_domains, domains.title_of_domains),
    "5b": (domains.draw_criteria, domains.title_of_criteria),
    "6": (edits.draw_latents, edits.title_of_latents),
    "7a": (edits.draw_scale_factors, edits.title_of_scale_factors),
    "7b": (edits.draw_pruning, edits.title_of_pruning),
    "ranks": (ranks.draw_ranks, ranks.title_of_ranks),
}
INDEX = "README.md"


def write_figure(data: Data, folder: str | Path) -> list[Path]:
    """Write a figure with its data: ``figure_6.json``, and SVG and PNG for light and for dark pages.

    Args:
        data: What a function of this room returns; ``figure`` names it.
        folder: Made if it is missing.

    Returns:
        The files.

    Raises:
        ImportError: If the extra "plots" is missing.
    """
    target, name = Path(folder), f"figure_{data['figure']}"
    target.mkdir(parents=True, exist_ok=True)
    files = [target / f"{name}.json"]
    write_json(files[0], dict(data), compact=True, ensure_ascii=False)
    for theme in THEMES:
        stem = name if theme.name == "light" else f"{name}.{theme.name}"
        with drawing(theme):
            figure = DRAWN[data["figure"]][0](data, theme)
            svg, png = svg_of(figure), png_of(figure)
        write_text(target / f"{stem}.svg", svg, newline="")
        with written_file(target / f"{stem}.png") as temporary:
            temporary.write_bytes(png)
        files += [target / f"{stem}.svg", target / f"{stem}.png"]
    return files


def read_figure(folder: str | Path, name: str) -> dict[str, Any] | None:
    """Return the data of a figure that was written to a folder; None if it was not."""
    file = Path(folder) / f"figure_{name}.json"
    return read_json(file) if file.exists() else None


def write_index(folder: str | Path) -> Path:
    """Write the page that shows all figures of a folder, each with its title and its data; return the file."""
    parts = [
        "# Figures\n\nMade by `ibke figures`; each is drawn from the data beside it, and its title says what is seen."
    ]
    for name in FIGURES:
        data = read_figure(folder, name)
        if data is None:
            continue
        file = f"figure_{name}"
        title = DRAWN[name][1](data)
        picture = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{file}.dark.png">'
            f'<img src="{file}.png" alt="{escape(title)}"></picture>'
        )
        heading = f"Figure {name}" if name[0].isdigit() else name.capitalize()
        parts.append(f"## {heading}\n\n{title}.\n\n{picture}\n\n[Data]({file}.json), [SVG]({file}.svg)")
    page = Path(folder) / INDEX
    write_text(page, "\n\n".join(parts) + "\n")
    return page
