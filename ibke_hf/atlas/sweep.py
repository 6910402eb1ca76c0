"""`ibke sweep`: a grid of Atlas trainings, cell by cell, in a folder that a killed run goes on in.

The folder of a cell holds ``training.json``, the log of its training, the editor in 16 bit where it is kept, and
``cell.json``, its line, once it is scored. ``sweep.json`` and ``logs.json`` beside the cells hold all lines and logs:
what figures and claims are made of.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .. import __version__
from ..analysis.summaries import scores_of_training
from ..benchmark.cell_folders import CELL, CELLS, SETTINGS, cell_files, copy_cells, noting, require_none_failed
from ..benchmark.cells import BenchmarkError, share_of
from ..core.records import EditRecord
from ..evaluation.protocol import evaluate_records
from ..evaluation.results import require_same
from ..io import FileError, locked, read_json, write_json
from ..loading import load_editor
from ..training.checkpoints import last_complete_checkpoint
from ..training.time_left import in_words
from . import load_backbone, load_records, load_split
from .datasets import training_records
from .editors import LOG, PLAIN_OPTIONS, TRAINING, train_atlas_editor
from .grid import ALL, Grid, Training, as_json

EDITOR, TRAINING_LOG, PLAN = "editor", "training.json", "plan.json"
SWEEP, LOGS = "sweep.json", "logs.json"
SPLITS = ("test", "held_out")
VALIDATION = 100  # records whose loss the log of each training ends with
EVERY = 100  # steps from checkpoint to checkpoint: two minutes are lost at most
FIRST_STEPS = 10  # of a run, after which the time to the end is said for the first time
REMAKE = "remove its folder, and `ibke sweep` makes the cell again"
Line = dict[str, Any]


def run_sweep(
    grid: Grid, out: str | Path, *, shard: tuple[int, int] = (1, 1), limit: int | None = None, batch_size: int = 100
) -> list[Line]:
    """Make the cells that are missing, and return all that the folder holds.

    What fails takes no other cell with it; failures are raised at the end.

    Args:
        grid: The trainings.
        out: Folder of the cells.
        shard: i and n: every n-th training from the i-th on is made here.
        limit: Records of each split that editors are scored on; by default all.
        batch_size: Prompts of a forward pass in scoring.

    Raises:
        BenchmarkError: If cells failed.
        FileError: If another process is writing to the folder, or a file of it cannot be read.
        ResultsError: If the folder holds cells of other settings.
    """
    target = Path(out)
    with locked(target):
        _keep_settings(target, settings_of(grid.steps, limit))
        _plan(target, [training.name for training in grid.trainings()])
        share = share_of(grid.trainings(), shard)
        missing = [training for training in share if not (target / CELLS / training.name / CELL).exists()]
        progress, pools = _Progress(missing, grid.steps), _Pools(grid.steps)
        scored = [record for split in SPLITS for record in load_records(split)[:limit]]
        failed: dict[Training, Exception] = {}
        try:
            for training in missing:
                with noting(failed, [training], _name):
                    folder = target / CELLS / training.name
                    progress.begin(training)
                    _train(training, grid.steps, folder, pools, progress)
                    _score(training, folder, scored, batch_size, keep=training in grid.kept())
                progress.end(made=training not in failed)
        finally:  # what is made by now is there for figures, whatever stops the rest
            write_sweep(target)
    require_none_failed(failed, len(missing), _name)
    return finished(target)


def _name(training: Training) -> str:
    return training.name


def settings_of(steps: int, limit: int | None) -> dict[str, Any]:
    """Return what all cells of a folder have in common, as JSON values."""
    recipe = {"training": TRAINING, "network": PLAIN_OPTIONS}
    settings = {"ibke_hf": __version__, "backbone": "ibke-atlas", "steps": steps, "limit": limit, "recipe": recipe}
    return dict(json.loads(json.dumps(settings)))


def _train(training: Training, steps: int, folder: Path, pools: _Pools, progress: TrainerCallback) -> None:
    """Train an editor unless that is done, from its last checkpoint where there is one."""
    if (folder / EDITOR / LOG).exists():
        return
    started = last_complete_checkpoint(folder / EDITOR / "checkpoints")
    network = ("latent_length", "use_information_bottleneck", "use_scale_factor", "edit_rank")
    train_atlas_editor(
        training.editor,
        folder / EDITOR,
        seed=training.seed,
        records=pools.records(training),
        validation=VALIDATION,
        options={name: getattr(training, name) for name in network},
        resume=started is not None,
        trials=(),  # as trained: what a figure compares is not evened out afterwards
        callbacks=[progress],
        max_steps=steps,
        beta=training.beta,
        eval_strategy="no",
        save_steps=EVERY,
        disable_tqdm=True,
    )


def _score(training: Training, folder: Path, records: Sequence[EditRecord], batch_size: int, *, keep: bool) -> None:
    """Score the editor as it was saved, and write the line of its cell last."""
    model, tokenizer = load_backbone()
    editor = load_editor(folder / EDITOR, backbone=model)
    evaluation = evaluate_records(
        editor, model, tokenizer, records, batch_size=batch_size, generate=False, progress=False
    )
    log = read_json(folder / EDITOR / LOG)
    held_out = {record.domain for record in records} - _domains_of("train")
    line = {
        "name": training.name,
        **as_json(training),
        "steps": log["training"]["max_steps"],
        "records": log["records"],
        "minutes": log["report"]["minutes"],
        "parameters": log["report"]["parameters"],
        "validation_loss": log["report"]["eval_loss"],
        "editor_kept": keep,
        **scores_of_training(evaluation.rows, held_out),
    }
    write_json(folder / TRAINING_LOG, log)
    if not keep:
        shutil.rmtree(folder / EDITOR)
    write_json(folder / CELL, line)


def _domains_of(part: str) -> set[str]:
    split = load_split()
    return {split.world.relations[triple.relation].domain for triple in split.counterfactual[part]}


class _Pools:
    """The training records of the cells; those of cells that share them are built once."""

    def __init__(self, steps: int) -> None:
        self._number = steps * TRAINING["per_device_train_batch_size"]  # a fresh record for every place of every batch
        self._built: dict[tuple[Any, ...], list[EditRecord]] = {}

    def records(self, training: Training) -> list[EditRecord]:
        key = (training.seed, training.domain, training.edits, training.few_shot)
        if key not in self._built:
            if training.few_shot > self._number:
                raise BenchmarkError(
                    f"{training.few_shot} counterfactual records are more than the {self._number} of the training"
                )
            options: dict[str, Any] = {} if training.domain == ALL else {"domain": training.domain}
            if training.edits != ALL:
                options["unknown_share"] = 1 - training.few_shot / self._number
            self._built = {key: training_records(load_split(), self._number, training.seed, **options)}
        return self._built[key]


class _Progress(TrainerCallback):
    """Says on stderr how far the sweep is and how long it still takes."""

    def __init__(self, missing: Sequence[Training], steps: int) -> None:
        self._steps, self._cells, self._number = steps, len(missing), 0
        self._taken, self._seconds = 0, 0.0  # steps of this run, and what they took
        self._scored, self._rest = 0, 0.0  # cells that it finished, and what these took beside their steps
        self._name = ""

    def begin(self, training: Training) -> None:
        self._number, self._name = self._number + 1, training.name
        self._started, self._before = time.monotonic(), self._seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self._taken, self._seconds, self._clock = self._taken + 1, self._seconds + now - self._clock, now
        if self._taken == FIRST_STEPS or state.global_step == max(self._steps // 2, 1):
            self._say(f"step {state.global_step} of {self._steps}", self._steps - state.global_step)

    def end(self, *, made: bool) -> None:
        spent = time.monotonic() - self._started
        if made:
            self._scored += 1
            self._rest += spent - (self._seconds - self._before)
        self._say(f"{'done' if made else 'failed'} in {in_words(spent)}", 0)

    def _say(self, what: str, steps_here: int) -> None:
        left = self._cells - self._number
        a_step = self._seconds / max(self._taken, 1)
        seconds = a_step * (steps_here + left * self._steps) + self._rest / max(self._scored, 1) * left
        scoring = "" if self._scored or not left else ", without the time that scoring takes"
        going = (
            f"{a_step:.2f} s a step, {in_words(seconds)} to go{scoring}" if left or steps_here else "no cell is left"
        )
        tqdm.write(f"cell {self._number} of {self._cells}, {self._name}: {what}; {going}", file=sys.stderr)


# --- the folder ---------------------------------------------------------------------------------------------------


def finished(folder: str | Path) -> list[Line]:
    """Return the lines of all cells that are done, in the order of the plan."""
    lines = [read_line(file) for file in cell_files(folder)]
    order = planned(folder)
    return sorted(lines, key=lambda line: order.index(line["name"]) if line["name"] in order else len(order))


def planned(folder: str | Path) -> list[str]:
    """Return the names of all cells that the folder is to hold in the end.

    Raises:
        FileError: If the file of the plan does not hold them.
    """
    file = Path(folder) / PLAN
    if not file.exists():
        return []
    names = read_json(file).get("cells")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{file}: cells must be a list of names, found {names!r}; remove the file")
    return names


def read_line(file: Path) -> Line:
    """Read the line of a cell.

    Raises:
        FileError: If it is not one.
    """
    line = read_json(file, cure=REMAKE)
    names = ("name", "scores", *as_json(Training()))
    if missing := [name for name in names if name not in line]:
        raise FileError(f"{file}: has no {missing[0]!r}; {REMAKE}")
    return line


def write_sweep(folder: str | Path) -> None:
    """Write all lines and the logs of all trainings of a folder into one file each."""
    target, lines = Path(folder), finished(folder)
    settings = read_json(target / SETTINGS)
    write_json(target / SWEEP, {"settings": settings, "planned": planned(target), "cells": lines})
    logs = {line["name"]: read_json(target / CELLS / line["name"] / TRAINING_LOG, cure=REMAKE) for line in lines}
    write_json(target / LOGS, logs, compact=True)


def merge_sweeps(folders: Sequence[str | Path], out: str | Path) -> list[Line]:
    """Copy the cells of several folders, such as those of shards, into one; return all that it holds then.

    Raises:
        BenchmarkError: If a folder is no sweep's, or two folders hold different scores of one cell.
        FileError: If another process is writing to `out`.
        ResultsError: If a folder holds cells of other settings.
    """
    target = Path(out)
    for folder in map(Path, folders):
        if not (folder / PLAN).exists() or not (folder / SETTINGS).exists():
            raise BenchmarkError(f"{folder}: holds no {SETTINGS} and {PLAN}, so it is no folder of `ibke sweep`")
        with locked(target):
            _keep_settings(target, read_json(folder / SETTINGS))
            _plan(target, planned(folder))
        copy_cells(folder, target, read_line, lambda line: line["scores"])
    write_sweep(target)
    return finished(target)


def _keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder, or compare them with those of a folder that has begun a cell."""
    file = folder / SETTINGS
    if file.exists() and any((folder / CELLS).glob("*")):
        require_same(folder, read_json(file), settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _plan(folder: Path, names: Sequence[str]) -> None:
    write_json(folder / PLAN, {"cells": list(dict.fromkeys([*planned(folder), *names]))})
