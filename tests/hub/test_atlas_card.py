"""The card of Atlas: every figure of it is in a committed file, and it follows its files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_tables import body, markdown_rows

from ibke_hf.atlas import ASSETS
from ibke_hf.atlas.datasets import TRAINING_OPTIONS
from ibke_hf.atlas.editors import LOCALITY_FLOOR, STEP_FACTORS, TRAINING
from ibke_hf.atlas.report import SPLITS, markdown_table
from ibke_hf.data.build import GENERALITY, LOCALITY
from ibke_hf.evaluation.scores import REPORTED
from ibke_hf.hub.cards import atlas as atlas_module
from ibke_hf.hub.cards import render_card

Json = dict[str, Any]


@pytest.fixture
def results() -> Json:
    return json.loads((ASSETS / "results.json").read_text())


def test_both_forms_of_atlas_results_are_those_of_the_result_file(results: Json) -> None:
    files = render_card("atlas")
    expected = {
        (split, name): round(results["editors"]["ibke"][split][name], 2) for split in SPLITS for name in REPORTED
    }
    index = ModelCard(files["README.md"]).data.eval_results
    assert {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in index} == expected
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/atlas.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == {
        f"{split}_{name}": value for (split, name), value in expected.items()
    }
    for entry in entries:
        number = results["records"]["held_out" if entry.task_id.startswith("held_out") else "test"]
        how = "greedy generation" if entry.task_id.endswith("exact_match") else "teacher-forced"
        assert entry.notes == f"{number} records, one edit at a time, {how}"


def numbers_in(value: Any) -> set[str]:
    """Return every number of a JSON value, as a card may print it."""
    if isinstance(value, dict | list):
        return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {f"{value:g}", f"{value:,}", f"{value:.1f}", f"{value:.0f}"}


def test_every_figure_of_the_atlas_card_is_in_a_committed_file(results: Json) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", body(render_card("atlas")["README.md"]), flags=re.S)  # without code
    files = ["ibke/log.json", "ibke/config.json", "mend/log.json", "mend/config.json", "backbone/config.json"]
    known = numbers_in([results, *(json.loads((ASSETS / name).read_text()) for name in files)])
    known |= numbers_in(
        [list(STEP_FACTORS), LOCALITY_FLOOR, TRAINING_OPTIONS["shares"], 16, 1, 0]
    )  # 16 domains, weight 1, from 0
    known |= {f"{100 * value:g}" for value in TRAINING_OPTIONS.values() if isinstance(value, float)}
    text = re.sub(r"F1|f1|top1|top 1|1-N|_top1", "", text)
    figures = set(re.findall(r"\d[\d,]*(?:\.\d+)?(?<!,)", text))
    assert figures - known == set()
    assert markdown_table(results) in render_card("atlas")["README.md"]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the JSON of Atlas's assets, which the card is then made of."""
    for name in (
        "results.json",
        "ibke/log.json",
        "ibke/config.json",
        "mend/log.json",
        "mend/config.json",
        "backbone/config.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ASSETS / name, tmp_path / name)
    monkeypatch.setattr(atlas_module, "ASSETS", tmp_path)
    return tmp_path


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_atlas_card_follows_its_files(assets: Path, results: Json) -> None:
    test = results["editors"]["ibke"]["test"]
    test["reliability"] = 12.34
    test["by_criterion"]["locality"]["Same-Entity Reasoning"] |= {"score": 23.45, "top1": 23.45, "cases": 777}
    del test["by_criterion"]["generality"]["Relation Reverse"]
    change(assets / "results.json", **results)
    log = json.loads((assets / "ibke/log.json").read_text())
    settings = {**log["training"], "max_steps": 4321, "edits_per_group": 0, "sg_includes_edit": False}
    trials = [{"factor": 0.7, "reliability": 1.0, "generality": 1.0, "locality": 80.0, "avg": 1.0}]
    change(
        assets / "ibke/log.json", training=settings, step_size_trials=trials, report={**log["report"], "minutes": 12.3}
    )
    change(
        assets / "ibke/config.json",
        edited_layers=[2, 5],
        second_stage_heads=1,
        second_stage_mlp=0,
        second_stage_skip=False,
    )
    files = render_card("atlas")
    text = " ".join(files["README.md"].split())
    assert "value: 12.34" in text and "value: 12.34" in files[".eval_results/atlas.yaml"]
    heads, *rows = (row for row in markdown_rows(files["README.md"]) if len(row) == len(REPORTED) + 2)
    (row,) = (row for row in rows if row[:2] == ["IBKE (ours)", "test"])
    assert row[heads.index("Rel. top 1")] == "12.3"
    assert "keep their answer in 23.4 % of 777 cases" in text and "backwards" not in text
    assert "layers 2 and 5 of 6" in text and "4,321 steps" in text and "in 12 minutes" in text
    assert (
        f"{TRAINING['per_device_train_batch_size']} records edited jointly." in text
        and "one more generality case" not in text
    )
    assert "none of 1, 0.95" in text and "multiplied by 0.7" in text
    assert "So is the second stage." in text


def test_the_atlas_card_says_whether_mend_is_a_fair_rival(assets: Path) -> None:
    log, config = (json.loads((assets / "ibke" / name).read_text()) for name in ("log.json", "config.json"))
    change(assets / "mend/log.json", training=log["training"], records=log["records"])
    change(assets / "mend/config.json", edited_layers=config["edited_layers"])
    assert "MEND was trained by the same recipe" in " ".join(render_card("atlas")["README.md"].split())
    change(assets / "mend/log.json", training={**log["training"], "max_steps": 7})
    assert "another run (7 steps" in " ".join(render_card("atlas")["README.md"].split())


def test_a_recipe_of_the_records_without_words_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"generality": {"reverse": 0.25}, "locality": {"same_entity": 6.5}}
    monkeypatch.setattr(atlas_module, "TRAINING_OPTIONS", {"near_rate": 0.25, "shares": shares})
    text = " ".join(render_card("atlas")["README.md"].split())
    assert "25 % of the locality cases about the edited relation" in text and "made-up name" not in text
    assert "1 unless said: the relation backwards 0.25 for generality, Yes or No 6.5 for locality." in text
    assert set(atlas_module.KINDS) == {*GENERALITY, *LOCALITY}
    monkeypatch.setattr(atlas_module, "TRAINING_OPTIONS", {"moon_rate": 0.25})
    with pytest.raises(KeyError, match="moon_rate"):
        render_card("atlas")
