"""The committed assets of Atlas: what they hold, what they reach, and that their recipes run."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

from ibke_hf.atlas import ASSETS, FACTS, load_backbone, load_editor, load_records, load_split
from ibke_hf.atlas.editors import (
    IBKE_OPTIONS,
    LAYERS,
    LOCALITY_FLOOR,
    STEP_FACTORS,
    TRAINING,
    train_atlas_editor,
)
from ibke_hf.atlas.examples import CONSEQUENCES, example_records
from ibke_hf.atlas.near import near_records
from ibke_hf.atlas.report import NAMES, SPLITS, atlas_editors, compare_editors, keep_near, markdown_table
from ibke_hf.atlas.splits import HELD_OUT_DOMAINS, RECORDS
from ibke_hf.cli import main
from ibke_hf.core.records import subject_key
from ibke_hf.data.sources import read_records
from ibke_hf.evaluation.scores import REPORTED
from ibke_hf.training.strength import choose_strength

MEGABYTE = 1e6


def test_assets_are_small_and_hold_safetensors_only() -> None:
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32 * MEGABYTE
    assert {file.suffix for file in files} <= {".json", ".safetensors"}


def test_backbone_is_what_was_promised() -> None:
    model, tokenizer = load_backbone()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not model.training
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert len(tokenizer) == 4096
    assert model.config.max_position_embeddings == 512
    report = json.loads((ASSETS / "backbone" / "examination.json").read_text())
    assert report["single_hop"] >= 97
    assert report["two_hop_taught"] >= 80
    assert report["minutes"] <= 60


def test_evaluation_sets_are_complete_and_apart() -> None:
    split = load_split()
    heads = {name: {record.requests[0].subject for record in load_records(name)} for name in RECORDS}
    trained = {t.subject for t in (*split.counterfactual["train"], *split.unknown["train"])}
    for name, number in RECORDS.items():
        records = load_records(name)
        assert len(records) == number
        assert sum(record.kind == "unknown" for record in records) == number / 2
        assert not heads[name] & trained
    assert not heads["test"] & heads["validation"]
    assert {record.domain for record in load_records("held_out")} == set(HELD_OUT_DOMAINS)
    assert not {record.domain for record in load_records("test")} & set(HELD_OUT_DOMAINS)


def test_evaluation_records_are_rebuilt_byte_by_byte(tmp_path: Path) -> None:
    assert main(["atlas", "build-data", "--out", str(tmp_path)]) == 0
    for name in RECORDS:
        for file in (tmp_path / name).iterdir():
            assert file.read_bytes() == (ASSETS / "records" / name / file.name).read_bytes(), (
                f"{name}/{file.name} differs"
            )


def test_training_records_for_another_backbone_are_of_the_train_side(tmp_path: Path, capsys) -> None:
    command = ["atlas", "build-data", "--training", "60", "--generality", "2", "--locality", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    records = list(read_records(tmp_path))
    assert len(records) == 60 and {len(record.locality) for record in records} <= {0, 1}
    split = load_split()
    trained = {subject_key(t.subject) for t in (*split.counterfactual["train"], *split.unknown["train"])}
    assert {subject for record in records for subject in record.subjects} <= trained
    assert main(command) == 2
    assert "say where to with --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ibke", "mend"])
def test_editors_load_and_edit(name: str) -> None:
    model, tokenizer = load_backbone()
    editor = load_editor(name)
    assert editor.is_calibrated
    record = load_records("test")[0]
    edit = editor.edit(model, tokenizer, record.requests)
    assert all(torch.isfinite(t).all() for t in (*edit.inputs.values(), *edit.outputs.values()))


def test_editors_are_of_about_the_same_size_and_trained_within_an_hour() -> None:
    logs = [json.loads((ASSETS / name / "log.json").read_text()) for name in ("ibke", "mend")]
    sizes = [log["report"]["parameters"] for log in logs]
    assert max(sizes) / min(sizes) < 1.1
    assert all(log["report"]["minutes"] <= 60 for log in logs)


def test_the_shipped_editor_is_the_recipes() -> None:
    log = json.loads((ASSETS / "ibke" / "log.json").read_text())
    assert log["training"] == TRAINING
    assert log["records"] == inspect.signature(train_atlas_editor).parameters["records"].default
    assert log["step_size_trials"][-1]["locality"] >= LOCALITY_FLOOR
    config = load_editor().config
    assert config.edited_layers == LAYERS
    assert {name: getattr(config, name) for name in IBKE_OPTIONS} == IBKE_OPTIONS


def test_mend_was_trained_by_the_same_recipe() -> None:
    ibke, mend = (json.loads((ASSETS / name / "log.json").read_text()) for name in ("ibke", "mend"))
    for what in ("training", "records", "seed", "options"):
        assert mend[what] == ibke[what]
    assert mend["history"][-1]["step"] == ibke["history"][-1]["step"] == TRAINING["max_steps"]
    assert load_editor("mend").config.edited_layers == LAYERS


def test_near_cases_ask_in_the_words_of_the_edit_about_what_keeps_its_old_object() -> None:
    split, records = load_split(), load_records("test")
    near = near_records(split, records)
    originals = {record.id: record for record in records}
    assert near == near_records(split, records)
    assert len(near) >= 100
    for record in near:
        before = originals[record.id]
        request = record.requests[0]
        assert (record.requests, record.generality) == (before.requests, ())
        assert 1 <= len({case.prompt for case in record.locality}) == len(record.locality) <= 3
        for case in record.locality:
            subject = next(
                name for name in split.taught.entities if request.prompt.replace(request.subject, name) == case.prompt
            )
            assert subject != request.subject
            assert case.target == before.metadata["original"] != request.target
            assert any(t.object == case.target for t in split.taught.by_subject[subject])


def test_committed_results_reach_what_the_card_says() -> None:
    results = json.loads((ASSETS / "results.json").read_text())["editors"]
    test, rephrase = results["ibke"]["test"], results["ibke"]["test"]["by_criterion"]["generality"]["Rephrase"]
    assert test["reliability"] >= 97
    assert test["generality"] >= max(92, results["ft"]["test"]["generality"] + 10)
    assert test["locality"] >= 96.5
    assert test["generality_top1"] >= 75
    assert rephrase["top1"] >= 90
    assert test["by_hops"]["generality"]["2"]["top1"] >= 55
    assert results["ibke"]["held_out"]["avg"] >= 90


@pytest.mark.parametrize(
    ("locality", "chosen"),
    [(lambda factor: 97.5, 1.0), (lambda factor: 99 - 2.2 * factor, 0.9), (lambda factor: 90 - factor, 0.7)],
)
def test_the_step_size_is_the_largest_that_keeps_locality(
    locality: Any, chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = load_editor()
    trained = editor.step_sizes.detach().clone()

    def evaluated(scaled_editor: Any, *_: Any, **__: Any) -> Any:
        factor = float((scaled_editor.step_sizes.detach() / trained).mean())
        scores = {"reliability": 95.0, "generality": 90.0, "locality": locality(factor), "avg": locality(factor)}
        return SimpleNamespace(summary=scores)

    monkeypatch.setattr("ibke_hf.training.strength.evaluate_records", evaluated)
    trials = choose_strength(editor, *load_backbone(), [], STEP_FACTORS, LOCALITY_FLOOR)
    assert trials[-1]["factor"] == chosen
    torch.testing.assert_close(editor.step_sizes.detach(), chosen * trained)
    assert [trial["factor"] for trial in trials][: len(STEP_FACTORS)] == [
        factor for factor in STEP_FACTORS if factor >= chosen
    ]


def test_examples_use_unseen_subjects() -> None:
    split = load_split()
    trained = {t.subject for t in (*split.counterfactual["train"], *split.unknown["train"])}
    for record in example_records():
        assert record.requests[0].subject not in trained
        assert len(record.generality) > CONSEQUENCES


def test_the_page_quotes_the_committed_results() -> None:
    page = ROOT / "model_cards" / "atlas" / "TABLE.md"
    results = json.loads((ASSETS / "results.json").read_text())
    table = page.read_text().partition("<!-- results -->")[2].partition("<!-- end -->")[0]
    assert table.strip() == markdown_table(results)


@pytest.mark.slow
def test_committed_results_come_from_the_committed_weights() -> None:
    model, tokenizer = load_backbone()
    editors = atlas_editors()
    assert tuple(editors) == NAMES
    sets = {split: load_records(split) for split in SPLITS}
    committed = json.loads((ASSETS / "results.json").read_text())
    assert committed["records"] == {"test": 500, "held_out": 300}
    comparison = compare_editors({name: editors[name] for name in ("none", "mend", "ibke")}, model, tokenizer, sets)
    for name, splits in comparison.items():
        for split, scores in splits.items():
            for score in REPORTED:
                assert scores[score] == pytest.approx(committed["editors"][name][split][score], abs=0.5), (
                    name,
                    split,
                    score,
                )
    near = keep_near({"ibke": editors["ibke"]}, model, tokenizer, sets["test"])
    assert {what: near[what] for what in ("records", "cases")} == {
        what: committed["near"][what] for what in ("records", "cases")
    }
    assert near["editors"]["ibke"] == pytest.approx(committed["near"]["editors"]["ibke"], abs=0.5)


@pytest.mark.slow
def test_recipes_run_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ibke_hf.atlas.backbone.examine", lambda *_: {}
    )  # the examination of the shipped weights is committed
    few = load_records("validation")[:30]
    monkeypatch.setattr("ibke_hf.atlas.editors.load_records", lambda *_: few)
    assert (
        main(["atlas", "build-backbone", "--out", str(tmp_path / "backbone"), "--epochs", "1", "--max-steps", "3"])
        == 0
    )
    assert json.loads((tmp_path / "backbone" / "examination.json").read_text())["steps"] == 3
    for command, name in (("train-editor", "ibke"), ("train-mend", "mend")):
        assert main(["atlas", command, "--out", str(tmp_path / name), "--max-steps", "3", "--records", "60"]) == 0
        assert (tmp_path / name / "model.safetensors").exists()
        assert json.loads((tmp_path / name / "log.json").read_text())["training"]["max_steps"] == 3


def test_facts_hold_a_second_reading_of_every_table() -> None:
    for folder in FACTS.iterdir():
        assert (folder / "review.md").read_text().startswith("# Second reading")
