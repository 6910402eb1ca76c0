"""`ibke demo` end to end on few records."""

import json
from pathlib import Path

import pytest

from ibke_hf.atlas.report import SPLITS
from ibke_hf.cli import main
from ibke_hf.evaluation.scores import REPORTED


@pytest.mark.slow
def test_demo_shows_edits_and_writes_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--records", "6", "--json", str(tmp_path / "demo.json")]) == 0
    printed = capsys.readouterr().out
    assert "a counterfactual edit" in printed
    assert "an edit that states an unknown fact" in printed
    report = json.loads((tmp_path / "demo.json").read_text())
    assert set(report) == {"editors", "edit_seconds", "forward_seconds", "edit_bytes", "records"}
    assert report["records"] == {"test": 6, "held_out": 6}
    for name in ("none", "ft", "mend", "ibke"):
        for split in SPLITS:
            assert set(report["editors"][name][split]) == {*REPORTED, "by_criterion", "by_hops"}
    assert report["editors"]["none"]["test"]["locality"] == 100
    assert report["editors"]["ibke"]["test"]["reliability"] > report["editors"]["none"]["test"]["reliability"]
    assert 0 < report["forward_seconds"] < report["edit_seconds"]
    assert report["edit_bytes"] > 0


def test_demo_refuses_a_negative_number_of_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--records", "-1"]) == 2
    assert "--records" in capsys.readouterr().err
