"""Making the cells of a table in a folder, going on there, and joining folders.

The folder of a cell holds what `ibke eval` writes beside its line of the table, see :mod:`.cell_folders`. Trained
editors lie under ``editors``, named by id and seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from .. import __version__
from ..core.records import EditRecord
from ..editors.catalogue import COMPARED, editor_of, kind_of
from ..evaluation.results import evaluate_to_folder, require_same
from ..evaluation.scores import ANSWERED, REPORTED
from ..io import locked, write_json
from .benches import Bench
from .cell_folders import CELL, CELLS, SETTINGS, cell_files, copy_cells, noting, require_none_failed
from .cells import BenchmarkError, Cell, Plan
from .files import PLAN, read_cell, read_plan, read_settings

EDITORS = "editors"


def run_cells(
    bench: Bench,
    plan: Plan,
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    trained: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Make the cells that are missing, and return all that the folder holds.

    What fails takes no other cell with it; failures are raised at the end.

    Args:
        bench: Backbone, records and editors.
        plan: The cells.
        out: Folder of the cells, :func:`open_folder` is called on it.
        shard: Which part of the plan is made here.
        trained: Folder of the trained editors; by default ``editors`` in `out`. Runs may share it.
        batch_size: Prompts of a forward pass.
        progress: Show progress bars.

    Raises:
        BenchmarkError: If cells failed.
        FileError: If another process is writing to the folder.
        ResultsError: If the folder holds cells of other settings, or a cell that another editor made.
    """
    target = Path(out)
    open_folder(bench, plan, target)
    home = Path(trained) if trained is not None else target / EDITORS
    with locked(target):
        missing = [cell for cell in plan.cells(shard) if not _is_done(cell, target / CELLS / cell.name)]
        failed: dict[Cell, Exception] = {}
        for cell in missing:
            with noting(failed, [cell], _name):
                _require_enough(cell, bench.records(cell, plan.records))  # before anything is trained for it
        _train_missing(bench, [cell for cell in missing if cell not in failed], home, failed, progress=progress)
        editors: dict[tuple[str, int, int], Any] = {}
        for cell in tqdm(missing, unit="cell", disable=not progress):
            unit = (cell.editor, cell.seed, cell.sequential)
            if cell in failed:
                continue
            with noting(failed, [cell], _name):
                if unit not in editors:
                    folder = home / "{}-{}".format(*_unit(cell))
                    editors = {unit: bench.arranged(cell.editor, folder, cell.sequential)}  # one at a time
                _make(bench, cell, editors[unit], target / CELLS / cell.name, plan.records, batch_size)
    require_none_failed(failed, len(missing), lambda cell: f"{cell.editor} on {cell.split}, seed {cell.seed}")
    return finished_cells(target)


def _train_missing(
    bench: Bench, missing: Sequence[Cell], home: Path, failed: dict[Cell, Exception], *, progress: bool
) -> None:
    """Train the editors of the missing cells before any of these is made: one backbone is loaded at a time."""
    units = list(dict.fromkeys(_unit(cell) for cell in missing if kind_of(editor_of(cell.editor)).trained))
    for name, seed in tqdm(units, desc="editors to train", unit="editor", disable=not (progress and units)):
        home.mkdir(parents=True, exist_ok=True)
        waiting = FileLock(home / f".{name}-{seed}.lock")  # another run that shares the folder may be training it
        cells = [cell for cell in missing if _unit(cell) == (name, seed)]
        with noting(failed, cells, _name), waiting:
            bench.prepare(name, seed, home / f"{name}-{seed}")


def _unit(cell: Cell) -> tuple[str, int]:
    """Return id and seed of the editor that a cell is made with."""
    return editor_of(cell.editor), cell.seed


def _require_enough(cell: Cell, records: Sequence[EditRecord]) -> None:
    requests = sum(len(record.requests) for record in records)
    if requests < cell.sequential:
        raise BenchmarkError(
            f"{requests} requests are fewer than {cell.sequential} edits at once; ask for more records (--limit)"
        )


def _is_done(cell: Cell, folder: Path) -> bool:
    if not (folder / CELL).exists():
        return False
    line = read_cell(folder / CELL)
    require_same(folder, {name: line.get(name) for name in asdict(cell)}, asdict(cell))
    return True


def _make(bench: Bench, cell: Cell, editor: Any, folder: Path, number: int, batch_size: int) -> None:
    """Evaluate one cell and write its line of the table."""
    (model, tokenizer), records = bench.loaded, bench.records(cell, number)
    free: dict[str, Any] = {"free": True} if bench.free else {}  # older folders do not have it among their settings
    results = evaluate_to_folder(
        folder,
        editor,
        model,
        tokenizer,
        records,
        settings={**bench.settings, **asdict(cell)},
        sequential=cell.sequential,
        batch_size=batch_size,
        **free,
        progress=False,
    )
    line = {
        **asdict(cell),
        "records": results["records"],
        **{score: results["overall"][score] for score in (*REPORTED, *(ANSWERED if bench.free else ()))},
        "edit_seconds": results["edit_seconds"],
        "edit_seconds_alone": results["edit_seconds_alone"],
        "edit_bytes": results["edit_bytes"],
    }
    if (tuned_at := bench.tuned_at(cell.editor, cell.sequential)) is not None:
        line["tuned_at"] = tuned_at
    write_json(folder / CELL, line)


def finished_cells(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of all cells that are done, in the order of the plan, of the paper's editors and of seeds."""
    lines = [read_cell(file) for file in cell_files(folder)]
    (_, groups), editors = planned(folder), list(COMPARED)
    of_lines = [(line["split"], line["edits"], line["sequential"]) for line in lines]
    order = list(dict.fromkeys([*groups, *of_lines]))  # a plan that was made anew may lack groups of the cells
    return sorted(
        lines,
        key=lambda c: (order.index((c["split"], c["edits"], c["sequential"])), editors.index(c["editor"]), c["seed"]),
    )


def merge_cells(folders: Sequence[str | Path], out: str | Path) -> list[dict[str, Any]]:
    """Copy the cells of several folders, such as those of shards, into one; return all that it holds then.

    Raises:
        BenchmarkError: If a folder holds no cells, or two folders hold different results of one cell.
        FileError: If another process is writing to `out`.
        ResultsError: If a folder holds cells of other settings, or an editor of another origin.
    """
    target = Path(out)
    for folder in map(Path, folders):
        if not (folder / SETTINGS).exists():
            raise BenchmarkError(f"{folder}: holds no {SETTINGS}, so it is no folder of `ibke table`")
        _require_settings(target, read_settings(folder / SETTINGS))
        _add_to_plan(target, *planned(folder))
        copy_cells(folder, target, read_cell, _scores)
    return finished_cells(target)


def _scores(line: Mapping[str, Any]) -> list[Any]:
    return [line.get(name) for name in (*REPORTED, *ANSWERED)]


# --- the folder ---------------------------------------------------------------------------------------------------


def open_folder(bench: Bench, plan: Plan, out: str | Path) -> None:
    """Make a folder for the cells of a plan, or check that it holds cells of the same settings; add to its plan.

    Raises:
        ResultsError: If it holds cells of other settings; names each difference.
    """
    sources = {name: source for name in plan.editors if (source := bench.source(name)) is not None}
    settings = json.loads(
        json.dumps({"ibke_hf": __version__, **bench.settings, "limit": plan.records, "given": sources})
    )
    _require_settings(Path(out), settings)
    groups = dict.fromkeys((cell.split, cell.edits, cell.sequential) for cell in plan.cells())
    _add_to_plan(Path(out), list(plan.editors), list(groups))


def planned(folder: str | Path) -> tuple[list[str], list[tuple[str, str, int]]]:
    """Return the editors and the (split, edits, sequential) that a folder's table has in the end, done or not."""
    file = Path(folder) / PLAN
    return read_plan(file) if file.exists() else ([], [])


def _add_to_plan(folder: Path, editors: Sequence[str], groups: Sequence[tuple[str, str, int]]) -> None:
    known_editors, known_groups = planned(folder)
    union = {"editors": [*known_editors, *editors], "groups": [*known_groups, *groups]}
    merged = {name: list(dict.fromkeys(values)) for name, values in union.items()}  # type: ignore[call-overload]
    write_json(folder / PLAN, merged)


def _require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder, or compare them with those that its cells were made with.

    Editors that are given may be added, but none of another origin under the same id.
    """
    file, sources = folder / SETTINGS, dict(settings["given"])
    if file.exists() and cell_files(folder):
        earlier = read_settings(file)
        both = {name: source for name, source in earlier["given"].items() if name in sources}
        require_same(folder, {**earlier, "given": both}, {**settings, "given": {name: sources[name] for name in both}})
        sources = {**earlier["given"], **sources}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {**settings, "given": sources})


def _name(cell: Cell) -> str:
    return cell.name
