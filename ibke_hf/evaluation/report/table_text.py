"""The table of editors as text: aligned for a terminal, Markdown for a page, CSV for a program."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence

from .table import ABSENT, BEST, EFFORT, FREE, METRICS, MISSING, NEAR, STRICT, Entry, Row, Table, Value
from .tabular import markdown_table, text_table

TITLES = {**METRICS, **FREE}
SHOWN = (*FREE, *METRICS)  # what is right first; of free answers, where there are any
TEXT_MARKS = {BEST: "*", NEAR: "~", "": ""}
EFFORT_TITLES = ("Time alone", "Time at once", "Size")

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


# --- terminal and Markdown -----------------------------------------------------------------------------------------


def as_text(table: Table, metrics: Sequence[str] = SHOWN, *, width: int = 100) -> str:
    """Return the table for a terminal, one below the other for each column group: ``*`` the best, ``~`` near it.

    Args:
        table: Of :func:`table_of`.
        metrics: Which of `SHOWN` to show.
        width: Of the terminal, in characters; the strict scores and the others get a table each where both do not fit.
    """
    blocks = []
    for number, column in enumerate(table.columns):
        parts = [
            metrics,
            *([name for name in metrics if (name in (*FREE, *STRICT)) == strict] for strict in (True, False)),
        ]
        whole, *halves = (_text_block(table, number, part, effort=part != parts[1]) for part in parts)
        fits = max(map(len, whole.splitlines())) <= width
        blocks += [f"{column.title}\n{block}" for block in ([whole] if fits else halves)]
    legend = f"{TEXT_MARKS[BEST]} best of its column, {TEXT_MARKS[NEAR]} within 3 % of the best."
    return "\n\n".join([*blocks, "\n".join(textwrap.fill(note, width) for note in (legend, *table.notes))]) + "\n"


def _text_block(table: Table, number: int, metrics: Sequence[str], *, effort: bool) -> str:
    def value_text(value: Value, spread: bool) -> str:
        text = TEXT_MARKS[value.mark] + number_text(value.mean)
        return f"{text} ± {number_text(value.std):>4}" if spread and value.mean is not None else text

    return text_table(*_block(table, number, metrics, value_text, effort=effort), left=2)


def as_markdown(table: Table, metrics: Sequence[str] = SHOWN) -> str:
    """Return one Markdown table for each column group: bold the best, italics what is within 3 % of it.

    Args:
        table: Of :func:`table_of`.
        metrics: Which of `SHOWN` to show.
    """
    parts = []
    for number, column in enumerate(table.columns):
        heads, lines = _block(table, number, metrics, _markdown_value)
        parts.append(f"**{markdown_escape(column.title)}**\n\n{markdown_table(heads, lines, left=2)}")
    notes = ["Bold: the best of its column. Italics: within 3 % of the best.", *table.notes]
    return "\n\n".join([*parts, *map(markdown_escape, notes)]) + "\n"


def _block(
    table: Table,
    number: int,
    metrics: Sequence[str],
    value_text: Callable[[Value, bool], str],
    *,
    effort: bool = True,
) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of a column group: type, editor, metrics and, with `effort`, what an edit takes."""
    shown = table.metrics(number, metrics)
    heads = ["Type", "Editor", *(TITLES[name] for name in shown), *(EFFORT_TITLES if effort else ())]
    lines = []
    for i, row in enumerate(table.rows):
        entry = row.entries[number]
        kind = row.group if i == 0 or table.rows[i - 1].group != row.group else ""
        if entry is None:
            lines.append([kind, row.name, *[MISSING] * (len(heads) - 2)])
            continue
        values = [value_text(entry.values[name], name == "avg") for name in shown]
        lines.append([kind, row.name, *values, *(effort_texts(entry) if effort else ())])
    return heads, lines


def effort_texts(entry: Entry | Row) -> list[str]:
    """Return what one edit takes, in the order of `EFFORT_TITLES`."""
    times = (entry.edit_seconds_alone, entry.edit_seconds)
    return [*map(seconds_text, times), bytes_text(entry.edit_bytes)]


def _markdown_value(value: Value, spread: bool) -> str:
    around = {BEST: "**", NEAR: "*", "": ""}[value.mark]
    text = f"{around}{number_text(value.mean)}{around}"
    return f"{text} ± {number_text(value.std)}" if spread and value.mean is not None else text


def markdown_escape(text: str) -> str:
    """Return Markdown that shows a text as it is, in a table too."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~&!$" else sign for sign in text)


# --- CSV ------------------------------------------------------------------------------------------------------------


def as_csv(table: Table) -> str:
    """Return a line for each editor and column group: mean and std of every metric in full precision, or nothing."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    spread = [f"{name}_{part}" for name in TITLES for part in ("mean", "std")]
    lines.writerow(["type", "editor", "split", "edits", "sequential", "seeds", "records", *spread, *EFFORT])
    for row in table.rows:
        for column, entry in zip(table.columns, row.entries, strict=True):
            head = [row.group, row.editor, column.split, column.edits, column.sequential]
            if entry is None:
                lines.writerow([*head, 0, *[""] * (1 + len(spread) + len(EFFORT))])
                continue
            numbers = [number for name in TITLES for number in (entry.values[name].mean, entry.values[name].std)]
            records = " ".join(map(str, entry.records))
            lines.writerow([*head, len(entry.seeds), records, *numbers, *(getattr(entry, name) for name in EFFORT)])
    return file.getvalue()
