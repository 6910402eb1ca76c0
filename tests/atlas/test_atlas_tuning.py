"""The hyper-parameters of the editors without weights: chosen by equally many trials, committed, loaded."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ibke_hf.atlas import (
    ASSETS,
    HYPER_PARAMETERS,
    RIVALS,
    atlas_statistics,
    load_backbone,
    load_records,
    load_rival,
    tuned_at,
)
from ibke_hf.atlas.bench import TRIALS_OF_MANY as TRIALS_OF_TRAINED
from ibke_hf.atlas.bench import AtlasBench
from ibke_hf.atlas.editors import LAYERS
from ibke_hf.atlas.tuning import (
    EDITS,
    TRIALS,
    TRIALS_OF_MANY,
    TUNING_RECORDS,
    trials_of,
    tune,
)
from ibke_hf.benchmark.tuning import TRIALS_FILE, _Files, best_of
from ibke_hf.core.layers import layers_to_edit, modules_to_edit
from ibke_hf.editors.catalogue import KINDS, TRAINED, editor_class
from ibke_hf.editors.locate.key_statistics import KeyStatistics
from ibke_hf.training.strength import set_strength


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


def tuned() -> list[tuple[int, str]]:
    """Numbers of edits and editors that were tuned at them."""
    return [(int(count), name) for count, by_name in committed(HYPER_PARAMETERS).items() for name in by_name]


def test_every_editor_without_weights_has_four_trials_of_different_settings() -> None:
    assert set(RIVALS) == set(TRIALS) == set(TRIALS_OF_MANY) == set(committed(TRIALS_FILE)["edits"]["1"])
    assert not set(RIVALS) & set(TRAINED)
    for name in RIVALS:
        for edits in EDITS:
            trials = trials_of(name, edits)
            assert len({json.dumps(settings, sort_keys=True) for settings in trials}) == len(trials) == 4, name


@pytest.mark.parametrize(("edits", "name"), tuned())
def test_the_committed_trials_are_those_of_the_code_and_the_choice_is_the_best_of_them(edits: int, name: str) -> None:
    report = committed(TRIALS_FILE)
    trials = report["edits"][str(edits)][name]
    assert report["records"] == TUNING_RECORDS == 100
    assert [trial["settings"] for trial in trials] == [dict(settings) for settings in trials_of(name, edits)]
    assert committed(HYPER_PARAMETERS)[str(edits)][name] == max(trials, key=lambda trial: trial["avg"])["settings"]
    for trial in trials:
        assert set(trial) == {"settings", "reliability", "counterfactual_reliability", "generality", "locality", "avg"}
        assert trial["avg"] == pytest.approx((trial["reliability"] + trial["generality"] + trial["locality"]) / 3)
        assert all(0 <= score <= 100 for score in list(trial.values())[1:])


@pytest.mark.parametrize("name", RIVALS)
def test_the_chosen_settings_make_edits_that_contradict_the_model(name: str) -> None:
    """What an editor's row of the table rests on: a baseline that does not edit is no baseline."""
    chosen = best_of(committed(TRIALS_FILE)["edits"]["1"][name])
    assert chosen["counterfactual_reliability"] >= 95 - 1e-9, chosen


def test_fine_tuning_keeps_its_choice() -> None:
    assert committed(HYPER_PARAMETERS)["1"]["ft"] == {"layers": LAYERS, "learning_rate": 3e-3}


def test_settings_are_those_of_the_largest_number_of_edits_that_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 100 edits AlphaEdit with the settings for one says a third of the targets: the number decides."""
    rates = {"1": 1e-3, "10": 2e-3, "100": 3e-3}
    chosen = {count: {"ft": {"layers": LAYERS, "learning_rate": rate}} for count, rate in rates.items()}
    del chosen["10"]["ft"]
    monkeypatch.setattr("ibke_hf.atlas.chosen_settings", lambda: chosen)
    assert [tuned_at("ft", edits) for edits in (1, 9, 10, 100, 1000)] == [1, 1, 1, 100, 100]
    assert [load_rival("ft", edits=edits).config.learning_rate for edits in (1, 10, 100)] == [1e-3, 1e-3, 3e-3]
    bench = AtlasBench()
    assert bench.editor("ft", Path(), 100).config.learning_rate == 3e-3
    assert [bench.tuned_at(name, 10) for name in ("none", "ft", "mend")] == [None, 1, 10]


def test_a_trained_editor_moves_as_much_as_suits_the_number_of_edits(
    tmp_path: Path, backbone: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step sizes chosen at one edit add up to nonsense at a hundred: four are tried for each number, once."""
    shutil.copytree(ASSETS / "mend", tmp_path / "mend-0")
    calls: list[Any] = []

    def choose(editor: Any, model: Any, tokenizer: Any, records: Any, *_: Any, edits: int) -> list[dict[str, float]]:
        calls.append((edits, len(records)))
        tried = [{"factor": 1.0, "avg": 1.0}, {"factor": 0.25, "avg": 2.0}]
        set_strength(editor, tried[-1])
        return tried

    monkeypatch.setattr("ibke_hf.atlas.bench.choose_strength", choose)
    bench = AtlasBench()
    bench.loaded = backbone
    alone, first, again = (bench.editor("mend", tmp_path / "mend-0", edits) for edits in (1, 10, 10))
    assert calls == [(10, TUNING_RECORDS)]
    for editor in (first, again):
        torch.testing.assert_close(editor.log_step_sizes, alone.log_step_sizes + math.log(0.25))
    assert all(len(factors) == 4 for factors in TRIALS_OF_TRAINED.values())
    assert set(TRIALS_OF_TRAINED) == {name for name, kind in KINDS.items() if kind.trained}


# --- loading ---


@pytest.mark.parametrize("name", RIVALS)
def test_an_editor_loads_with_its_committed_hyper_parameters_and_edits(
    name: str, backbone: tuple[Any, Any], statistics: KeyStatistics
) -> None:
    model, tokenizer = backbone
    editor = load_rival(name, model, statistics)
    assert type(editor) is editor_class(name)
    config, fields = asdict(editor.config), committed(HYPER_PARAMETERS)["1"][name]
    layers = fields.pop("layers")
    template, _ = layers_to_edit(model, layers)
    where = config.get("edited_layers", config.get("edited_layer", config.get("edited_module")))
    assert where in (tuple(layers), layers[0], template.format(i=layers[0]))
    assert {field: config[field] for field in fields} == fields
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
    monkeypatch.setattr(
        KeyStatistics, "of", lambda *positional, **options: seen.update(positional=positional, **options)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    atlas_statistics()
    model, _, texts, layers = seen["positional"]
    assert seen["cache"] == tmp_path / "ibke_hf"
    template, chosen = layers_to_edit(model, list(layers))
    assert len(modules_to_edit(model, [template.format(i=i) for i in chosen])) == 6
    assert all(isinstance(text, str) for text in texts)
    assert len(texts) > 10_000
    first = texts[:20]
    atlas_statistics(*backbone, cache=tmp_path / "elsewhere")
    assert seen["cache"] == tmp_path / "elsewhere"
    assert seen["positional"][2][:20] == first


def test_the_package_of_the_embedded_world_is_imported_without_torch() -> None:
    code = "import sys, ibke_hf.atlas, ibke_hf.commands.atlas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


# --- the trials ---


def test_a_run_of_one_editor_keeps_the_results_of_the_others_and_its_own_trials(tmp_path: Path) -> None:
    old = {
        "records": 3,
        "edits": {
            "1": {
                "ft": [{"settings": {"learning_rate": 1.0}, "avg": 1.0}],
                "grace": [{"settings": TRIALS["grace"][2], "avg": 101.0}],
            }
        },
    }
    (tmp_path / TRIALS_FILE).write_text(json.dumps(old), encoding="utf-8")
    (tmp_path / HYPER_PARAMETERS).write_text('{"1": {"ft": {"learning_rate": 1.0}}}', encoding="utf-8")
    chosen = tune(tmp_path, names=("grace",), edits=(1, 2), number=3)
    trials, settings = (
        json.loads((tmp_path / file).read_text(encoding="utf-8")) for file in (TRIALS_FILE, HYPER_PARAMETERS)
    )
    assert trials["records"] == 3
    assert trials["edits"]["1"]["ft"] == old["edits"]["1"]["ft"]
    assert settings["1"]["ft"] == {"learning_rate": 1.0}
    for edits in ("1", "2"):
        assert [trial["settings"] for trial in trials["edits"][edits]["grace"]] == list(TRIALS["grace"])
        assert settings[edits]["grace"] == chosen[edits]["grace"]
    assert trials["edits"]["1"]["grace"][2]["avg"] == 101.0  # a trial that is there is not made again
    assert chosen["1"]["grace"] == TRIALS["grace"][2]
    assert chosen["2"]["grace"] == best_of(trials["edits"]["2"]["grace"])["settings"]
    with pytest.raises(ValueError, match="trials are on 3 records, these would be on 2"):
        tune(tmp_path, names=("grace",), edits=(1,), number=2)
    with pytest.raises(ValueError, match=r"between 1 and the 3 records, found \[4\]"):
        tune(tmp_path, names=("grace",), edits=(4,), number=3)


def test_a_trial_that_two_runs_make_at_once_counts_once(tmp_path: Path) -> None:
    first, second = ({"settings": settings, "avg": 1.0} for settings in TRIALS["grace"][:2])
    files = _Files(tmp_path, 3, {10: {"grace": TRIALS["grace"]}}, ("grace",))
    for trial in (second, first, {**second, "avg": 2.0}):
        files.add("grace", 10, trial)
    trials = json.loads((tmp_path / TRIALS_FILE).read_text(encoding="utf-8"))["edits"]["10"]["grace"]
    assert trials == [first, {**second, "avg": 2.0}]


@pytest.mark.parametrize("names", [(), ("ft", "mend")])
def test_editors_without_trials_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="editors without weights are ft, rome"):
        tune(tmp_path / "new", names)
    assert not (tmp_path / "new").exists()
