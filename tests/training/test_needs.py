"""`ibke plan`: what is counted on the meta device is what real edits, steps and serving allocate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.benchmark import memory_use
from ibke_hf.benchmark.subject import Subject, new_subject
from ibke_hf.benchmark.training_cost import needs_for, step_at_hand
from ibke_hf.cli import main
from ibke_hf.training.needs import Speed, Timed, few_blocks, largest_batch, measured_speed, plan_needs
from ibke_hf.training.passes import Counter, Work, count, edit_passes, empty_editor, empty_model, training_passes

FACTS = [
    ("The capital of France is", "Rome", "The capital city of France is", "An author of a book is", "Marie"),
    ("The capital of Poland is", "Oslo", "The capital town of Poland is", "A sparrow and oak is", "a bird"),
] * 2
WIDE = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 1000, "num_hidden_layers": 6}


def subject_of(family: str, tiny_model: Callable[..., Any], tokenizer: Any) -> Subject:
    config = {"n_embd": 64, "n_inner": 192, "vocab_size": 1000, "n_layer": 6} if family.startswith("gpt") else WIDE
    fields = {"latent_dim": 32, "latent_length": 4}
    model = tiny_model(family, **config, **({"n_positions": 512} if family.startswith("gpt") else {}))
    return new_subject(model, tokenizer, FACTS, "tiny", layers=[2, 3], editor_fields=fields)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gptj"])
def test_the_plan_is_within_15_percent_of_what_is_allocated(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    ratios = memory_use.planned_memory(subject_of(family, tiny_model, tiny_tokenizer))
    assert [ratio.name for ratio in ratios] == ["plan_train_memory", "plan_edit_memory", "plan_serve_memory"]
    for ratio in ratios:
        assert ratio.ratio == pytest.approx(1, abs=0.15), ratio


def test_what_is_counted_on_the_meta_device_is_what_is_counted_on_a_real_one(tiny_model: Callable[..., Any]) -> None:
    config = tiny_model("llama").config
    work, results = Work(records=2, tokens=12, targets=3), []
    for device in ("meta", "cpu"):
        model = empty_model(config, device=device)
        editor = empty_editor(model, [1, 2], {"latent_dim": 8, "latent_length": 2}, device)
        results.append([count(run, model, editor, work=work) for run in (training_passes, edit_passes)])
    assert results[0] == results[1]


def test_the_counted_work_of_an_edit_is_that_of_a_real_one(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    subject = subject_of("qwen3", tiny_model, tiny_tokenizer)
    request = subject.batch(1)
    with step_at_hand(subject) as (_, batch):
        needs = needs_for(subject, batch).with_work(tokens=request.input_ids.shape[1], targets=request.kept)
    with Counter() as counter:
        subject.editor.edit(subject.model, tiny_tokenizer, subject.requests(1))
    assert needs.edit_passes.flops == pytest.approx(counter.flops, rel=0.01)


def test_batches_and_days_follow_from_what_is_counted(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    needs = plan_needs(str(tmp_path / "model"), fields={"latent_dim": 8}, work=Work(2, 12, 3, 1, 16))
    largest = largest_batch(needs, 1_500_000)
    assert needs.with_work(records=largest).total <= 1_500_000 < needs.with_work(records=largest + 2).total
    assert largest_batch(needs, 1000) == 0
    timed = Timed(base=1.0, upper=0.5, lower=0.25, layer=0.125)
    speed = Speed(timed, timed, parameters=float(needs.editor_parameters))
    first, layers = min(needs.config.edited_layers), len(needs.config.edited_layers)
    expected = 1 + 0.5 * (4 - first - 2) + 0.25 * first + 0.125 * (layers - 1)
    assert speed.edit_seconds(needs) == expected and speed.step_seconds(needs) == expected + 1
    measured = measured_speed(needs, runs=1)
    assert measured.step.base > measured.edit.base > 0 and measured.parameters > 0
    assert few_blocks(needs.of_backbone).num_hidden_layers == 2 and needs.of_backbone.num_hidden_layers == 4


def test_the_command_says_what_fits(
    tiny_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    words = ["plan", "--backbone", str(tmp_path / "model"), "--tokens", "12", "--targets", "3", "--context", "16"]
    words += ["--latent-dim", "8"]
    assert main([*words, "--memory", "0.001GB", "--steps", "10", "--json", str(tmp_path / "plan.json")]) == 0
    text, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "0.001 GB hold" in text and "steps/s" in text and "days for 10 steps" in text
    assert plan["days"] == pytest.approx(10 * plan["seconds_of_a_step"] / 86_400)
    assert plan["largest_batch"]["bfloat16"] >= plan["largest_batch"]["float32"] >= 1
    assert main([*words, "--memory", "10KB", "--no-speed"]) == 0
    assert "hold no training of it" in capsys.readouterr().out
    for bad in (["--memory", "much"], ["--targets", "12"], ["--backbone", str(tmp_path / "nothing")]):
        with pytest.raises(SystemExit) if bad[0] == "--memory" else _nothing():
            assert main([*words, "--no-speed", *bad]) == 2
        assert bad[1] in capsys.readouterr().err


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
