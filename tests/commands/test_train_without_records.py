"""`ibke train` without records: those that ship with the package, and settings that suit any backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_files import CITIES, write_records

from ibke_hf.atlas import load_records
from ibke_hf.atlas.splits import HELD_OUT_DOMAINS
from ibke_hf.atlas.starter import starter_settings
from ibke_hf.cli import build_parser, main
from ibke_hf.commands.train import _settings, resuming
from ibke_hf.data.sources import read_records
from ibke_hf.data.subjects import edited_subjects
from ibke_hf.loading import load_editor


def settings_of(*flags: str) -> tuple[Any, bool]:
    return _settings(build_parser().parse_args(["train", *flags]))


def test_one_command_makes_an_editor_and_goes_on_with_the_same_records(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "editor"
    held = write_records(tmp_path / "held.json", CITIES[4:])  # 300 would take long here
    command = ["train", "--backbone", str(tmp_path / "model"), "--out", str(out), "--latent-dim", "10"]
    command += ["--batch-size", "2", "--validation", held]
    assert main([*command, "--max-steps", "20"]) == 0
    said = capsys.readouterr()
    assert "40 edits of plain facts in English, in 13 domains" in said.out and "Ctrl-C saves one" in said.out
    assert "step 11 of 20" in said.err and "to go" in said.err
    records = sorted((out / "starter_records").rglob("*.json"))
    before = {path: path.read_bytes() for path in records}
    train = list(read_records(str(out / "starter_records" / "train")))
    assert len(train) == 40 and not {record.domain for record in train} & {*HELD_OUT_DOMAINS}
    evaluated = {
        request.subject
        for split in ("test", "held_out", "validation")
        for record in load_records(split)
        for request in record.requests
    }
    assert not edited_subjects([str(out / "starter_records" / "train")]) & {
        subject.casefold() for subject in evaluated if subject
    }
    config = load_editor(out).config
    assert (config.latent_dim, config.second_stage_heads, config.second_stage_mlp) == (10, 2, 20)
    assert main([*command, "--max-steps", "24", "--resume"]) == 0
    assert {path: path.read_bytes() for path in sorted((out / "starter_records").rglob("*.json"))} == before
    log = json.loads((out / "training.json").read_text())
    assert log["report"]["steps"] == 24 and log["settings"]["training"]["lr_scheduler_type"] == "cosine"


def test_flags_and_the_file_win_over_the_defaults(tmp_path: Path) -> None:
    settings, ships = settings_of("--backbone", "b", "--out", "o")
    assert ships and settings.records == ["o/starter_records/train"] and settings.fit_width
    assert settings.chooses_step_size and settings.save_dtype == "float16"
    assert settings.training["edits_per_group"] == 1 and settings.training["max_steps"] == 3000
    file = tmp_path / "s.yaml"
    file.write_text(
        "training: {beta: 0.2, learning_rate: 1e-3}\neditor: {second_stage_heads: 1}\nsave_dtype: float32\n"
    )
    flags = ["--config", str(file), "--learning-rate", "2e-3", "--no-choose-step-size", "--epochs", "2"]
    settings, ships = settings_of("--backbone", "b", "--out", "o", *flags)
    assert ships and (settings.training["beta"], settings.training["learning_rate"]) == (0.2, 2e-3)
    assert settings.editor["second_stage_heads"] == 1 and settings.editor["latent_length"] == 10
    assert settings.save_dtype == "float32" and not settings.chooses_step_size
    assert "max_steps" not in settings.training and settings.training["num_train_epochs"] == 2
    settings, ships = settings_of("--backbone", "b", "--out", "o", "--records", "r")
    assert not ships and settings.training == settings.editor == {} and settings.save_dtype == "float32"


def test_other_kinds_have_defaults_too() -> None:
    assert starter_settings({"kind": "mend"})["editor"] == {"initial_edit_ratio": 0.1}
    assert starter_settings({"kind": "serac"})["training"]["learning_rate"] == 2e-3


def test_a_folder_that_is_refused_gets_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["train", "--backbone", "ibke-atlas", "--out", str(tmp_path)]) == 2
    assert "holds thesis.tex" in capsys.readouterr().err
    assert not (tmp_path / "starter_records").exists()


def test_the_line_that_goes_on_repeats_how_prompts_are_put() -> None:
    flags = ["--chat", "--chat-options", "a=1", "--leading-space", "auto", "--no-choose-step-size"]
    line = resuming(build_parser().parse_args(["train", "--out", "o", *flags]))
    again = "--no-choose-step-size --chat --chat-options '{\"a\": 1}' --leading-space auto --resume"
    assert line == f"ibke train --out o {again}"
