"""`ibke demo` shows edits at once, scores editors on request, and keeps the scores of a run that is cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibke_hf.app import demo, scoring
from ibke_hf.atlas.report import SPLITS
from ibke_hf.cli import main
from ibke_hf.evaluation.scores import REPORTED
from ibke_hf.io import FileError, require_writable

GROUPS = ("Did it take?", "Does it carry over?", "Did the rest stay?")
COST = {"edit_seconds", "forward_seconds", "edit_bytes"}


def test_demo_shows_whole_answers_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", str(tmp_path / "demo.json")]) == 0
    printed = capsys.readouterr().out
    assert "Atlas is a language model of 3.1 million parameters" in printed
    assert "A fact that it knows" in printed
    assert "A mistake that it makes" in printed
    assert [printed.count(title) for title in GROUPS] == [2, 2, 2]
    assert "Google -> Microsoft" in printed
    assert "ibke demo --compare" in printed  # what comes next
    report = json.loads((tmp_path / "demo.json").read_text())
    assert set(report) == {"model", "edits", *COST}
    for edit in report["edits"]:
        roles = [row["role"] for row in edit["rows"]]
        assert {"request", "rephrase", "neighbour"} <= set(roles)
        assert edit["rows"][0]["before"]["answer"] != edit["rows"][0]["after"]["answer"] == edit["target"]
    assert {"consequence"} <= {row["role"] for edit in report["edits"] for row in edit["rows"]}
    assert 0 < report["forward_seconds"] < report["edit_seconds"]


@pytest.mark.parametrize(("load", "threads"), [(0.1, 2), (1.2, 1), (9.0, 1)])
def test_the_demo_leaves_busy_cores_alone(load: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        with demo.threads_for_idle_cores():
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user has said how many
        with demo.threads_for_idle_cores():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_demo_is_over_in_seconds_from_a_fresh_start() -> None:
    """Ten of them on two free cores; a test must pass on busy ones, where the same takes several times as long."""
    code = "import resource, sys; from ibke_hf.cli import main; assert main(['demo']) == 0; "
    code += "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_utime + usage.ru_stime)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert float(printed.stdout.splitlines()[-1]) < 20  # seconds of CPU: what two cores do in ten


@pytest.mark.slow
def test_comparison_is_asked_for_and_writes_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--compare", "--records", "6", "--json", str(tmp_path / "demo.json")]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("scoring ") == 8  # labelled, where no bar can be drawn
    assert "held_out: 6 records, percent" in printed.out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert set(report) == {"model", "edits", "editors", "records", "complete", *COST}
    assert report["records"] == {"test": 6, "held_out": 6}
    assert report["complete"] is True
    for name in ("none", "ft", "mend", "ibke"):
        for split in SPLITS:
            assert set(report["editors"][name][split]) == {*REPORTED, "records", "by_criterion", "by_hops"}
    assert report["editors"]["none"]["test"]["locality"] == 100
    assert report["editors"]["ibke"]["test"]["reliability"] > report["editors"]["none"]["test"]["reliability"]


def test_what_was_scored_is_kept_when_the_comparison_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = scoring.evaluate_records, []

    def cut_in_the_second(editor, model, tokenizer, records, *, on_row, **options):
        calls.append(editor)

        def row(one):
            on_row(one)
            if len(calls) == 2 and one["record"] == records[1].id:
                raise KeyboardInterrupt

        return evaluate(editor, model, tokenizer, records, on_row=row, **options)

    monkeypatch.setattr(scoring, "evaluate_records", cut_in_the_second)
    file = tmp_path / "demo.json"
    assert main(["demo", "--compare", "--records", "2", "--json", str(file)]) == 130
    printed = capsys.readouterr()
    assert f"cut in step 2 of 8: the tables hold what was scored until then; kept in {file}" in printed.err
    report = json.loads(file.read_text())
    assert report["complete"] is False
    assert {name: set(cells) for name, cells in report["editors"].items()} == {"none": {"test", "held_out"}}
    assert report["editors"]["none"]["test"]["records"] == 2
    assert "test: 2 records, percent" in printed.out
    assert report["edits"]


@pytest.mark.parametrize("number", ["501", "100000000"])
def test_a_number_of_records_that_there_are_not_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--compare", "--records", number]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--records {number}" in line
    assert "from 1 to 500, or 0 for all" in line


def test_records_without_a_comparison_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--records", "5"]) == 2
    assert "give --compare" in capsys.readouterr().err


def test_where_to_write_is_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "load_workbench", lambda: pytest.fail("work began"))
    for file, reason in ((tmp_path / "no" / "demo.json", "there is no folder"), (tmp_path, "is a folder")):
        assert main(["demo", "--json", str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert list(tmp_path.iterdir()) == []


def test_a_writable_file_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("kept")
    require_writable(tmp_path / "kept.json")
    require_writable(tmp_path / "new.json")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("kept.json", "kept")]
    with pytest.raises(FileError, match="is a folder"):
        require_writable(tmp_path)
