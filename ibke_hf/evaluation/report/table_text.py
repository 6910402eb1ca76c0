"""The table of editors as text: aligned for a terminal, Markdown for a page, CSV for a program."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence

from .table import ABSENT, BEST, METRICS, MISSING, NEAR, PAPER, Table, Value

TEXT_MARKS = {BEST: "*", NEAR: "~", "": " "}

# --- words --------------------------------------------------------------------------------------------------------


def number_text(number: float | None) -> str:
    """Write a percentage with one decimal, a dash where there is none."""
    return ABSENT if number is None else f"{number:.1f}"


def seconds_text(seconds: float | None) -> str:
    """Write a time in the unit that suits it."""
    if seconds is None:
        return ABSENT
    return f"{seconds * 1000:.{0 if seconds >= 0.0095 else 1}f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def bytes_text(size: float | None) -> str:
    """Write a size in the unit that suits it."""
    if size is None:
        return ABSENT
    power = next((power for power in (3, 2, 1) if size >= 0.9995 * 1000**power), 0)
    return f"{size / 1000**power:.{0 if power < 2 else 1}f} {('B', 'kB', 'MB', 'GB')[power]}"


# --- terminal ---------------------------------------------------------------------------------------------------


def as_text(table: Table, metrics: Sequence[str] = PAPER, *, width: int = 100) -> str:
    """Return the table for a terminal: ``*`` the best, ``~`` within 3 % of it; what does not fit beside goes below.

    Args:
        table: Of :func:`table_of`.
        metrics: Which of `METRICS` to show.
        width: Of the terminal, in characters.
    """
    rows = table.rows
    names = ["", *(row.name for row in rows)]
    kinds = ["", *(row.group if i == 0 or rows[i - 1].group != row.group else "" for i, row in enumerate(rows))]
    side = _block("", [["Type", *kinds[1:]], ["Editor", *names[1:]]], left=True)
    blocks = [_group_block(table, number, metrics) for number in range(len(table.columns))]
    takes = [
        ["Time", *(seconds_text(row.edit_seconds) for row in rows)],
        ["Size", *(bytes_text(row.edit_bytes) for row in rows)],
    ]
    bands: list[list[list[str]]] = [[side]]
    for block in [*blocks, _block("Edit", takes)]:
        if len(bands[-1]) > 1 and sum(len(part[0]) + 3 for part in bands[-1]) + len(block[0]) > width:
            bands.append([side])
        bands[-1].append(block)
    bodies = ["\n".join("   ".join(lines).rstrip() for lines in zip(*band, strict=True)) for band in bands]
    legend = f"{TEXT_MARKS[BEST]} best of its column, {TEXT_MARKS[NEAR]} within 3 % of the best."
    return "\n\n".join([*bodies, "\n".join(textwrap.fill(note, width) for note in (legend, *table.notes))]) + "\n"


def _group_block(table: Table, number: int, metrics: Sequence[str]) -> list[str]:
    shown = table.metrics(number, metrics)
    columns = []
    for name in shown:
        values = [entry.values[name] if (entry := row.entries[number]) else None for row in table.rows]
        columns.append([METRICS[name] + " ", *(_aligned(value, spread=name == "avg") for value in values)])
    return _block(table.columns[number].title, columns)


def _aligned(value: Value | None, *, spread: bool) -> str:
    """Write a value so that decimals stand below each other when it is set to the right."""
    text = MISSING if value is None else number_text(value.mean)
    text += TEXT_MARKS[value.mark if value else ""]
    if not spread:
        return text
    return text + (f" ± {number_text(value.std):<4}" if value and value.mean is not None else " " * 7)


def _block(title: str, columns: Sequence[Sequence[str]], *, left: bool = False) -> list[str]:
    """Set columns side by side below their title; all lines get the same length."""
    widths = [max(map(len, column)) for column in columns]
    lines = [
        " ".join(text.ljust(wide) if left else text.rjust(wide) for text, wide in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    ]
    wide = max(len(title), *map(len, lines))
    return [title.center(wide), *(line.ljust(wide) if left else line.rjust(wide) for line in lines)]


# --- Markdown and CSV ---------------------------------------------------------------------------------------------


def as_markdown(table: Table, metrics: Sequence[str] = PAPER) -> str:
    """Return one Markdown table for each column group: bold the best, italics what is within 3 % of it.

    Args:
        table: Of :func:`table_of`.
        metrics: Which of `METRICS` to show.
    """
    parts = []
    for number, column in enumerate(table.columns):
        shown = table.metrics(number, metrics)
        heads = ["Type", "Editor", *(METRICS[name] for name in shown), "Time", "Size"]
        lines = [_markdown_line(heads), _markdown_line(["---", "---", *["---:"] * (len(shown) + 2)])]
        for i, row in enumerate(table.rows):
            entry = row.entries[number]
            kind = row.group if i == 0 or table.rows[i - 1].group != row.group else ""
            values = [
                _markdown_value(entry.values[name], spread=name == "avg") if entry else MISSING for name in shown
            ]
            takes = [seconds_text(entry.edit_seconds), bytes_text(entry.edit_bytes)] if entry else [MISSING, MISSING]
            lines.append(_markdown_line([kind, row.name, *values, *takes]))
        parts.append("\n".join([f"**{markdown_escape(column.title)}**", "", *lines]))
    notes = ["Bold: the best of its column. Italics: within 3 % of the best.", *table.notes]
    return "\n\n".join([*parts, *map(markdown_escape, notes)]) + "\n"


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_value(value: Value, *, spread: bool) -> str:
    around = {BEST: "**", NEAR: "*", "": ""}[value.mark]
    text = f"{around}{number_text(value.mean)}{around}"
    return f"{text} ± {number_text(value.std)}" if spread and value.mean is not None else text


def markdown_escape(text: str) -> str:
    """Return Markdown that shows a text as it is, in a table too."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~&!$" else sign for sign in text)


def as_csv(table: Table) -> str:
    """Return a line for each editor and column group, with mean and std of every metric in full precision, empty where there is none."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    spread = [f"{name}_{part}" for name in METRICS for part in ("mean", "std")]
    lines.writerow(
        ["type", "editor", "split", "edits", "sequential", "seeds", "records", *spread, "edit_seconds", "edit_bytes"]
    )
    for row in table.rows:
        for column, entry in zip(table.columns, row.entries, strict=True):
            head = [row.group, row.editor, column.split, column.edits, column.sequential]
            if entry is None:
                lines.writerow([*head, 0, *[""] * (len(spread) + 3)])
                continue
            numbers = [number for value in entry.values.values() for number in (value.mean, value.std)]
            records = " ".join(map(str, entry.records))
            lines.writerow([*head, len(entry.seeds), records, *numbers, entry.edit_seconds, entry.edit_bytes])
    return file.getvalue()
