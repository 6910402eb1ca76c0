"""Backbones in eight and in four bits: edits are finite and undone exactly, training works, quality stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from small_editors import REQUESTS, make_editor
from torch import Tensor
from training_runs import arguments, new_editor, record

from ibke_hf.atlas import load_records
from ibke_hf.cli import main
from ibke_hf.core.layers import BackboneError
from ibke_hf.loading import load_editor, load_model
from ibke_hf.training.report import before_and_after
from ibke_hf.training.trainer import IBKETrainer, RecordDataset

IDS = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture(params=[8, 4])
def quantised(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> Any:
    for part in (tiny_model("qwen3", hidden_size=64, intermediate_size=128), tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    return load_model(tmp_path / "model", bits=request.param)[0]


@pytest.mark.parametrize("composition", ["sum", "solve"])
def test_edits_are_finite_undone_exactly_and_not_merged(composition: str, quantised: Any, tiny_tokenizer: Any) -> None:
    assert not quantised.model.layers[1].mlp.down_proj.weight.is_floating_point()
    before = logits(quantised)
    editor = make_editor(quantised, tiny_tokenizer, layers=[1, 2], composition=composition)
    edit = editor.edit(quantised, tiny_tokenizer, REQUESTS, mode="sequential")
    assert all(torch.isfinite(tensor).all() for tensor in edit.tensors().values())
    with edit.attached(quantised):
        assert (logits(quantised) - before).abs().max() > 0.01
    assert torch.equal(logits(quantised), before)
    with pytest.raises(BackboneError, match="quantised weight cannot take a merged edit; attach the edit"):
        edit.merge_into(quantised)
    assert torch.equal(logits(quantised), before)


@pytest.mark.parametrize("cached", [False, True])
def test_training_steps_work(cached: bool, quantised: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    before, options = logits(quantised), {"activation_cache": str(tmp_path / "cache")} if cached else {}
    trainer = IBKETrainer(
        new_editor(quantised),
        backbone=quantised,
        args=arguments(tmp_path / "run", max_steps=3, **options),
        processing_class=tiny_tokenizer,
        train_dataset=RecordDataset([record(i, 2, 1, hops=1) for i in range(4)]),
    )
    start = [parameter.detach().clone() for parameter in trainer.editor.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert all(not torch.equal(*pair) for pair in zip(start, trainer.editor.parameters(), strict=True))
    assert torch.equal(logits(quantised), before)


def test_commands_train_and_edit_in_four_bits(settings: Any, tmp_path: Path, capsys: Any) -> None:
    del settings["validation"], settings["training"]["eval_steps"]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "settings.yaml"), "--bits", "4"]) == 0
    edit = ["edit", "--model", settings["backbone"], "--editor", settings["out"], "--bits", "4"]
    assert main([*edit, "--prompt", "The capital of France is", "--target", "Rome"]) == 0


def test_bits_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 4, found 3"):
        load_model(bits=3)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.gguf: a GGUF file is quantised as it is; leave out the 8 bits"):
        load_model(tmp_path / "model.gguf", bits=8)


@pytest.mark.slow
def test_quality_on_atlas_stays_within_a_point() -> None:
    plain, tokenizer = load_model()
    editor, records = load_editor("ibke", backbone=plain), load_records("validation")
    averages = []
    for bits in (None, 8, 4):
        model = plain if bits is None else load_model(bits=bits)[0]
        averages.append(mean(before_and_after(editor, model, tokenizer, records, 60)["after"].values()))
    assert averages[1:] == pytest.approx([averages[0]] * 2, abs=1)
