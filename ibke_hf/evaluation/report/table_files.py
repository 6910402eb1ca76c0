"""The files of a table: cells as JSON, the table as Markdown, CSV and a page, and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io import write_json, write_text
from .table import CellError, Column, table_of
from .table_page import as_html
from .table_text import as_csv, as_markdown, as_text
from .trade_off import trade_off_figure

JSON, MARKDOWN, CSV, PAGE, PLOT = "table.json", "table.md", "table.csv", "table.html", "trade_off.svg"


def write_tables(
    cells: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    editors: Iterable[str] = (),
    columns: Iterable[Column] = (),
    width: int = 100,
) -> str:
    """Write the files of a table, each to a temporary name that is then renamed; return the table as text.

    Args:
        cells: See :func:`~ibke_hf.evaluation.report.table.table_of`.
        folder: Made if it is missing.
        editors: Those that have a row in any case, finished or not.
        columns: Those that are there in any case.
        width: Of the text, in characters.

    Raises:
        CellError: If a cell cannot be read.
        ImportError: If matplotlib is missing.
    """
    table, target = table_of(cells, editors=editors, columns=columns), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    try:
        plot: str | None = trade_off_figure(cells)
    except CellError:  # no cell has both scores
        plot = None
    texts = {MARKDOWN: as_markdown(table), CSV: as_csv(table), PAGE: as_html(table, plot), PLOT: plot}
    write_json(target / JSON, list(cells))
    for name, text in texts.items():
        if text is None:
            (target / name).unlink(missing_ok=True)  # of an earlier run, whose cells it would show
            continue
        write_text(target / name, text, newline="")
    return as_text(table, width=width)
