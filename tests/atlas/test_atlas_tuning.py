"""The hyper-parameters of the editors without weights: chosen by equally many trials, committed, loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ibke_hf.atlas import ASSETS, HYPER_PARAMETERS, RIVALS, atlas_statistics, load_backbone, load_records, load_rival
from ibke_hf.atlas.editors import LAYERS
from ibke_hf.atlas.tuning import TRIALS, TRIALS_FILE, TUNING_RECORDS, best_of, tune
from ibke_hf.core.layers import layers_to_edit, modules_to_edit
from ibke_hf.editors.catalogue import TRAINED, editor_class
from ibke_hf.editors.locate.key_statistics import KeyStatistics


def committed(file: str) -> Any:
    return json.loads((ASSETS / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def backbone() -> tuple[Any, Any]:
    return load_backbone()


@pytest.fixture(scope="module")
def statistics(backbone: tuple[Any, Any]) -> KeyStatistics:
    """Statistics that fit the backbone, of a few texts: measuring the corpus takes a minute."""
    model, tokenizer = backbone
    texts = [f"{record.requests[0].prompt} {record.requests[0].target}" for record in load_records("validation")[:100]]
    return KeyStatistics.of(model, tokenizer, texts, range(6), progress=False)


# --- what is committed ---


def test_every_editor_without_weights_has_four_trials_of_different_settings() -> None:
    assert set(RIVALS) == set(TRIALS) == set(committed(TRIALS_FILE)["editors"])
    assert not set(RIVALS) & set(TRAINED)
    for name, trials in TRIALS.items():
        assert len({json.dumps(settings, sort_keys=True) for settings in trials}) == len(trials) == 4, name


@pytest.mark.parametrize("name", RIVALS)
def test_the_committed_trials_are_those_of_the_code_and_the_choice_is_the_best_of_them(name: str) -> None:
    report = committed(TRIALS_FILE)
    trials = report["editors"][name]
    assert report["records"] == TUNING_RECORDS == 100
    assert [trial["settings"] for trial in trials] == [dict(settings) for settings in TRIALS[name]]
    assert committed(HYPER_PARAMETERS)[name] == max(trials, key=lambda trial: trial["avg"])["settings"]
    for trial in trials:
        assert set(trial) == {"settings", "reliability", "counterfactual_reliability", "generality", "locality", "avg"}
        assert trial["avg"] == pytest.approx((trial["reliability"] + trial["generality"] + trial["locality"]) / 3)
        assert all(0 <= score <= 100 for score in list(trial.values())[1:])


@pytest.mark.parametrize("name", RIVALS)
def test_the_chosen_settings_make_edits_that_contradict_the_model(name: str) -> None:
    """What an editor's row of the table rests on: a baseline that does not edit is no baseline."""
    chosen = best_of(committed(TRIALS_FILE)["editors"][name])
    assert chosen["counterfactual_reliability"] >= 95 - 1e-9, chosen


def test_fine_tuning_keeps_its_choice() -> None:
    assert committed(HYPER_PARAMETERS)["ft"] == {"layers": LAYERS, "learning_rate": 3e-3}


# --- loading ---


@pytest.mark.parametrize("name", RIVALS)
def test_an_editor_loads_with_its_committed_hyper_parameters_and_edits(
    name: str, backbone: tuple[Any, Any], statistics: KeyStatistics
) -> None:
    model, tokenizer = backbone
    editor = load_rival(name, model, statistics)
    assert type(editor) is editor_class(name)
    config, wanted = asdict(editor.config), committed(HYPER_PARAMETERS)[name]
    layers = wanted.pop("layers")
    template, _ = layers_to_edit(model, layers)
    where = config.get("edited_layers", config.get("edited_layer", config.get("edited_module")))
    assert where in (tuple(layers), layers[0], template.format(i=layers[0]))
    assert {field: config[field] for field in wanted} == wanted
    request = next(record.requests[0] for record in load_records("validation") if record.kind == "counterfactual")
    with torch.random.fork_rng():
        assert len(editor.edit(model, tokenizer, [request])) == 1


def test_an_editor_that_needs_no_model_at_hand_loads_its_own() -> None:
    assert load_rival("ft").config.edited_layers == tuple(LAYERS)


def test_statistics_that_are_not_given_are_those_of_the_atlas_corpus(
    backbone: tuple[Any, Any], statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibke_hf.atlas.atlas_statistics", lambda model: statistics)
    assert load_rival("rome", backbone[0]).statistics is statistics


@pytest.mark.parametrize("name", ["ibke", "none", "froth"])
def test_an_editor_without_committed_hyper_parameters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ft, rome.*found '{name}'"):
        load_rival(name)


def test_the_statistics_cover_all_layers_of_one_seeded_epoch_and_are_cached_where_the_hub_caches(
    backbone: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(KeyStatistics, "of", lambda *given, **options: seen.update(given=given, **options))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    atlas_statistics()
    model, _, texts, layers = seen["given"]
    assert seen["cache"] == tmp_path / "ibke_hf"
    template, chosen = layers_to_edit(model, list(layers))
    assert len(modules_to_edit(model, [template.format(i=i) for i in chosen])) == 6
    assert all(isinstance(text, str) for text in texts)
    assert len(texts) > 10_000
    first = texts[:20]
    atlas_statistics(*backbone, cache=tmp_path / "elsewhere")
    assert seen["cache"] == tmp_path / "elsewhere"
    assert seen["given"][2][:20] == first


def test_the_package_of_the_embedded_world_is_imported_without_torch() -> None:
    code = "import sys, ibke_hf.atlas, ibke_hf.commands.atlas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


# --- the trials ---


def test_a_run_of_one_editor_keeps_the_results_of_the_others(tmp_path: Path) -> None:
    old = {
        "records": 3,
        "editors": {
            "ft": [{"settings": {"learning_rate": 1.0}, "avg": 1.0}],
            "grace": [{"settings": {}, "avg": 99.0}],
        },
    }
    (tmp_path / TRIALS_FILE).write_text(json.dumps(old), encoding="utf-8")
    (tmp_path / HYPER_PARAMETERS).write_text('{"ft": {"learning_rate": 1.0}, "grace": {}}', encoding="utf-8")
    chosen = tune(tmp_path, names=("grace",), number=3)
    trials, settings = (
        json.loads((tmp_path / file).read_text(encoding="utf-8")) for file in (TRIALS_FILE, HYPER_PARAMETERS)
    )
    assert trials["records"] == 3
    assert trials["editors"]["ft"] == old["editors"]["ft"]
    assert settings["ft"] == {"learning_rate": 1.0}
    assert [trial["settings"] for trial in trials["editors"]["grace"]] == list(TRIALS["grace"])
    assert settings["grace"] == chosen["grace"] == best_of(trials["editors"]["grace"])["settings"]
    assert {file.name for file in tmp_path.iterdir()} == {TRIALS_FILE, HYPER_PARAMETERS}
    with pytest.raises(ValueError, match="trials are on 3 records, these would be on 2"):
        tune(tmp_path, names=("grace",), number=2)


@pytest.mark.parametrize("names", [(), ("ft", "mend")])
def test_editors_without_trials_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="editors without weights are ft, rome"):
        tune(tmp_path / "new", names)
    assert not (tmp_path / "new").exists()
