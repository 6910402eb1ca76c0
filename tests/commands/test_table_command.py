"""`ibke table` from the command line: all editors on any backbone, and bad input named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import scores
from record_files import CITIES, write_records

from ibke_hf.cli import main
from ibke_hf.commands.table import _with_projections
from ibke_hf.editors.catalogue import KINDS, TRAINED


@pytest.fixture
def files(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, str]:
    """A backbone, records to train on and to ask, a corpus and settings, as files."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    (tmp_path / "corpus.txt").write_text("\n".join(f"{city} is a city in Europe." for city in CITIES) + "\n")
    (tmp_path / "table.yaml").write_text("""
layers: [1]
editors:
  ibke: {latent_dim: 8, latent_length: 2}
  mend: {hidden_dim: 4}
  serac: {embedding_dim: 8}
  ft: {steps: 2, learning_rate: 1e-3}
  rome: {steps: 2, prefixes: 0}
  alphaedit: {steps: 2, prefixes: 0}
  grace: {steps: 2}
  t_patcher: {steps: 2, memory_size: 16}
  lemoe: {steps: 2, expert_width: 4}
training: {use_cpu: true, disable_tqdm: true, per_device_train_batch_size: 2}
""")
    return {
        "backbone": str(tmp_path / "backbone"),
        "train": write_records(tmp_path / "train.json", CITIES[:4]),
        "asked": write_records(tmp_path / "asked.json", CITIES[4:]),
        "corpus": str(tmp_path / "corpus.txt"),
        "config": str(tmp_path / "table.yaml"),
        "out": str(tmp_path / "table"),
    }


def command_for(files: dict[str, str]) -> list[str]:
    """A whole table of two records, with editors trained for two steps."""
    return [
        "table",
        "--backbone",
        files["backbone"],
        "--datasets",
        files["asked"],
        "--records",
        files["train"],
        "--steps",
        "2",
        "--seeds",
        "1",
        "--limit",
        "2",
        "--corpus",
        files["corpus"],
        "--config",
        files["config"],
        "--out",
        files["out"],
    ]


def test_all_editors_on_any_backbone(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = command_for(files)
    assert main(command) == 0
    printed, out = capsys.readouterr().out, Path(files["out"])
    cells = json.loads((out / "table.json").read_text())
    assert [cell["editor"] for cell in cells] == [name for name, kind in KINDS.items() if not kind.variant_of]
    assert all(kind.title in printed for kind in KINDS.values() if not kind.variant_of)
    assert sorted(file.name for file in out.iterdir() if file.is_file()) == [
        ".lock",
        "plan.json",
        "settings.json",
        "table.csv",
        "table.html",
        "table.json",
        "table.md",
        "trade_off.svg",
    ]
    assert {folder.name for folder in (out / "editors").iterdir() if folder.is_dir()} == {
        f"{name}-0" for name in TRAINED
    }
    stamps = {file: file.stat().st_mtime_ns for file in out.glob("*/*/*.safetensors")}
    assert main(command) == 0  # nothing is trained or made again
    assert stamps == {file: file.stat().st_mtime_ns for file in out.glob("*/*/*.safetensors")}
    capsys.readouterr()
    command_of_trained = [
        *command[:3],
        "--datasets",
        files["asked"],
        "--editors",
        f"serac={out / 'editors' / 'serac-0'}",
        "none",
        "--limit",
        "2",
    ]
    assert main([*command_of_trained, "--out", str(tmp_path / "trained")]) == 0
    again = json.loads((tmp_path / "trained" / "table.json").read_text())
    assert scores(cell for cell in again if cell["seed"] == 0) == scores(
        cell for cell in cells if cell["editor"] in ("none", "serac")
    )


def test_a_column_has_a_name_of_its_own_and_several_sources(files: dict[str, str], tmp_path: Path) -> None:
    column = f"cities={files['asked']}[:1],{files['train']}[1:]"
    command = [*command_for(files)[:3], "--editors", "none", "--seeds", "1", "--limit", "9", "--datasets"]
    assert main([*command, column, "--out", str(tmp_path / "out")]) == 0
    (cell,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert cell["split"] == "cities"
    assert cell["records"] == 4
    assert "cities" in (tmp_path / "out" / "table.md").read_text()
    assert main([*command, f"cities={files['asked']}", "--out", str(tmp_path / "out")]) == 2  # of other records
    assert main([*command, "cities=", "--out", str(tmp_path / "none")]) == 2


def test_named_projections_reach_every_editor_that_edits_some() -> None:
    config = {"ft": {"steps": 2}, "grace": {"edited_modules": "other.{i}"}, "serac": {"embedding_dim": 8}}
    fields = _with_projections(config, "named.{i}")
    templates = {name: of_one.get("edited_modules") for name, of_one in fields.items()}
    assert templates.pop("grace") == "other.{i}"
    assert templates.pop("none") is templates.pop("serac") is None
    assert set(templates.values()) == {"named.{i}"}
    assert (fields["ft"]["steps"], fields["serac"]) == (2, {"embedding_dim": 8})
    assert _with_projections(config, None) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editors", "ft=x"], "--editors ft=x: only serac, mend, ibke_paper, ibke have weights"),
        (["--editors", "rom"], "no editor 'rom'"),
        (["--corpus", "x"], "--corpus: atlas has its own"),
        (["--edited-modules", "x"], "--edited-modules: atlas has its own"),
        (["--backbone", "b"], "--datasets: name at least one"),
        (["--merge", "nowhere"], r"nowhere: holds no settings\.json"),
        (["--datasets", "tset"], "the splits are test, held_out and validation"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ibke table: ")
    assert re.search(message, error), error
