"""The measurement of the paper's backbones, at toy size on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ibke_hf.benchmark.paper_backbones import measure_paper_backbones, needs_of, roofline
from ibke_hf.cli import main
from ibke_hf.core.configuration_ibke import PRESETS


def test_the_command_measures_all_four_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "paper.json"
    assert main(["bench", "paper", "--small", "--device", "cpu", "--runs", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert [entry["backbone"] for entry in written["backbones"]] == list(PRESETS) and len(written["backbones"]) == 4
    assert written["command"].startswith("ibke bench paper --small") and written["machine"] and written["versions"]
    for entry in written["backbones"]:
        for name in ("edit_seconds", "step_seconds", "peak_bytes", "edit_share_of_roofline", "step_share_of_roofline"):
            assert entry[name] > 0 and math.isfinite(entry[name]), (entry["backbone"], name)
        assert entry["step_seconds"] > entry["edit_seconds"] and entry["edit_share_of_roofline"] < 1
        assert entry["peak_bytes"] == pytest.approx(entry["planned_bytes"], rel=0.4)  # at toy size mask and ids count
    assert "openai-community/gpt2-xl" in capsys.readouterr().out


def test_true_dimensions_are_the_papers_and_time_is_kept() -> None:
    needs, _ = needs_of("Qwen/Qwen3-8B")
    assert needs.dtype == "float16" and needs.config.capture_loss_scale == 1024
    assert 8e9 < needs.backbone_parameters < 8.3e9 and needs.config.edited_layers == [6, 7, 8]
    results = list(measure_paper_backbones("cpu", small=True, minutes=0, runs=1))
    assert "step_seconds" in results[0] and all("no time" in entry["left_out"] for entry in results[1:])


def test_a_roofline_bounds_from_both_sides() -> None:
    roof = roofline(torch.device("cpu"), torch.float32)
    assert roof.seconds(roof.flops, 0) == 1 == roof.seconds(0, roof.bandwidth)
