"""`ibke tune`: settings of any model's editors, tried on validation records, and what `ibke table` takes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ibke_hf.atlas import ASSETS
from ibke_hf.benchmark.tuning import TRIALS_FOR_ANY, best_of
from ibke_hf.cli import main
from ibke_hf.editors.catalogue import WITHOUT_WEIGHTS, editor_class
from ibke_hf.io import read_json, read_json_list
from ibke_hf.training.settings import editor_fields

BACKBONE, RECORDS = str(ASSETS / "backbone"), str(ASSETS / "records" / "validation")
COMMAND = ["tune", "--backbone", BACKBONE, "--records", RECORDS]
TRIALS = {"grace": [{"layers": [2], "initial_radius": 0.75}, {"layers": [0], "initial_radius": 0.1}]}


@pytest.fixture
def trials(tmp_path: Path) -> str:
    (tmp_path / "trials.yaml").write_text(yaml.safe_dump(TRIALS))
    return str(tmp_path / "trials.yaml")


def test_every_editor_without_weights_has_as_many_trials_of_fields_that_it_has() -> None:
    assert set(TRIALS_FOR_ANY) == set(WITHOUT_WEIGHTS)
    for name, settings in TRIALS_FOR_ANY.items():
        assert len(settings) == 4 and editor_class(name)
        assert len({str(one) for one in settings}) == 4
        for one in settings:
            editor_fields(one, name, name)


def test_the_best_of_the_trials_goes_into_a_table(trials: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "tuned"
    command = [*COMMAND, "--limit", "3", "--editors", "grace", "--trials", trials, "--out", str(out)]
    assert main(command) == 0
    made = read_json(out / "trials.json")["edits"]["1"]["grace"]
    assert [trial["settings"] for trial in made] == TRIALS["grace"]
    assert made[0]["avg"] != made[1]["avg"]
    best = best_of(made)["settings"]
    assert yaml.safe_load((out / "table.yaml").read_text()) == {"editors": {"grace": best}}
    before = (out / "trials.json").read_bytes()
    assert main(command) == 0  # nothing is tried again
    assert (out / "trials.json").read_bytes() == before
    table = ["table", "--backbone", BACKBONE, "--datasets", RECORDS, "--editors", "grace", "--limit", "2", "--seeds"]
    assert main([*table, "1", "--config", str(out / "table.yaml"), "--out", str(tmp_path / "table")]) == 0
    assert read_json_list(tmp_path / "table" / "table.json")[0]["editor"] == "grace"


@pytest.mark.parametrize(
    ("content", "editors", "what"),
    [
        ("grace: []", ["grace"], "has no settings to try of grace"),
        ("grace: {initial_radius: 1}", ["grace"], "grace: must be a list of settings"),
        ("grace: [{radius: 1}]", ["grace"], "trial 0 of grace"),
        ("mend: [{}]", ["grace"], "mend"),
        ("rome: [{}]", ["rome"], "rome measure the model's keys on texts: give them with --corpus"),
    ],
)
def test_what_cannot_be_tried_is_named_before_anything_is_loaded(
    content: str, editors: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "trials.yaml").write_text(content)
    command = ["tune", "--backbone", "no/model", "--records", "none", "--editors", *editors]
    assert main([*command, "--trials", str(tmp_path / "trials.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
