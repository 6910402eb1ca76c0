"""The metric as a Space: loaded by its id where this package is not installed, with the package's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from judged_columns import GOOD
from loopback_hub import LoopbackHub
from paths import ROOT

from ibke_hf.cli import main
from ibke_hf.evaluation import load_metric, scores
from ibke_hf.evaluation.space import write_metric

SCORE = """
import json, sys
sys.modules["ibke_hf"] = None  # not installed here
import evaluate
metric = evaluate.load(sys.argv[1])
print(json.dumps(metric.compute(**json.loads(sys.argv[2]))))
"""


def scored(where: str, home: Path, **environment: str) -> dict[str, object]:
    env = {**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **environment}
    run = subprocess.run(
        [sys.executable, "-c", SCORE, where, json.dumps(GOOD)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    printed: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return printed


def test_the_formulas_are_the_packages(tmp_path: Path) -> None:
    wrapper, formulas = write_metric(tmp_path)
    assert formulas.read_text() == Path(scores.__file__).read_text()
    assert "ibke_hf.evaluation.scores import" not in wrapper.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"edit_quality.py", "scores.py"}


@pytest.mark.slow
def test_loads_from_a_space_without_the_package(hub: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    expected = json.loads(json.dumps(load_metric(cache_dir=str(tmp_path / "cache")).compute(**GOOD)))
    write_metric(tmp_path / "edit_quality")
    assert scored(str(tmp_path / "edit_quality"), tmp_path / "home") == expected
    assert main(["spaces", "push", str(ROOT / "spaces" / "edit_quality"), "someone/edit_quality"]) == 0
    assert (
        scored(
            "someone/edit_quality", tmp_path / "other", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1"
        )
        == expected
    )
