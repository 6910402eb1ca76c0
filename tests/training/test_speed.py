"""Training timed with a cache of activations and without, by `ibke train --measure`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_files import CITIES, write_records

from ibke_hf.cli import main


@pytest.fixture
def command(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> list[str]:
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    records = write_records(tmp_path / "train.json", CITIES[:4])
    options = {"--backbone": tmp_path / "backbone", "--records": records, "--latent-dim": 8, "--batch-size": 2}
    return ["train", *(str(word) for pair in options.items() for word in pair), "--layers", "1", "2"]


def test_a_measurement_says_the_speed_of_all_three_ways_and_leaves_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--measure", "2", "--activation-cache", str(tmp_path / "cache")]) == 0
    head, *lines, disk = capsys.readouterr().out.splitlines()
    assert head == "2 steps of 2 records, each run in all three ways:"
    assert [line.split("  ")[1] for line in lines] == ["without a cache", "while it is filled", "when it is filled"]
    assert all(re.search(r"[1-9]\S* records/s .* CPU s a step .* x$", line) for line in lines)
    assert re.search("[1-9] kB a record", disk)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_reads_no_activations_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serac = [*command[: command.index("--latent-dim")], "--kind", "serac"]
    for options in (["--measure", "2"], ["--activation-cache", str(tmp_path / "cache"), "--out", str(tmp_path / "o")]):
        assert main([*serac, *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == "ibke train: activation_cache holds what ibke and mend read; leave it out for serac"
