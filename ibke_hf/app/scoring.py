"""`ibke demo --compare`: Atlas's editors on a few of its records, scored one after another under one bar.

What has been scored is kept when the run is cut: it is written and printed as far as it got, and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..atlas import load_records
from ..atlas.report import SPLITS, atlas_editors, scores_of
from ..core.records import EditRecord
from ..core.tokens import RequestError
from ..evaluation.judging import Row
from ..evaluation.protocol import evaluate_records
from ..evaluation.scores import REPORTED, summarise
from ..io import write_json

RECORDS = 50
AT_ONCE = 25  # records of a batch: the bar moves once for each
ORDER = ("none", "ibke", "mend", "ft")  # what is most asked for comes first, should the run be cut


def chosen_records(number: int | None) -> dict[str, list[EditRecord]]:
    """Return the first records of each split.

    Args:
        number: Of each split; None for `RECORDS`, 0 for all.

    Raises:
        RequestError: If it is below 0, or no split has so many.
    """
    number = RECORDS if number is None else number
    sets = {split: load_records(split) for split in SPLITS}
    sizes = ", ".join(f"{split} {len(records)}" for split, records in sets.items())
    if not 0 <= number <= max(map(len, sets.values())):
        raise RequestError(
            f"--records {number}: there are fewer records ({sizes}); give a number from 1 to "
            f"{max(map(len, sets.values()))}, or 0 for all"
        )
    return {split: records[: number or None] for split, records in sets.items()}


def score_editors(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[EditRecord]],
    report: dict[str, Any],
    json_file: str | Path | None = None,
) -> None:
    """Score every editor on every split, print the tables, and put the scores into `report`.

    Args:
        model: Atlas.
        tokenizer: Its tokenizer.
        sets: Records of each split.
        report: Gets ``records`` (number by split), ``editors`` (scores in percent by name and split, each with its
            number of ``records``) and ``complete``.
        json_file: The report is written there after each step, too.

    Raises:
        KeyboardInterrupt: When it is cut, after what was scored has been printed and written.
    """
    trained = atlas_editors()
    editors = {name: trained[name] for name in ORDER}
    cells = [(name, split) for name in editors for split in sets]
    report |= {"records": {split: len(records) for split, records in sets.items()}, "editors": {}, "complete": False}
    total = sum(len(sets[split]) for _, split in cells)
    rows: list[Row] = []
    with tqdm(total=total, unit="record", disable=None) as bar:
        for number, (name, split) in enumerate(cells, 1):
            label = f"{name} on {split} ({number} of {len(cells)})"
            bar.set_description(label)
            if bar.disable:
                print(f"scoring {label}, {len(sets[split])} records", file=sys.stderr, flush=True)
            rows.clear()
            try:
                _score(editors[name], model, tokenizer, sets[split], rows, bar)
            except KeyboardInterrupt:
                bar.close()
                _keep(report, name, split, rows)
                _tell(report, number, len(cells), json_file)
                raise
            _keep(report, name, split, rows)
            if json_file is not None:
                write_json(json_file, report, indent=2)
    report["complete"] = True
    _print_tables(report)


def _score(editor: Any, model: Any, tokenizer: Any, records: Sequence[EditRecord], rows: list[Row], bar: Any) -> None:
    """Score one editor on the records of a split; `rows` and `bar` grow as it goes."""
    seen: set[str] = set()

    def add(row: Row) -> None:
        rows.append(row)
        bar.update(len({row["record"]} - seen))
        seen.add(row["record"])

    evaluate_records(editor, model, tokenizer, records, batch_size=AT_ONCE, progress=False, on_row=add)


def _keep(report: dict[str, Any], name: str, split: str, rows: Sequence[Row]) -> None:
    """Put the scores of what was asked into the report, if anything was."""
    if rows:
        number = len({row["record"] for row in rows})
        report["editors"].setdefault(name, {})[split] = {"records": number, **scores_of(summarise(rows))}


def _tell(report: dict[str, Any], number: int, of: int, json_file: str | Path | None) -> None:
    """Print what a run that is cut has scored, write it, and say so."""
    _print_tables(report)
    where = ""
    if json_file is not None:
        write_json(json_file, report, indent=2)
        where = f"; kept in {json_file}, marked as not complete"
    print(f"cut in step {number} of {of}: the tables hold what was scored until then{where}", file=sys.stderr)


def _print_tables(report: Mapping[str, Any]) -> None:
    for split, number in report["records"].items():
        scored = {name: cells[split] for name, cells in report["editors"].items() if split in cells}
        if scored:
            print_table(f"{split}: {number} records, percent", scored, number)


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]], number: int) -> None:
    """Print the scores of each editor, then the top-5 and top-1 generality of each criterion.

    Args:
        title: Stands above it.
        rows: Scores by name of the editor.
        number: Records that each was to be scored on; who was scored on fewer says so.
    """
    print(title)
    print(f"  {'':<24}" + "".join(f"{name:>9}" for name in rows))
    if any(row["records"] < number for row in rows.values()):
        _print_row("records", [row["records"] for row in rows.values()])
    for score in REPORTED:
        _print_row(score, [row[score] for row in rows.values()])
    for role in ("generality", "locality"):
        for criterion in dict.fromkeys(c for row in rows.values() for c in row["by_criterion"].get(role, {})):
            cells = [row["by_criterion"].get(role, {}).get(criterion, {}) for row in rows.values()]
            _print_row(f"{role[:3]} {criterion}", [cell.get("score") for cell in cells])
            if role == "generality":
                _print_row("    top 1", [cell.get("top1") for cell in cells])
    print()


def _print_row(name: str, values: Sequence[float | None]) -> None:
    print(f"  {name:<24}" + "".join("        –" if value is None else f"{value:9.1f}" for value in values))
