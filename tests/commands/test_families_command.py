"""`ibke families` on its own, and the option that an ambiguous backbone asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibke_hf.benchmark.families import _circumstances, merged, status_beside
from ibke_hf.cli import build_parser, main
from ibke_hf.commands.train import resuming


def test_one_family_is_tried_and_written(tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    other = {"class": "GPT2LMHeadModel", "not_tried": "kept as it was"}
    (tmp_path / "status" / "families.json").write_text(json.dumps({**_circumstances(), "families": {"gpt2": other}}))
    assert main(["families", "--families", "llama", "--out", str(tmp_path / "status")]) == 0
    rows = json.loads((tmp_path / "status" / "families.json").read_text())["families"]
    assert rows["gpt2"] == other
    row = rows["llama"]
    assert row["projection"] == "model.layers.{i}.mlp.down_proj"
    assert row["batched"] is True
    assert "| llama " in (tmp_path / "status" / "FAMILIES.md").read_text()


def test_some_families_are_renewed_in_a_status_and_the_others_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {**_circumstances(), "families": {"llama": {"class": "old", "not_tried": "x"}, "gpt2": {"kept": True}}}
    (tmp_path / "families.json").write_text(json.dumps(status))
    newer = {**status, "families": {"llama": {"class": "new"}, "bloom": {"class": "added"}}}
    assert merged(status_beside(tmp_path) or {}, newer)["families"] == {
        "bloom": {"class": "added"},
        "gpt2": {"kept": True},
        "llama": {"class": "new"},
    }
    (tmp_path / "families.json").write_text(json.dumps({**status, "torch": "1.0"}))
    assert main(["families", "--families", "llama", "--out", str(tmp_path)]) == 2
    assert "was written with torch 1.0" in capsys.readouterr().err
    assert status_beside(tmp_path / "other") is None


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--families", "lama"]) == 2
    assert capsys.readouterr().err == (
        "ibke families: --families lama: transformers has no decoder of this model type\n"
    )


def test_the_projection_to_edit_can_be_named_and_is_kept_on_going_on() -> None:
    name = "model.layers.{i}.self_attn.o_proj"
    options = build_parser().parse_args(["train", "--edited-modules", name])
    assert f"--edited-modules '{name}'" in resuming(options)
