"""What exists is not overwritten, and outputs are checked before the work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_world import TWO_RELATIONS, write_world

from ibke_hf.cli import main
from ibke_hf.io import locked

Run = Callable[..., str]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model would be loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the outputs were checked")

    monkeypatch.setattr("ibke_hf.loading.load_model", load)
    monkeypatch.setattr("ibke_hf.loading.load_all", load)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("content", ["model", "editor", "edit"])
def test_edit_and_merge_write_over_nothing(
    store: Path,
    edit_arguments: list[str],
    refused: Run,
    content: str,
) -> None:
    before = {file: file.read_bytes() for file in (store / content).iterdir()}
    line = refused(*edit_arguments, "--out", store / content)
    article = "a" if content == "model" else "an"
    cure = "--force to replace it" if content == "edit" else "remove it first"
    assert f"--out {store / content}: holds {article} {content}, which would be lost; give another folder" in line
    assert cure in line
    line = refused("merge", "--edit", store / "edit", "--model", store / "model", "--out", store / content)
    assert f"holds {article} {content}, which would be lost" in line
    assert {file: file.read_bytes() for file in (store / content).iterdir()} == before


def test_force_replaces_an_edit_by_an_edit_and_nothing_else(
    store: Path,
    edit_arguments: list[str],
    refused: Run,
    tmp_path: Path,
) -> None:
    out = tmp_path / "edit"
    for more in ([], ["--force"]):
        assert main([*edit_arguments, "--out", str(out), *more]) == 0
    assert "holds a model" in refused(*edit_arguments, "--out", store / "model", "--force")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("out", ["", " ", "a\0b", "\ud800"])
def test_an_empty_name_is_no_folder(edit_arguments: list[str], misused: Run, out: str) -> None:
    assert "argument --out: the name of a file or folder is wanted, found" in misused(*edit_arguments, "--out", out)


@pytest.mark.usefixtures("no_work")
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    edit_arguments: list[str],
    refused: Run,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to (" in refused(*edit_arguments, "--out", tmp_path / "file")
    assert "cannot be written to (" in refused(*edit_arguments, "--out", tmp_path / "file" / "edit")


def test_demo_checks_its_file_first(refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(**_: Any) -> None:
        raise AssertionError("the demo ran before its file was checked")

    monkeypatch.setattr("ibke_hf.app.demo.run_demo", work)
    (tmp_path / "file").write_text("")
    assert "there is no folder" in refused("demo", "--json", tmp_path / "file" / "scores.json")
    assert "is a folder; give the name of a file in it" in refused("demo", "--json", tmp_path)


def test_records_are_not_built_over_records(refused: Run, tmp_path: Path) -> None:
    facts, out = write_world(tmp_path / "facts", TWO_RELATIONS), tmp_path / "out"
    build = ["data", "build", "--facts", str(facts), "--out", str(out), "--records", "8"]
    assert main(build) == 0
    first = {file: file.read_text() for file in out.rglob("*.json")}
    assert "holds records, which would be lost; give another folder, or --force" in refused(*build, "--seed", 1)
    assert {file: file.read_text() for file in out.rglob("*.json")} == first
    assert main([*build, "--seed", "1", "--force"]) == 0
    assert {file: file.read_text() for file in out.rglob("*.json")} != first
    assert "more than 1,000 unlike records each" in refused(*build[:-1], 100000000, "--force")


@pytest.mark.parametrize("command", ["eval", "data"])
def test_a_second_process_is_refused(command: str, tmp_path: Path) -> None:
    facts, out = write_world(tmp_path / "facts", TWO_RELATIONS), tmp_path / "out"
    arguments = {
        "eval": ["eval", "--dataset", "atlas", "--limit", "2", "--editor", "none", "--out", str(out)],
        "data": ["data", "build", "--facts", str(facts), "--records", "8", "--out", str(out)],
    }[command]
    with locked(out):
        done = subprocess.run(
            [sys.executable, "-m", "ibke_hf.cli", *arguments], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{out}: another process is writing there; wait until it ends" in done.stderr
    assert not list(out.rglob("*.json*"))
