"""A sweep of Atlas trainings: the grid that figures need, cells that a killed run goes on with, shards that join."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.atlas import editors, load_records, load_split, sweep
from ibke_hf.atlas.datasets import training_records
from ibke_hf.atlas.grid import ALL, Grid, Training, read_grid
from ibke_hf.atlas.splits import HELD_OUT_DOMAINS, SECTORS
from ibke_hf.atlas.sweep import finished, merge_sweeps, planned, run_sweep
from ibke_hf.benchmark import BenchmarkError
from ibke_hf.cli import main
from ibke_hf.evaluation.results import ResultsError
from ibke_hf.io import FileError, read_json, write_json

GRID = Grid(4, 2, {"pair": {"use_information_bottleneck": [True, False]}, "lengths": {"latent_length": [1, 10]}})
Line = dict[str, Any]


# --- the grid -----------------------------------------------------------------------------------------------------


def test_the_grid_has_every_training_that_the_figures_need_once_for_each_of_three_seeds() -> None:
    trainings = read_grid().trainings()
    assert len(trainings) == len({training.name for training in trainings}) == 111
    assert Counter(training.seed for training in trainings) == {0: 37, 1: 37, 2: 37}
    assert [training.seed for training in trainings] == sorted(training.seed for training in trainings)
    paper = Training()
    needed = [
        replace(paper, latent_length=length, beta=beta) for length in (1, 5, 10, 20) for beta in (0.01, 0.1, 1, 10)
    ]
    needed += [
        replace(paper, use_information_bottleneck=ib, use_scale_factor=sf)
        for ib in (True, False)
        for sf in (True, False)
    ]
    needed += [replace(paper, edit_rank=rank) for rank in (1, 2, 4)]
    needed += [replace(paper, editor="ibke"), *(replace(paper, edits="unknown", few_shot=n) for n in (0, 512))]
    domains = {training.domain for training in trainings} - {ALL}
    assert [len(domains & {*members}) for members in SECTORS.values()] == [1] * len(SECTORS)
    assert not domains & {*HELD_OUT_DOMAINS}
    needed += [
        replace(paper, domain=domain, use_information_bottleneck=ib) for domain in domains for ib in (True, False)
    ]
    assert {*needed} == {training for training in trainings if training.seed == 0}


def test_editors_of_the_pairs_with_and_without_bottleneck_are_kept() -> None:
    kept = read_grid().kept()
    assert {Training(seed=seed, use_information_bottleneck=ib) for seed in range(3) for ib in (True, False)} <= kept
    assert len(kept) == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 1\nsets: {a: {beta: [1]}}", "steps is missing"),
        ("steps: 0\nseeds: 1\nsets: {a: {beta: [1]}}", "steps must be a whole number of at least 1, found 0"),
        ("steps: 1\nseeds: 1\nsets: {a: {gamma: [1]}}", "sets: a: there is no field 'gamma'; fields are editor, "),
        ("steps: 1\nseeds: 1\nsets: {a: {beta: 1}}", "sets: a: beta must be a list of values, found 1"),
        ("steps: 1\nseeds: 1\nsets: {a: {beta: [-1]}}", "sets: a: beta must be a number of at least 0, found -1"),
        ("steps: 1\nseeds: 1\nsets: {a: {editor: [mend]}}", "editor must be one of ibke_paper, ibke, found 'mend'"),
        ("steps: 1\nseeds: 1\nsets: {a: {few_shot: [5]}}", "it needs edits: unknown"),
        ("steps: 1\nseeds: 1\nsets: {a: {beta: [1]}}\nkeep: [b]", "keep names b; the sets are a"),
        ("steps: 1\nseeds: 1\nsets: {a: {beta: [1]}}\nfast: 1", "there is no field 'fast'"),
    ],
)
def test_a_grid_that_cannot_be_run_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(FileError) as error:
        read_grid(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_training_records_of_one_domain_and_of_true_facts_with_a_few_others() -> None:
    split = load_split()
    film = training_records(split, 12, 0, domain="film")
    assert {record.domain for record in film} == {"film"}
    with pytest.raises(ValueError, match="no fact of 'music' may be edited in training; domains are art, "):
        training_records(split, 12, 0, domain="music")
    few = training_records(split, 20, 0, unknown_share=1 - 4 / 20)
    assert Counter(record.kind for record in few) == {"unknown": 16, "counterfactual": 4}


# --- cells --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have no cell trained: its scores are made up of its name; the names of those that are made are returned."""
    made: list[str] = []

    def train(training: Training, steps: int, folder: Path, pools: Any, progress: Any) -> None:
        if training.name in broken:
            raise ValueError("no such records")

    def score(training: Training, folder: Path, *_: Any, keep: bool) -> None:
        made.append(training.name)
        line = {"name": training.name, **asdict(training), "scores": {"avg": float(len(training.name))}}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "training.json", {"seed": training.seed})
        write_json(folder / "cell.json", line)

    broken: list[str] = made  # a cell that was made is never made again
    monkeypatch.setattr(sweep, "_train", train)
    monkeypatch.setattr(sweep, "_score", score)
    monkeypatch.setattr(sweep, "load_records", lambda split: [])
    return made


def test_shards_make_every_cell_once_and_join_to_what_one_run_makes(
    pretended: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_sweep(GRID, tmp_path / "whole", limit=1)
    assert [line["name"] for line in whole] == pretended == [training.name for training in GRID.trainings()]
    assert "cell 6 of 6" in capsys.readouterr().err
    assert run_sweep(GRID, tmp_path / "whole", limit=1) == whole  # nothing is made again
    pretended.clear()
    for i in (1, 2):
        run_sweep(GRID, tmp_path / f"part-{i}", shard=(i, 2), limit=1)
    assert sorted(pretended) == sorted(line["name"] for line in whole)
    merged = merge_sweeps([tmp_path / "part-2", tmp_path / "part-1"], tmp_path / "joined")
    assert merged == whole
    for name in ("sweep.json", "logs.json", "settings.json", "plan.json"):
        assert read_json(tmp_path / "joined" / name) == read_json(tmp_path / "whole" / name)


def test_folders_of_other_settings_or_results_do_not_join(pretended: list[str], tmp_path: Path) -> None:
    run_sweep(GRID, tmp_path / "one", limit=1)
    with pytest.raises(ResultsError, match="steps was 4, now 5"):
        run_sweep(replace(GRID, steps=5), tmp_path / "one", limit=1)
    with pytest.raises(
        BenchmarkError, match=r"holds no settings.json and plan.json, so it is no folder of `ibke sweep`"
    ):
        merge_sweeps([tmp_path], tmp_path / "joined")
    pretended.clear()
    run_sweep(GRID, tmp_path / "other", limit=1)
    file = tmp_path / "other" / "cells" / Training().name / "cell.json"
    write_json(file, {**read_json(file), "scores": {"avg": 1.0}})
    with pytest.raises(BenchmarkError, match="hold different results of one cell"):
        merge_sweeps([tmp_path / "one", tmp_path / "other"], tmp_path / "joined")


def test_a_cell_that_fails_takes_no_other_with_it(pretended: list[str], tmp_path: Path) -> None:
    pretended.append(Training().name)  # is made already, so that it fails
    with pytest.raises(BenchmarkError, match=r"1 of 6 cells failed: ibke_paper\.l10\.b0\.1\.0: no such records"):
        run_sweep(GRID, tmp_path, limit=1)
    assert len(finished(tmp_path)) == 5
    assert len(read_json(tmp_path / "sweep.json")["cells"]) == 5
    assert len(planned(tmp_path)) == 6


def test_a_dry_run_names_what_is_missing(
    pretended: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("steps: 4\nseeds: 1\nsets: {pair: {use_information_bottleneck: [true, false]}}")
    command = ["sweep", "--grid", str(grid), "--out", str(tmp_path / "out")]
    assert main([*command, "--shard", "2/2", "--dry-run"]) == 0
    assert capsys.readouterr().out == "ibke_paper.l10.b0.1.no-ib.0\n1 trainings of 4 steps are missing\n"
    assert main([*command, "--shard", "1/2"]) == 0
    assert capsys.readouterr().out.startswith("1 of 2 trainings are done")
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("ibke_paper.l10.b0.1.no-ib.0\n1 trainings")


# --- trainings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few records, with a checkpoint at every other step."""
    for module in (editors, sweep):
        monkeypatch.setattr(module, "load_records", lambda split: load_records(split)[:3])
    monkeypatch.setattr(sweep, "EVERY", 2)
    for name, value in {"per_device_train_batch_size": 2, "calibration_requests": 6}.items():
        monkeypatch.setitem(editors.TRAINING, name, value)


def comparable(line: Line) -> Line:
    return {name: value for name, value in line.items() if name != "minutes"}


def test_a_sweep_that_was_killed_goes_on_to_the_same_cells(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(5, 1, {"one": {"latent_length": [3], "domain": ["film"]}}, keep=["one"])
    whole = run_sweep(grid, tmp_path / "whole")
    step: Callable[..., None] = sweep._Progress.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        step(self, args, state, control, **options)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep._Progress, "on_step_end", killed)
        run_sweep(grid, tmp_path / "cut")
    folder = tmp_path / "cut" / "cells" / grid.trainings()[0].name
    assert (folder / "editor" / "checkpoints" / "checkpoint-2").is_dir()
    assert json.loads((tmp_path / "cut" / "sweep.json").read_text())["cells"] == []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "_score", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run_sweep(grid, tmp_path / "cut")  # trained, but killed before it is scored
    assert not (folder / "editor" / "checkpoints").exists()
    assert list(map(comparable, run_sweep(grid, tmp_path / "cut"))) == list(map(comparable, whole))
    (line,) = whole
    assert (line["steps"], line["records"], line["editor_kept"]) == (5, 10, True)
    assert {*line["parts"]} <= {"test", "held_out", "counterfactual", "unknown"}
    assert line["scores"]["records"] == 6 == sum(scores["records"] for scores in line["by_domain"].values())
    assert (folder / "editor" / "model.safetensors").exists()
    assert [entry["step"] for entry in read_json(folder / "training.json")["history"]][-1] == 5
