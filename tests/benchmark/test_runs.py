"""The cells of `ibke table`: planned and made once each, resumed, shared out and joined; failures stand alone."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import PLAN, RECORDS, run, scores

from ibke_hf.benchmark import BenchmarkError, Cell, ModelBench, Plan, finished_cells, merge_cells
from ibke_hf.benchmark.cell_folders import CELL, CELLS, SETTINGS
from ibke_hf.benchmark.files import PLAN as PLAN_FILE
from ibke_hf.cli import main
from ibke_hf.core.records import EditRecord
from ibke_hf.editors.catalogue import build_editor, editor_class
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.evaluation.results import ResultsError
from ibke_hf.evaluation.scores import ANSWERED, REPORTED
from ibke_hf.io import FileError, locked


@pytest.fixture
def bench(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., ModelBench]:
    """Build a bench on a tiny model: ``bench(records=..., **options of ModelBench)``."""

    def build(records: Sequence[EditRecord] = RECORDS, **options: Any) -> ModelBench:
        fields = {"ft": {"steps": 2}}
        defaults: dict[str, Any] = {
            "saved": {},
            "load_saved": None,
            "hyper_parameters": fields,
            "settings": {"backbone": "tiny"},
        }
        return ModelBench(lambda: (tiny_model(), tiny_tokenizer), lambda _: records, **{**defaults, **options})

    return build


# --- runs ------------------------------------------------------------------------------------------------------------


def test_cells_of_free_answers_have_their_scores_apart(bench: Any, tmp_path: Path) -> None:
    plan = Plan(("none", "ft"), ("places",), seeds=1, records=2)
    free = run(bench(settings={"backbone": "tiny", "free": True}), tmp_path / "free", plan)
    plain = run(bench(), tmp_path / "plain", plan)
    assert all(cell[name] is not None for cell in free for name in ANSWERED)
    assert not any(name in cell for cell in plain for name in ANSWERED)
    assert scores(free) == scores(plain)
    with pytest.raises(ResultsError, match="free was true, now null"):
        run(bench(), tmp_path / "free", plan)


def test_cells_hold_the_scores_of_the_procedure_on_the_records_of_their_seed(bench: Any, tmp_path: Path) -> None:
    cells = run(bench(), tmp_path)
    assert [(cell["editor"], cell["edits"], cell["seed"]) for cell in cells] == [
        (editor, edits, seed)
        for edits in ("counterfactual", "unknown")
        for editor in ("none", "ft")
        for seed in (0, 1)
    ]
    assert all(cell["records"] == 2 and set(REPORTED) < set(cell) for cell in cells)
    assert all(
        (cell["edit_seconds"] is None) == (cell["edit_bytes"] is None) == (cell["editor"] == "none") for cell in cells
    )
    assert all((cell["edit_seconds_alone"] is None) == (cell["editor"] == "none") for cell in cells)
    assert all(cell["locality"] == 100 for cell in cells if cell["editor"] == "none")
    drawn = {(cell["edits"], cell["seed"]): _asked(tmp_path, cell) for cell in cells if cell["editor"] == "ft"}
    assert all({f"r{i}" for i in range(8) if i % 2 == (edits == "unknown")} > ids for (edits, _), ids in drawn.items())
    assert drawn == {
        (cell["edits"], cell["seed"]): _asked(tmp_path, cell) for cell in cells if cell["editor"] == "none"
    }
    assert len(set(map(frozenset, drawn.values()))) > 2  # seeds draw other records


def _asked(folder: Path, cell: dict[str, Any]) -> set[str]:
    name = Cell(*(cell[field] for field in ("editor", "split", "edits", "sequential", "seed"))).name
    return {json.loads(line)["record"] for line in (folder / CELLS / name / "rows.jsonl").read_text().splitlines()}


def test_a_killed_run_goes_on_and_equals_one_that_was_not(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, edit, calls = run(bench(), tmp_path / "whole"), FineTuningEditor.edit, []

    def killed_at_the_third(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edit(self, *arguments, **options)

    monkeypatch.setattr(FineTuningEditor, "edit", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(bench(), tmp_path / "cut")
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / CELLS).glob(f"*/{CELL}")}
    assert 0 < len(done) < len(whole)
    assert scores(run(bench(), tmp_path / "cut")) == scores(whole)
    assert all(file.stat().st_mtime_ns == written for file, written in done.items())  # no cell is made again
    number = len(calls)
    run(bench(), tmp_path / "cut")
    assert len(calls) == number


def test_shards_joined_are_the_whole(bench: Any, tmp_path: Path) -> None:
    whole = run(bench(), tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        run(bench(), part, shard=(i, 2))
    assert 0 < len(finished_cells(parts[0])) < len(whole)
    assert scores(merge_cells(parts, tmp_path / "joined")) == scores(whole)
    assert scores(run(bench(), tmp_path / "joined")) == scores(whole)  # and may be gone on with
    assert merge_cells(parts, tmp_path / "joined") == finished_cells(tmp_path / "joined")  # twice is once


def test_what_differs_is_not_joined(bench: Any, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        run(bench(), tmp_path / name, shard=(1, 1), plan=replace(PLAN, seeds=1))
        file = next((tmp_path / name / CELLS).glob(f"*.ft.0/{CELL}"))
        file.write_text(json.dumps({**json.loads(file.read_text()), "avg": float(seed)}))
    with pytest.raises(BenchmarkError, match="different results of one cell"):
        merge_cells([tmp_path / "one", tmp_path / "two"], tmp_path / "joined")
    run(bench(settings={"backbone": "other"}), tmp_path / "three")
    with pytest.raises(ResultsError, match='backbone was "tiny", now "other"'):
        merge_cells([tmp_path / "one", tmp_path / "three"], tmp_path / "joined")
    with pytest.raises(BenchmarkError, match=r"holds no settings\.json"):
        merge_cells([tmp_path], tmp_path / "joined")


@pytest.mark.parametrize("broken", ["", "[]", "{}", "nul", "[" * 100_000, '{"a": 1e400}', "\\ud800"])
@pytest.mark.parametrize("file", ["cell", "plan", "settings"])
def test_a_broken_file_of_the_folder_is_named_with_the_cure(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, broken: str
) -> None:
    plan = replace(PLAN, editors=("none",), seeds=1)
    run(bench(), tmp_path / "table", plan)
    names = {"cell": next((tmp_path / "table" / CELLS).glob(f"*/{CELL}")), "plan": tmp_path / "table" / PLAN_FILE}
    path = names.get(file, tmp_path / "table" / SETTINGS)
    path.write_text(broken)
    with pytest.raises(FileError, match=re.escape(str(path))):
        run(bench(), tmp_path / "table", plan)
    assert main(["table", "--merge", str(tmp_path / "table"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.strip().splitlines()) == 1 and len(error) < 1500


@pytest.mark.parametrize(
    ("field", "value"), [("seed", "one"), ("sequential", None), ("avg", 1e999), ("f1", "x"), ("split", 3)]
)
def test_a_value_that_no_cell_has_is_named(bench: Any, tmp_path: Path, field: str, value: Any) -> None:
    run(bench(), tmp_path, replace(PLAN, editors=("none",), seeds=1))
    path = next((tmp_path / CELLS).glob(f"*/{CELL}"))
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(FileError, match=rf"{re.escape(str(path))}: .*{field}.*remove its folder"):
        finished_cells(tmp_path)


def test_a_folder_of_other_settings_is_refused(bench: Any, tmp_path: Path) -> None:
    run(bench(), tmp_path)
    with pytest.raises(ResultsError, match="limit was 2, now 3"):
        run(bench(), tmp_path, replace(PLAN, records=3))
    run(bench(), tmp_path, replace(PLAN, editors=("none",), seeds=3))  # more of the same is welcome


def test_what_fails_is_named_and_the_rest_is_made(
    bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(("rome", "ft", "ibke", "grace"), ("places",), seeds=1, records=2)
    with pytest.raises(
        BenchmarkError, match=r"2 of 4 cells failed: ibke on places, .*--records.*rome on places, .*--corpus"
    ):
        run(bench(hyper_parameters={"ft": {"steps": 2}, "grace": {"steps": 2}}), tmp_path, plan)
    assert [cell["editor"] for cell in finished_cells(tmp_path)] == ["ft", "grace"]


def test_an_editor_that_is_given_is_not_mixed_with_another(bench: Any, tmp_path: Path, tiny_model: Any) -> None:
    torch.manual_seed(0)
    serac = editor_class("serac").for_backbone(tiny_model(), embedding_dim=4).eval()
    plan = Plan(("serac",), ("places",), seeds=1, records=1)
    with pytest.raises(BenchmarkError, match="1 of 1 cells failed: serac on places, seed 0: x: no such folder"):
        run(
            bench(saved={"serac": "x"}, load_saved=lambda _, **__: _raise(OSError("x: no such folder"))),
            tmp_path,
            plan,
        )
    with pytest.raises(BenchmarkError, match="mend=x: holds a SERACEditor; give it under its own id"):
        run(bench(saved={"mend": "x"}, load_saved=lambda _, **__: serac), tmp_path, replace(plan, editors=("mend",)))
    run(bench(saved={"serac": "one"}, load_saved=lambda _, **__: serac), tmp_path, plan)
    run(bench(saved={"mend": "x"}), tmp_path, replace(plan, editors=("none",)))  # another id does not matter
    with pytest.raises(ResultsError, match=r'given was \{"serac": "one"\}, now \{"serac": "two"\}'):
        run(bench(saved={"serac": "two"}, load_saved=lambda _, **__: serac), tmp_path, plan)


def _raise(error: Exception) -> Any:
    raise error


def test_a_selection_without_records_takes_no_other_with_it(bench: Any, tmp_path: Path) -> None:
    model_bench = bench()
    model_bench._read = lambda split: RECORDS if split == "b" else RECORDS[:1]
    with pytest.raises(
        BenchmarkError, match="2 of 8 cells failed: none on a, seed 0: a: has no record of unknown edits"
    ):
        run(model_bench, tmp_path, replace(PLAN, splits=("a", "b"), seeds=1))
    assert len(finished_cells(tmp_path)) == 6


def test_more_edits_at_once_than_requests_are_refused(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(
        BenchmarkError, match=r"2 requests are fewer than 3 edits at once; ask for more records \(--limit\)"
    ):
        run(bench(), tmp_path, replace(PLAN, editors=("none",), sequential=(3,)))


def test_a_second_run_is_kept_out(bench: Any, tmp_path: Path) -> None:
    run(bench(), tmp_path, replace(PLAN, editors=("none",)))
    refused: list[Exception] = []

    def second() -> None:
        try:
            run(bench(), tmp_path)
        except FileError as error:
            refused.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [str(error).startswith(f"{tmp_path}: another process is writing there") for error in refused] == [True]


@pytest.mark.parametrize(
    ("one", "other"), [("a/b.json", "a-b-json"), ("./a/b.json", "a/b.json"), ("x" * 300 + "a", "x" * 300 + "b")]
)
def test_no_two_cells_share_a_folder(one: str, other: str) -> None:
    names = {Cell("ft", split, "all", 1, 0).name for split in (one, other)}
    assert len(names) == 2 and all(len(name) < 120 and "/" not in name for name in names)


def test_an_editor_of_another_training_is_not_taken_for_this_one(bench: Any, tmp_path: Path) -> None:
    def training(steps: int, trained: list[Any]) -> dict[str, Any]:
        return {
            "training": lambda name, seed, folder: {"kind": name, "steps": steps, "out": str(folder)},
            "train": trained.append,
        }

    trained: list[Any] = []
    bench(**training(2, trained)).prepare("mend", 0, tmp_path / "mend-0")
    bench(**training(2, trained)).prepare("mend", 0, tmp_path / "mend-0")
    assert trained == [{"kind": "mend", "steps": 2, "out": str(tmp_path / "mend-0")}]
    with pytest.raises(ResultsError, match="steps was 2, now 100"):
        bench(**training(100, trained)).prepare("mend", 0, tmp_path / "mend-0")


def test_no_record_of_the_kind_is_said(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="places: has no record of unknown edits"):
        run(bench(RECORDS[:1]), tmp_path, replace(PLAN, editors=("none",)))


# --- what it stands on -----------------------------------------------------------------------------------------------


def test_another_network_is_not_taken_for_the_papers(bench: Any, tiny_model: Callable[..., Any]) -> None:
    ours = build_editor("ibke", tiny_model(), [1], latent_dim=8, latent_length=2, second_stage_mlp=4)
    with pytest.raises(BenchmarkError, match=r"ibke_paper=there: has second_stage_mlp = 4, .*; give it as ibke"):
        bench(saved={"ibke_paper": "there"}, load_saved=lambda _, **__: ours).editor("ibke_paper", Path())
