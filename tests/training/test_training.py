"""`ibke train`: merging of settings, their errors, and a whole training from files to a saved editor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from record_files import CITIES, Json, write_records

from ibke_hf import EditRequest, IBKEEditor
from ibke_hf.cli import build_parser, main
from ibke_hf.commands.options import load_saved_editor
from ibke_hf.data.augmentation import draw_records
from ibke_hf.editors.catalogue import editor_class
from ibke_hf.training.recipe import PAPER_DTYPES, PRESETS, _patience, train_editor, training_settings
from ibke_hf.training.trainer import IBKETrainingArguments

GIVEN = {"backbone": "b", "records": ["r"], "out": "o"}


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Json:
    """Settings of a training in a folder of its own, on two record files."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    return {
        "backbone": str(tmp_path / "backbone"),
        "out": str(tmp_path / "editor"),
        "layers": [1, 2],
        "dtype": "float32",
        "records": [write_records(tmp_path / "train.json", CITIES[:4])],
        "validation": [write_records(tmp_path / "held.json", CITIES[4:])],
        "editor": {"latent_dim": 8, "latent_length": 2},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "eval_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
        },
    }


# --- settings ---------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("""
backbone: from-file
records: data/train
out: folder
layers: [3, 4]
editor:
  latent_dim: 64
  initial_edit_ratio: 5e-2
training:
  learning_rate: 1e-4
  max_steps: 10
  lr_scheduler_type: cosine
""")
    settings = training_settings(
        file, {"backbone": "from-flag", "layers": None}, {"latent_dim": 32}, {"max_steps": 20, "seed": None}
    )
    assert settings == {
        "backbone": "from-flag",
        "records": ["data/train"],
        "out": "folder",
        "layers": [3, 4],
        "editor": {"latent_dim": 32, "initial_edit_ratio": 0.05},
        "training": {"learning_rate": 1e-4, "max_steps": 20, "lr_scheduler_type": "cosine"},
    }


def test_flags_alone_and_empty_groups_suffice(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("editor:\ntraining:\n")
    assert (
        training_settings(None, GIVEN, {}, {})
        == training_settings(file, GIVEN, {}, {})
        == {**GIVEN, "editor": {}, "training": {}}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbones: x", r"settings\.yaml: unknown setting 'backbones'; settings are backbone, records"),
        ("editor: {latent_dims: 3}", "unknown setting 'latent_dims' under editor:; settings are .*latent_dim"),
        ("editor: {input_dims: [3]}", "unknown setting 'input_dims' under editor:"),
        ("training: {steps: 3}", "unknown setting 'steps' under training:; settings are .*max_steps.*beta"),
        ("training: {output_dir: x}", "unknown setting 'output_dir' under training:"),
        ("training: 3", r"settings\.yaml: training: must hold settings by name, found 3"),
        ("- backbone", r"settings\.yaml: expected settings by name, found \['backbone'\]"),
        ("backbone: [", r"settings\.yaml: not a YAML file"),
        ("kind: rome", "kind must be one of serac, mend, ibke, found 'rome'"),
        (
            "kind: mend\neditor: {latent_dim: 3}",
            "unknown setting 'latent_dim' under editor:; settings are .*hidden_dim",
        ),
        ("dtype: int8", "dtype must be one of auto, float32, bfloat16, float16, found 'int8'"),
    ],
)
def test_a_bad_setting_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        training_settings(file, GIVEN, {}, {})


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match="missing setting: records, out; give it as a flag"):
        training_settings(None, {"backbone": "b"}, {}, {})


def test_the_papers_precision_covers_every_preset() -> None:
    assert PAPER_DTYPES.keys() == PRESETS.keys()


@pytest.mark.parametrize(("every", "evaluations"), [(3000, 17), (50_000, 1), (100_000, 1), (0.01, 5)])
def test_patience_is_fifty_thousand_steps(every: float, evaluations: int, tmp_path: Path) -> None:
    assert (
        _patience(
            IBKETrainingArguments(str(tmp_path), eval_steps=every, max_steps=1_000_000, use_cpu=True, report_to=[])
        )
        == evaluations
    )


# --- training ---------------------------------------------------------------------------------------------------------


def test_an_editor_is_trained_saved_and_usable(
    settings: Json, tiny_model: Any, tiny_tokenizer: Any, caplog: Any
) -> None:
    logging.getLogger("ibke_hf").addHandler(caplog.handler)
    result = train_editor(settings)
    assert {"eval_loss", "eval_reliability", "eval_generality", "eval_locality"} <= result.keys()
    assert "left out 1: edit with an empty prompt or target" in caplog.text
    out = Path(settings["out"])
    assert {path.name for path in out.iterdir()} == {"checkpoints", "config.json", "model.safetensors"}
    editor = IBKEEditor.from_pretrained(out)
    assert editor.is_calibrated and editor.config.latent_dim == 8 and editor.config.edited_layers == [1, 2]
    backbone = tiny_model()
    with editor.edit(backbone, tiny_tokenizer, [EditRequest("The Oslo tower is in", "Rome")]).attached(backbone):
        pass
    state = json.loads((out / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert result["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mend", {"hidden_dim": 4}),
        ("serac", {"embedding_dim": 8, "counterfactual": "backbone"}),
        ("serac", {"scope_form": "cross"}),
    ],
)
def test_other_kinds_of_editors_are_trained_alike(
    kind: str, fields: Json, settings: Json, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    settings |= {"kind": kind, "editor": fields, "layers": None if kind == "serac" else [1, 2]}
    assert {"eval_loss", "eval_reliability", "eval_generality", "eval_locality"} <= train_editor(settings).keys()
    editor, backbone = load_saved_editor(settings["out"]), tiny_model()
    assert type(editor) is editor_class(kind)
    with editor.edit(backbone, tiny_tokenizer, [EditRequest("The Oslo tower is in", "Rome")]).attached(backbone):
        pass


def test_the_counterfactual_model_starts_as_what_is_named(settings: Json, tiny_model: Any) -> None:
    settings |= {
        "kind": "serac",
        "layers": None,
        "editor": {"counterfactual": settings["backbone"], "scope": "backbone"},
    }
    settings["training"] |= {"max_steps": 1, "learning_rate": 0.0}
    train_editor(settings)
    started = load_saved_editor(settings["out"]).counterfactual.state_dict()
    assert all(torch.equal(started[name], value) for name, value in tiny_model().state_dict().items())


def test_the_seed_gives_the_same_editor_and_resume_goes_on_from_it(settings: Json, tmp_path: Path) -> None:
    def trained(name: str, resume: bool = False, **training: Any) -> dict[str, torch.Tensor]:
        options = {**settings, "out": str(tmp_path / name), "training": {**settings["training"], **training}}
        train_editor(options, resume=resume)
        return IBKEEditor.from_pretrained(tmp_path / name).state_dict()

    torch.manual_seed(0)
    first = trained("first", load_best_model_at_end=False)
    torch.manual_seed(1)
    trained("second", load_best_model_at_end=False, max_steps=2)
    resumed = trained("second", resume=True, load_best_model_at_end=False)
    other = trained("third", load_best_model_at_end=False, seed=7)
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(settings: Json) -> None:
    settings["training"]["max_steps"] = 2
    train_editor(settings)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run; resume it \(--resume\), remove them"):
        train_editor(settings)


def test_without_validation_the_training_loss_is_returned(settings: Json) -> None:
    settings |= {"validation": None, "training": {**settings["training"], "max_steps": 1}}
    assert train_editor(settings).keys() == {"train_loss"}


def test_records_that_are_none_are_an_error(settings: Json, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no record in .*none\.json"):
        train_editor({**settings, "records": [str(tmp_path / "none.json")]})


def test_a_half_precision_backbone_gets_a_loss_scale(settings: Json) -> None:
    settings |= {"dtype": "float16", "training": {**settings["training"], "max_steps": 1}}
    train_editor(settings)
    assert IBKEEditor.from_pretrained(settings["out"]).config.capture_loss_scale == 1024.0


def test_the_command_line_trains(settings: Json, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        json.dumps({"training": settings["training"], "validation": settings["validation"][0]})
    )  # JSON is YAML
    command = [
        "train",
        "--config",
        str(file),
        "--backbone",
        settings["backbone"],
        "--records",
        *settings["records"],
        "--out",
        settings["out"],
        "--latent-dim",
        "8",
        "--max-steps",
        "2",
        "--layers",
        "1",
        "2",
    ]
    assert build_parser().parse_args(command).max_steps == 2
    assert main(command) == 0
    assert '"eval_loss"' in capsys.readouterr().out
    assert main(command) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


# --- few-shot augmentation ------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Ten records in another format, one of them without a target."""
    rows = [
        {
            "subject": city,
            "src": f"What is {city} known for?",
            "pred": "wine",
            "rephrase": f"For what is {city} known?",
            "alt": "" if i == 9 else f"cheese {i}",
            "answers": ["wine"],
            "loc": "nq question: where is the river",
            "loc_ans": "Thames",
            "cond": "",
        }
        for i, city in enumerate(CITIES + CITIES[:4])
    ]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    return str(tmp_path / "other.json")


def test_few_shot_records_are_drawn_with_a_seed_and_logged(other: str) -> None:
    records, (log,) = draw_records([other], 4, seed=1)
    assert [record.id for record in records] == log["ids"]
    assert {name: log[name] for name in ("source", "wanted", "drawn", "seed", "skipped")} == {
        "source": other,
        "wanted": 4,
        "drawn": 4,
        "seed": 1,
        "skipped": log["skipped"],
    }
    assert sum(log["skipped"].values()) == 1
    assert draw_records([other], 4, seed=1)[0] == records
    assert any(draw_records([other], 4, seed=seed)[0] != records for seed in range(2, 6))
    whole, (log,) = draw_records([other], 512, seed=1)
    assert (len(whole), log["wanted"], log["drawn"]) == (9, 512, 9)


def test_training_mixes_other_datasets_in(settings: Json, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "ibke_hf.training.trainer.GradientEditorTrainer.train",
        lambda self, **_: seen.append([r.dataset for r in self.train_dataset]),
    )
    monkeypatch.setattr("ibke_hf.training.trainer.GradientEditorTrainer.save_model", lambda *_: None)
    monkeypatch.setattr("ibke_hf.training.trainer.GradientEditorTrainer.evaluate", lambda *_: {})
    train_editor({**settings, "augment": [other], "augment_records": 3})
    assert seen == [["uniedit"] * 4 + ["zsre"] * 3]
    (log,) = json.loads((Path(settings["out"]) / "augmentation.json").read_text())
    assert (log["source"], len(log["ids"])) == (other, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"augment_records": 0}, "augment_records must be a whole number of at least 1, found 0"),
        ({"augment_records": "many"}, "augment_records must be a whole number of at least 1, found 'many'"),
    ],
)
def test_a_bad_augmentation_is_named(given: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_settings(None, {**GIVEN, **given}, {}, {})
