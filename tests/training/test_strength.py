"""What a training does once its steps are done: step size, precision, time; what its last lines name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from record_files import Json
from training_runs import REQUIRED, new_editor, record

from ibke_hf import IBKEEditor
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.loading import load_editor
from ibke_hf.training.recipe import train_editor
from ibke_hf.training.report import in_words
from ibke_hf.training.settings import TrainingSettings
from ibke_hf.training.strength import STEP_FACTORS, choose_strength, save_in_16_bit
from ibke_hf.training.time_left import TimeLeft
from ibke_hf.training.time_left import in_words as time_in_words
from ibke_hf.training.width import NARROWEST, fit_width


def calibrated(backbone: Any, tokenizer: Any) -> Any:
    from ibke_hf.core.tokens import encode_requests

    editor = new_editor(backbone)
    editor.calibrate(backbone, [encode_requests(tokenizer, [r for i in range(6) for r in record(i).requests])])
    return editor


def test_the_best_of_naive_trials_is_chosen(tiny_model: Any, tiny_tokenizer: Any) -> None:
    backbone, records = tiny_model(), [record(6), record(7)]
    editor = calibrated(backbone, tiny_tokenizer)
    trained = editor.log_step_sizes.detach().clone()
    trials = choose_strength(editor, backbone, tiny_tokenizer, records, (1.0, 8.0, 0.1), rounded=False)
    chosen = editor.log_step_sizes.detach().clone()
    naive = {}
    for factor in (1.0, 8.0, 0.1):
        editor.log_step_sizes.data = trained + math.log(factor)
        naive[factor] = evaluate_records(
            editor, backbone, tiny_tokenizer, records, generate=False, progress=False
        ).summary["avg"]
    assert [trial["factor"] for trial in trials[:-1]] == list(naive)
    assert {trial["factor"]: trial["avg"] for trial in trials} == pytest.approx(naive)
    assert trials[-1]["avg"] == max(naive.values())
    torch.testing.assert_close(chosen, trained + math.log(trials[-1]["factor"]))


def test_an_editor_in_16_bit_makes_the_same_edit(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    backbone = tiny_model()
    editor = calibrated(backbone, tiny_tokenizer).eval()
    save_in_16_bit(editor, tmp_path / "half")
    editor.save_pretrained(tmp_path / "full")
    assert all(parameter.dtype == torch.float32 for parameter in editor.parameters())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]
    half = load_editor(tmp_path / "half")
    assert torch.equal(half.log_step_sizes, editor.log_step_sizes)
    edits = [one.edit(backbone, tiny_tokenizer, record(0).requests) for one in (half, editor)]
    for name, output in edits[1].outputs.items():
        product = [edit.inputs[name].float().mT @ edit.outputs[name].float() for edit in edits]
        assert (product[0] - product[1]).norm() < 0.02 * product[1].norm() and output.isfinite().all()


def test_a_training_chooses_saves_in_16_bit_and_keeps_its_log(settings: Json) -> None:
    settings["training"] |= {"max_steps": 2}
    report = train_editor({**settings, "save_dtype": "float16", "choose_step_size": True})
    log = json.loads((Path(settings["out"]) / "training.json").read_text())
    assert [trial["factor"] for trial in report["step_sizes"][:-1]] == list(STEP_FACTORS)
    assert log["report"]["step_sizes"] == report["step_sizes"]
    assert log["settings"]["save_dtype"] == "float16" and log["history"][-1]["step"] == 2
    assert report["step_sizes"][-1]["avg"] == max(trial["avg"] for trial in report["step_sizes"])
    assert "chosen" in in_words(report, TrainingSettings.of(settings))
    trained = IBKEEditor.from_pretrained(Path(settings["out"]) / "checkpoints" / "checkpoint-2").log_step_sizes
    saved = load_editor(settings["out"]).log_step_sizes
    torch.testing.assert_close(saved, trained + math.log(report["step_sizes"][-1]["factor"]))


def test_step_sizes_are_chosen_where_there_are_validation_records_but_for_the_papers_backbones() -> None:
    def chooses(**changes: Any) -> bool:
        return TrainingSettings.of({**REQUIRED, **changes}).chooses_step_size

    assert chooses(validation=["v"]) and not chooses() and not chooses(validation=["v"], choose_step_size=False)
    assert not chooses(validation=["v"], backbone="Qwen/Qwen3-8B")
    assert chooses(validation=["v"], backbone="Qwen/Qwen3-8B", choose_step_size=True)
    with pytest.raises(ValueError, match="choose_step_size tries step sizes on validation records; give some"):
        chooses(choose_step_size=True)
    with pytest.raises(ValueError, match="save_dtype must be one of float32, float16, found 'int8'"):
        chooses(save_dtype="int8")


def test_the_commands_to_try_next_ask_as_the_training_did() -> None:
    changes = {"chat": True, "chat_options": {"enable_thinking": False}, "leading_space": "auto"}
    said = in_words({"steps": 1, "train_loss": 1.0}, TrainingSettings.of({**REQUIRED, **changes}))
    lines = [line for line in said.splitlines() if line.startswith("  ibke ")]
    flags = " --chat --chat-options '{\"enable_thinking\": false}' --leading-space auto"
    assert len(lines) == 2 and all(line.endswith(flags) for line in lines)
    plain = in_words({"steps": 1, "train_loss": 1.0}, TrainingSettings.of(REQUIRED))
    assert "--chat" not in plain and not any(line.endswith(" ") for line in plain.splitlines())


def test_the_time_to_the_end_is_said_after_ten_steps_and_each_tenth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("ibke_hf.training.time_left.time.monotonic", lambda: clock[0])
    bar, state = TimeLeft(), SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    for step in range(1, 1001):
        state.global_step, clock[0] = step, clock[0] + (100.0 if step == 1 else 2.0)
        bar.on_step_end(None, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 11 of 1,000: 2.00 s a step, about 33 min to go"
    assert [line.split()[1] for line in lines[1:]] == [str(step) for step in range(100, 1000, 100)]
    assert [time_in_words(seconds) for seconds in (7800, 29)] == ["2 h 10 min", "less than a minute"]


def test_the_width_follows_the_size_of_the_backbone(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, fields = tiny_model(), {"edited_modules": None, "second_stage_heads": 4}
    monkeypatch.setattr("ibke_hf.training.width.LEAST", 400_000)
    chosen = fit_width("ibke", backbone, [1, 2], fields)
    sizes = [
        IBKEEditor.for_backbone(backbone, [1, 2], **{**chosen, "latent_dim": width, "second_stage_mlp": 2 * width})
        for width in (chosen["latent_dim"], chosen["latent_dim"] + 16)
    ]
    numbers = [sum(parameter.numel() for parameter in editor.parameters()) for editor in sizes]
    assert numbers[0] <= 400_000 < numbers[1] and chosen["latent_dim"] > NARROWEST
    assert fit_width("ibke", backbone, [1, 2], {**fields, "latent_dim": 8})["second_stage_mlp"] == 16
    mend = MENDEditor.for_backbone(backbone, [1, 2], **fit_width("mend", backbone, [1, 2], {"edited_modules": None}))
    assert sum(parameter.numel() for parameter in mend.parameters()) == pytest.approx(400_000, rel=0.05)
