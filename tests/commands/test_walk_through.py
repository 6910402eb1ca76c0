"""The walk through of push and pull, run as it is written: commands and Python, against a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from paths import ROOT

from ibke_hf.cli import main

GUIDE = ROOT / "model_cards" / "PUBLISH.md"
SECTION = re.compile(r"<!-- walk through -->\n(.*?)<!-- end -->", re.S)
REPOSITORIES = {
    ("models", "me/geforce"),
    ("models", "me/food-editor"),
    ("datasets", "me/food-edits"),
    ("spaces", "me/edit_quality"),
    ("spaces", "me/ibke-editor"),
}


@pytest.mark.slow
def test_everything_that_is_pushed_is_pulled_again(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GUIDE.exists():
        pytest.skip("PUBLISH.md is not beside the tests")
    for module in ("datasets", "evaluate", "peft"):
        pytest.importorskip(module)
    section = SECTION.search(GUIDE.read_text(encoding="utf-8"))
    assert section is not None, "PUBLISH.md has no walk through"
    place = tmp_path / "clone"
    place.mkdir()
    for name in ("spaces", "ibke_hf"):
        (place / name).symlink_to(ROOT / name)
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", section[1], re.S)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python"]
    for kind, text in blocks:
        if kind == "python":
            run_python(text, tmp_path)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert set(hub.repositories) == REPOSITORIES
    assert (place / "edited-model" / "model.safetensors").exists()
    first, again = (
        json.loads((place / name / "results.json").read_text())["overall"] for name in ("food-results", "again")
    )
    assert first == again  # the pulled editor and records are those that were pushed


def run_python(text: str, folder: Path) -> None:
    """Run Python of the documentation as another machine would: with an empty cache, and the Hub to be asked."""
    file, home = folder / "pull.py", folder / "home"
    check = (
        "assert len(records) == 40 and metric.name and edit.ranks and type(editor).__name__ == 'IBKEEditor' "
        "and adapted.peft_config\n"
    )
    file.write_text(text + check, encoding="utf-8")
    places = {
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, **places, "HF_HUB_OFFLINE": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
