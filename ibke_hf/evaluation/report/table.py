"""Scores of many editors -> a table: rows by editor, column groups by what was edited, the best values marked.

A cell is what one run found: one editor, one seed, one column group. Nothing here runs a model or reads a file.
`table_text` writes a table for terminals, Markdown and programs, `table_page` for browsers.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...editors.catalogue import ARRANGEMENTS, KINDS, kind_of

Cell = Mapping[str, Any]
EDITORS = {name: ("ET" if kind.trained else "DE", kind.title) for name, kind in KINDS.items()}  # in the paper's order
EDITORS |= {
    name: ("ET" if row.routed or kind_of(row.editor).trained else "DE", row.title)
    for name, row in ARRANGEMENTS.items()
}
EDITORS = dict(sorted(EDITORS.items(), key=lambda item: item[1][0]))  # each group in one piece
UNEDITED = "none"
METRICS = {  # the strict ones first; what counts an answer among the five most probable tokens says so
    "exact_match": "Exact match",
    "reliability": "Rel. top 1",
    "generality_top1": "Gen. top 1",
    "locality_top1": "Loc. top 1",
    "generality": "Gen. in top 5",
    "locality": "Loc. in top 5",
    "avg": "Average",
    "f1": "F1",
}
FREE = {  # of cells whose models answered freely; shown where there are any
    "answered_reliability": "Free rel.",
    "answered_generality": "Free gen.",
    "answered_locality": "Free loc.",
}
STRICT = ("exact_match", "reliability", "generality_top1", "locality_top1")
PAPER = ("reliability", "generality", "locality", "avg")  # what the paper's Table II shows
EFFORT = ("edit_seconds", "edit_seconds_alone", "edit_bytes")  # what one edit takes
BEST, NEAR = "best", "near"
NEAR_BEST = 0.97  # of the best value: the paper's 3 %
IBKE_ROWS = (  # what the two rows of one editor are
    "IBKE (ours): the network that its config asks for, on Atlas with a token-wise skip, an MLP and four heads in the "
    "second stage, which are ours and not the paper's. IBKE (paper): the paper's plain network, trained alike."
)
ABSENT, MISSING = "–", "…"
LONG = 28  # characters of a dataset's name that a title has room for
FREE_MEANING = (
    "Free rel., Free gen., Free loc.: the model answers by itself, without the target or its length, until it stops "
    "or has written 32 tokens. Right is what contains the answer or another name of it as whole words (requests, then "
    "generality cases); in Free loc. the answer is the one from before the edit."
)
MEANINGS = [
    (
        "DE: direct editing. ET: edit training. Values are percent, means over seeds. Exact match: what the edited "
        "model writes by itself on generality cases is the answer or another name of it. Rel., Gen., Loc.: "
        "reliability, generality, locality, teacher-forced. Top 1: tokens of the answer that are the most probable "
        "one. In top 5: those among the five most probable (Yes and No: the most probable), as the paper counts, so a "
        "high value does not mean that so many answers are right. "
        f"Average: mean of Rel. top 1, Gen. and Loc. in top 5 ± its sample standard deviation over seeds ({ABSENT} "
        "with one seed). F1: harmonic mean of Gen. and Loc. in top 5."
    ),
    (
        "Time and size of an edit: medians. Alone: one request at a time. At once: the share of one request where "
        "many are edited in one batch, each in an edit of its own."
    ),
]


class CellError(ValueError):
    """Cells that make no table; the message names the cell and says what to do."""


@dataclass(frozen=True)
class Column:
    """A column group: what was edited, and how many edits the model carried at once."""

    split: str
    edits: str = "all"
    sequential: int = 1

    @property
    def title(self) -> str:
        """What stands over the group, such as "test, counterfactual"."""
        split = "held out" if self.split == "held_out" else shortened(" ".join(self.split.split()))
        edits = "" if self.edits == "all" else " ".join(self.edits.split())
        several = f"{self.sequential} sequential edits" if self.sequential > 1 else ""
        return ", ".join(filter(None, (split, edits, several)))


@dataclass(frozen=True)
class Value:
    """A metric over seeds, in percent.

    Attributes:
        mean: None where there is nothing to score.
        std: Sample standard deviation; None below two seeds.
        mark: `BEST`, `NEAR` or none.
    """

    mean: float | None
    std: float | None
    mark: str = ""


@dataclass(frozen=True)
class Entry:
    """What the runs of one editor found in one column group.

    Attributes:
        values: By metric of `METRICS` and `FREE`.
        seeds: Of the runs.
        records: The numbers of records that the runs were scored on, each once.
        edit_seconds: Of a request where many are edited at once, median over runs; None without an edit.
        edit_seconds_alone: Of a request that is edited alone, likewise; None where it was not measured.
        edit_bytes: Median over runs; None without an edit.
        tuned_at: Numbers of edits at once that the runs' hyper-parameters were chosen at; none where that is unknown.
    """

    values: Mapping[str, Value]
    seeds: tuple[int, ...]
    records: tuple[int, ...]
    edit_seconds: float | None
    edit_seconds_alone: float | None
    edit_bytes: float | None
    tuned_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """An editor.

    Attributes:
        editor: Its id.
        entries: In the order of the table's columns, None where no run is finished.
        edit_seconds: What one edit takes, see :class:`Entry`.
        edit_seconds_alone: Likewise.
        edit_bytes: Likewise.
    """

    editor: str
    entries: tuple[Entry | None, ...]
    edit_seconds: float | None
    edit_seconds_alone: float | None
    edit_bytes: float | None

    @property
    def name(self) -> str:
        """The editor as the paper writes it."""
        return EDITORS[self.editor][1]

    @property
    def group(self) -> str:
        """DE for direct editing, ET for edit training."""
        return EDITORS[self.editor][0]


@dataclass(frozen=True)
class Table:
    """Column groups, rows in the paper's order, and the sentences that belong below."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def entry(self, editor: str, column: Column) -> Entry | None:
        """Return what an editor's runs found in a column group; None if none is finished.

        Raises:
            KeyError: If the table has no such editor.
        """
        rows = {row.editor: row for row in self.rows}
        return rows[editor].entries[self.columns.index(column)]

    def metrics(self, number: int, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of some metrics that any editor has in column group `number`: MQuAKE, say, has no locality."""
        entries = [entry for row in self.rows if (entry := row.entries[number])]
        return tuple(
            name
            for name in names
            if any(entry.values[name].mean is not None for entry in entries) or not (entries or name in FREE)
        )


# --- cells -> table -----------------------------------------------------------------------------------------------


def shortened(name: str) -> str:
    """Leave out the folders of a path that is too long for a title."""
    folders, _, last = name.rpartition("/")
    return f"…/{last}" if folders and len(name) > LONG else name


def column_of(cell: Cell) -> Column:
    """Return the column group that a cell belongs to.

    Raises:
        CellError: If the cell does not say what was edited.
    """
    for field in ("split", "edits"):
        if field not in cell:
            raise CellError(
                f"a cell of {cell.get('editor', 'an unnamed editor')} has no {field!r}; it names what was edited"
            )
    return Column(cell["split"], cell["edits"], cell.get("sequential", 1))


def table_of(cells: Iterable[Cell], *, editors: Iterable[str] = (), columns: Iterable[Column] = ()) -> Table:
    """Arrange cells as the paper's Table II: mean and sample std over seeds, marks for the best and what is near it.

    Args:
        cells: One for each finished run: ``editor``, ``split``, ``edits``, ``sequential`` (1 if missing), ``seed``,
            ``records``, the metrics of `METRICS` in percent or None, those of `FREE` (missing in older cells),
            ``edit_seconds`` (of a request among many that are edited at once), ``edit_seconds_alone`` (likewise) and
            ``edit_bytes``.
        editors: Those that have a row in any case, finished or not.
        columns: Those that are there in any case, before the others.

    Raises:
        CellError: If a cell lacks a field, holds no finite number, names an unknown editor, or comes twice.
    """
    runs: dict[tuple[str, Column], list[Cell]] = {}
    for cell in cells:
        require_cell(cell)
        runs.setdefault((cell["editor"], column_of(cell)), []).append(cell)
    named = [*map(_known, editors), *(editor for editor, _ in runs)]
    shown = tuple(dict.fromkeys([*columns, *(column for _, column in runs)]))
    order = [editor for editor in EDITORS if editor in named]
    entries = {key: _entry(group) for key, group in runs.items()}
    marked = {key: entry for column in shown for key, entry in _marked(column, order, entries).items()}
    rows = tuple(_row(editor, tuple(marked.get((editor, column)) for column in shown), shown) for editor in order)
    return Table(shown, rows, notes_of(rows, shown))


def require_cell(cell: Cell) -> None:
    """Check that a cell is whole.

    Raises:
        CellError: If it lacks a field, names an unknown editor, or holds what is no finite number.
    """
    editor = _known(cell.get("editor"))
    where = f"the cell of {editor} ({column_of(cell).title}, seed {cell.get('seed')})"
    if "seed" not in cell:
        raise CellError(f"{where} has no 'seed'; give each run its number")
    for name in METRICS:
        if name not in cell:
            raise CellError(f"{where} has no {name!r}; write None where there is nothing to score")
    for name in (*METRICS, *FREE, *EFFORT):
        value = cell.get(name)
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise CellError(f"{where} has {name} = {value!r}; it has to be a finite number or None")


def _known(editor: Any) -> str:
    if editor not in EDITORS:
        raise CellError(f"the table has no row for the editor {editor!r}; it knows {', '.join(EDITORS)}")
    return str(editor)


def _entry(runs: Sequence[Cell]) -> Entry:
    seeds = tuple(sorted(run["seed"] for run in runs))
    for seed, count in Counter(seeds).items():
        if count > 1:
            run = runs[0]
            raise CellError(
                f"{count} cells of {run['editor']} ({column_of(run).title}) have the seed {seed}; keep one of them"
            )
    return Entry(
        {name: _value([run[name] for run in runs if run.get(name) is not None]) for name in (*METRICS, *FREE)},
        seeds,
        _each_once(runs, "records"),
        **{name: _median(run.get(name) for run in runs) for name in EFFORT},
        tuned_at=_each_once(runs, "tuned_at"),
    )


def _each_once(runs: Sequence[Cell], name: str) -> tuple[int, ...]:
    return tuple(sorted({run[name] for run in runs if run.get(name) is not None}))


def _value(numbers: Sequence[float]) -> Value:
    mean = statistics.fmean(numbers) if numbers else None
    return Value(mean, statistics.stdev(numbers) if len(numbers) > 1 else None)


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _marked(
    column: Column, editors: Iterable[str], entries: Mapping[tuple[str, Column], Entry]
) -> dict[tuple[str, Column], Entry]:
    """Mark the entries of one column group, metric by metric; the unedited model's stay without marks."""
    of_column = {editor: entries[editor, column] for editor in editors if (editor, column) in entries}
    values: dict[str, dict[str, Value]] = {editor: {} for editor in of_column}
    for name in (*METRICS, *FREE):
        means = [entry.values[name].mean for editor, entry in of_column.items() if editor != UNEDITED]
        best = max((mean for mean in means if mean is not None), default=None)
        for editor, entry in of_column.items():
            value = entry.values[name]
            values[editor][name] = Value(
                value.mean, value.std, "" if editor == UNEDITED else mark_of(value.mean, best)
            )
    return {(editor, column): replace(entry, values=values[editor]) for editor, entry in of_column.items()}


def mark_of(value: float | None, best: float | None) -> str:
    """Tell the best value, and one within 3 % of it, from the others; where nobody scores, nobody is best."""
    if value is None or not best:
        return ""
    if value == best:
        return BEST
    return NEAR if value >= NEAR_BEST * best - 1e-9 else ""  # so that rounding does not decide about 97.00 beside 100


def _row(editor: str, entries: tuple[Entry | None, ...], columns: Sequence[Column]) -> Row:
    """Make a row; what an edit takes is told of single edits, if there are any: on top of others it may take more."""
    least = min((column.sequential for column, entry in zip(columns, entries, strict=True) if entry), default=1)
    of_edits = [entry for column, entry in zip(columns, entries, strict=True) if entry and column.sequential == least]
    return Row(editor, entries, *(_median(getattr(entry, name) for entry in of_edits) for name in EFFORT))


# --- notes --------------------------------------------------------------------------------------------------------


def notes_of(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[str, ...]:
    """Return what a reader has to know: meanings, seeds, records and what is missing."""
    notes = [*MEANINGS]
    entries = [entry for row in rows for entry in row.entries if entry]
    if any(entry.values[name].mean is not None for entry in entries for name in FREE):
        notes.insert(1, FREE_MEANING)
    if any(row.editor == UNEDITED for row in rows):
        notes.append(
            "W/O is the unedited model. It takes no part in the marks, since its locality is 100 by definition."
        )
    if any(row.editor in ("ibke", "ibke_paper") for row in rows):
        notes.append(IBKE_ROWS)
    missing = sum(entry is None for row in rows for entry in row.entries)
    if missing:
        verb = "is" if missing == 1 else "are"
        notes.append(
            f"{missing} of {len(rows) * len(columns)} cells {verb} missing ({MISSING}): no run there is finished."
        )
    return (*notes, *_seeds_note(rows, columns), *_records_notes(rows, columns), *_tuning_note(rows, columns))


def _seeds_note(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    counts = Counter(len(entry.seeds) for row in rows for entry in row.entries if entry)
    if not counts:
        return []
    common = max(counts, key=lambda count: (counts[count], count))
    odd: dict[tuple[int, str], list[str]] = {}  # names by number of seeds and where that is so
    for row in rows:
        seeds_of = {
            column.title: len(entry.seeds) for column, entry in zip(columns, row.entries, strict=True) if entry
        }
        for count in sorted({*seeds_of.values()} - {common}):
            titles = [f'"{title}"' for title, number in seeds_of.items() if number == count]
            where = f" in {' and '.join(titles)}" if len(titles) < len(seeds_of) else ""
            odd.setdefault((count, where), []).append(row.name)
    seeds = "1 seed" if common == 1 else f"{common} seeds"
    exceptions = "; ".join(f"{count} for {', '.join(names)}{where}" for (count, where), names in odd.items())
    return [f"Seeds are unequal: {seeds}, but {exceptions}."] if odd else [f"Each value is of {seeds}."]


def _records_notes(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Say on how many records each column group was scored, and warn where editors differ in that."""
    equal: dict[int, list[str]] = {}
    unequal = []
    for number, column in enumerate(columns):
        scored = {row.name: entry.records for row in rows if (entry := row.entries[number]) and entry.records}
        numbers = {number for records in scored.values() for number in records}
        if len(numbers) == 1:
            equal.setdefault(numbers.pop(), []).append(f'"{column.title}"')
        elif scored:
            each = ", ".join(f"{name} {' and '.join(map(str, records))}" for name, records in scored.items())
            unequal.append(
                f'"{column.title}": not all values are of the same number of records ({each}), '
                "so compare them with care."
            )
    each = "; ".join(f"{number:,} in {', '.join(titles)}" for number, titles in equal.items())
    return ([f"Records: {each}."] if equal else []) + unequal


def _tuning_note(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Say at how many edits hyper-parameters were chosen: what suits one edit may not suit a hundred."""
    others: dict[tuple[int, str], list[str]] = {}
    known = False
    for number, column in enumerate(columns):
        for row in rows:
            for tuned_at in entry.tuned_at if (entry := row.entries[number]) else ():
                known = True
                if tuned_at != column.sequential:
                    others.setdefault((tuned_at, f'"{column.title}"'), []).append(row.name)
    if not known:
        return []
    each = "; ".join(f"in {title} at {count} for {', '.join(names)}" for (count, title), names in others.items())
    but = f", but {each}" if others else ""
    note = "Hyper-parameters were chosen on validation records, with as many edits at once as the column has"
    return [f"{note}{but}."]
