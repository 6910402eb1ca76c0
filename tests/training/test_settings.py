"""Settings of `ibke train`: files and flags merged, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import REQUIRED

from ibke_hf.training.recipe import PAPER_DTYPES, PRESETS, _patience, training_settings
from ibke_hf.training.trainer import IBKETrainingArguments


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
        training_settings(None, REQUIRED, {}, {})
        == training_settings(file, REQUIRED, {}, {})
        == {**REQUIRED, "editor": {}, "training": {}}
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
        ("- backbone", r"settings\.yaml: expected values by name, found list; the settings are backbone"),
        ("backbone: [", r"settings\.yaml: not valid YAML"),
        ("kind: rome", "kind must be one of serac, mend, ibke, found 'rome'"),
        (
            "kind: mend\neditor: {latent_dim: 3}",
            "unknown setting 'latent_dim' under editor:; settings are .*hidden_dim",
        ),
        ("layers: three", r"layers must be of type list\[int\] \| None, found 'three'"),
        ("layers: [one]", r"layers must be of type list\[int\] \| None, found \['one'\]"),
        ("validation: 3", r"validation must be of type list\[str\] \| None, found 3"),
        ("training: {seed: one}", "training: seed must be of type int, found 'one'"),
        ("training: {max_steps: 3.5}", "training: max_steps must be of type int, found 3.5"),
        ("training: {max_steps: true}", "training: max_steps must be of type int, found True"),
        ("training: {beta: [1]}", r"training: beta must be of type float, found \[1\]"),
        ("training: {learning_rate: .inf}", "training: learning_rate must be a finite number, found inf"),
        ("training: {weight_decay: .nan}", "training: weight_decay must be a finite number, found nan"),
        ("editor: {latent_dim: wide}", "editor: latent_dim must be of type int, found 'wide'"),
        ("editor: {use_scale_factor: 3}", "editor: use_scale_factor must be of type bool, found 3"),
        ("editor: {log_variance_range: [1, 2, 3]}", "editor: .*log_variance_range must be .low, high."),
        ("kind: serac\neditor: {scope: 3}", "editor: scope must be of type str, found 3"),
        ("editor: {latent_dim: 0}", "editor: .*latent_dim must be between 1"),
        ("editor: {initial_edit_ratio: .inf}", "editor: initial_edit_ratio must be a finite number, found inf"),
        ("editor: {second_stage_heads: 3}", "editor: .*latent_dim 1024 must be divisible by second_stage_heads 3"),
        ("? [1]\n: 2", "not valid YAML .*unhashable key"),
        ("1: 2", r"settings\.yaml: 1 is no name; put it in quotes"),
        ("[" * 5000, "nested too deeply"),
        ("dtype: int8", "dtype must be one of auto, float32, bfloat16, float16, found 'int8'"),
    ],
)
def test_a_bad_setting_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        training_settings(file, REQUIRED, {}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("backbone", 3), ("records", 3), ("records", [1]), ("out", ["o"]), ("out", 1.5)]
)
def test_a_required_setting_of_a_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be of type .*, found "):
        training_settings(None, {**REQUIRED, name: value}, {}, {})


def test_a_settings_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00beta")
    with pytest.raises(ValueError, match=r"s\.yaml: not a text in UTF-8"):
        training_settings(tmp_path / "s.yaml", REQUIRED, {}, {})


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    fields = {"statistics_epsilon": 0, "log_variance_range": [-5, 5]}
    checked = training_settings(None, REQUIRED, fields, {"beta": 1, "save_steps": 5})
    assert checked["training"] == {"beta": 1.0, "save_steps": 5.0}
    assert checked["editor"] == {"statistics_epsilon": 0.0, "log_variance_range": [-5, 5]}


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match="missing setting: records, out; give it as a flag"):
        training_settings(None, {"backbone": "b"}, {}, {})


def test_the_papers_precision_covers_every_preset() -> None:
    assert PAPER_DTYPES.keys() == PRESETS.keys()


def test_patience_of_a_share_of_all_steps_counts_epochs(tmp_path: Path) -> None:
    arguments = IBKETrainingArguments(
        str(tmp_path), eval_steps=0.5, num_train_epochs=10, use_cpu=True, report_to=[], per_device_train_batch_size=8
    )
    assert _patience(arguments, 8000) == 10  # an evaluation each 5,000 of 10,000 steps


@pytest.mark.parametrize(("every", "evaluations"), [(3000, 17), (50_000, 1), (100_000, 1), (0.01, 5)])
def test_patience_is_fifty_thousand_steps(every: float, evaluations: int, tmp_path: Path) -> None:
    assert (
        _patience(
            IBKETrainingArguments(str(tmp_path), eval_steps=every, max_steps=1_000_000, use_cpu=True, report_to=[])
        )
        == evaluations
    )
