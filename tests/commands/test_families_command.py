"""`ibke families` on its own, and the option that an ambiguous backbone asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibke_hf.cli import build_parser, main
from ibke_hf.commands.train import resuming


def test_one_family_is_tried_and_written(tmp_path: Path) -> None:
    assert main(["families", "--families", "llama", "--out", str(tmp_path / "status")]) == 0
    row = json.loads((tmp_path / "status" / "families.json").read_text())["families"]["llama"]
    assert row["projection"] == "model.layers.{i}.mlp.down_proj"
    assert row["batched"] is True
    assert "| llama " in (tmp_path / "status" / "FAMILIES.md").read_text()


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--families", "lama"]) == 2
    assert capsys.readouterr().err == (
        "ibke families: --families lama: transformers has no decoder of this model type\n"
    )


def test_the_projection_to_edit_can_be_named_and_is_kept_on_going_on() -> None:
    name = "model.layers.{i}.self_attn.o_proj"
    options = build_parser().parse_args(["train", "--edited-modules", name])
    assert f"--edited-modules '{name}'" in resuming(options)
