"""Seeded damage to every file that a command reads: a clear error or a result, no traceback, nothing hangs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from command_runs import PROMPT, TARGET
from fuzzing import Fuzz, damaged, damaged_copy
from small_world import TWO_RELATIONS, write_world

from ibke_hf.atlas import ASSETS

pytestmark = pytest.mark.slow
VALIDATION = ASSETS / "records" / "validation" / "art.json"


@pytest.mark.usefixtures("one_model")
@pytest.mark.parametrize("command", ["eval", "train"])
def test_record_files(command: str, fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    records = dict(list(json.loads((ASSETS / "records" / "test" / "art.json").read_text()).items())[:3])
    for index in range(150):
        file = tmp_path / "records.json"
        file.write_bytes(damaged(json.dumps(records).encode(), rng))
        if command == "eval":
            options = ["--dataset", file, "--editor", "none", "--model", store / "model", "--no-generate"]
        else:
            options = ["--records", file, "--backbone", store / "model", "--max-steps", 1]
        fuzz(command, *options, "--out", tmp_path / f"out{index}")


def test_tables_of_facts(fuzz: Fuzz, tmp_path: Path) -> None:
    rng, facts = random.Random(3), write_world(tmp_path / "facts", TWO_RELATIONS)
    for index in range(150):
        copy = damaged_copy(facts, tmp_path / "copy", rng)
        fuzz("data", "build", "--facts", copy, "--out", tmp_path / f"out{index}", "--records", 4)


def test_saved_edits(fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    for index in range(200):
        edit = damaged_copy(store / "edit", tmp_path / "edit", rng)
        out = tmp_path / f"out{index}"
        if rng.random() < 0.7:
            fuzz("merge", "--edit", edit, "--model", store / "model", "--out", out)
        else:
            fuzz("push", edit, "me/edit")
        shutil.rmtree(out, ignore_errors=True)


def test_models_and_editors(fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    for _ in range(150):
        kind = rng.choice(["model", "editor"])
        folder = damaged_copy(store / kind, tmp_path / kind, rng)
        folders = {"model": store / "model", "editor": store / "editor", kind: folder}
        options = [word for name, place in folders.items() for word in (f"--{name}", place)]
        if rng.random() < 0.8:
            fuzz("edit", "--prompt", PROMPT, "--target", TARGET, *options)
        else:
            fuzz(rng.choice(["card", "push"]), folder, *([] if rng.random() < 0.5 else ["me/x"]))


@pytest.mark.usefixtures("one_model")
def test_folders_of_tables(fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng, folder = random.Random(7), tmp_path / "table"
    options = ["--backbone", store / "model", "--datasets", VALIDATION, "--seeds", 1, "--limit", 1]
    fuzz("table", *options, "--editors", "none", "--out", folder)
    assert (folder / "table.json").exists()
    for _ in range(75):
        copy = damaged_copy(folder, tmp_path / "copy", rng, (".json", ".jsonl"))
        fuzz("table", "--merge", copy, "--out", tmp_path / "joined")
        shutil.rmtree(tmp_path / "joined", ignore_errors=True)


@pytest.mark.usefixtures("one_model")
def test_folders_of_results(fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng, folder = random.Random(8), tmp_path / "results"
    options = ["--dataset", VALIDATION, "--limit", 1, "--editor", "none", "--model", store / "model", "--no-generate"]
    fuzz("eval", *options, "--out", folder)
    assert (folder / "results.json").exists()
    shutil.copytree(store / "editor", tmp_path / "editor")
    for _ in range(75):
        copy = damaged_copy(folder, tmp_path / "copy", rng, (".json", ".jsonl"))
        fuzz("card", tmp_path / "editor", "--results", copy)
        fuzz("eval", *options, "--out", copy)
