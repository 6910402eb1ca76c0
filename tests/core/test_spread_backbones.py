"""Backbones that a `device_map` spreads over two devices, or over memory and disk, are edited like whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_editors import REQUESTS, make_editor
from spread_models import HALF_ON_DISK, offloaded, on_two_devices
from torch import Tensor
from two_devices import two_devices

from ibke_hf.core.layers import BackboneError, input_device
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.grace import GRACEEditor
from ibke_hf.editors.t_patcher import TPatcherEditor
from ibke_hf.loading import load_model, placed

IDS = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
TINY = {"tie_word_embeddings": False, "attn_implementation": "eager"}  # whose kernels are the same everywhere


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS.to(input_device(model))).logits.to("cpu")


@pytest.fixture(params=["two devices", "disk"])
def pair(request: pytest.FixtureRequest, tiny_model: Callable[..., Any], tmp_path: Path) -> Iterator[Any]:
    """The place of the parts, a whole model, and the same model spread."""
    plain, other = (tiny_model("qwen3", **TINY) for _ in range(2))
    if request.param == "disk":
        yield request.param, plain, offloaded(other, "disk", tmp_path / "offload")
        return
    with two_devices() as devices:
        yield request.param, plain, on_two_devices(other, *devices)


def same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layers", "composition"), [([1, 2], "sum"), ([2, 3], "solve")])
def test_edits_are_those_of_a_whole_backbone_and_undo_is_exact(
    pair: Any, tiny_tokenizer: Any, layers: list[int], composition: str
) -> None:
    where, plain, model = pair
    before = logits(model)
    assert torch.equal(before, logits(plain))
    editor = make_editor(plain, tiny_tokenizer, layers=layers, composition=composition)
    modes = ("joint", "sequential")
    ours = [editor.edit(plain, tiny_tokenizer, REQUESTS[:2], mode=mode) for mode in modes]
    editor = placed(editor, model)
    if where == "two devices":
        assert editor.log_step_sizes.device.index == int(layers[0] >= 2)  # beside the first layer that it edits
    for mode, expected in zip(modes, ours, strict=True):
        edit = editor.edit(model, tiny_tokenizer, REQUESTS[:2], mode=mode)
        with edit.attached(model), expected.attached(plain):
            assert same(logits(model), logits(plain)) and not same(logits(model), before)
        assert torch.equal(logits(model), before)


def test_merging_is_whole_and_undone_exactly_or_refused_where_it_would_be_lost(pair: Any, tiny_tokenizer: Any) -> None:
    where, plain, model = pair
    before = logits(model)
    edit = make_editor(plain, tiny_tokenizer, layers=[1, 2]).edit(plain, tiny_tokenizer, REQUESTS)
    if where == "disk":
        with pytest.raises(BackboneError, match=r"offloaded to disk.*attach the edit, or load the model without"):
            edit.merge_into(model)
    else:
        merged, other = edit.merge_into(model), edit.merge_into(plain)
        assert torch.equal(logits(model), logits(plain)) and not same(logits(model), before)
        merged.undo()
        other.undo()
    assert torch.equal(logits(model), before)


def assert_edits_alike(make: Callable[[Any], Any], tokenizer: Any, plain: Any, model: Any) -> None:
    edits = []
    for each in (plain, model):
        torch.manual_seed(0)
        edits.append(make(each).edit(each, tokenizer, REQUESTS[:1]))
    with edits[0].attached(plain), edits[1].attached(model):
        assert same(logits(model), logits(plain))


def test_other_editors_edit_spread_backbones_too(pair: Any, tiny_tokenizer: Any) -> None:
    _, plain, model = pair
    for make in (
        lambda model: FineTuningEditor.for_backbone(model, [1, 2], steps=2),
        lambda model: GRACEEditor.for_backbone(model, [2], steps=2),
    ):
        assert_edits_alike(make, tiny_tokenizer, plain, model)


def test_an_editor_of_whole_blocks_finds_where_offloaded_ones_compute(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    plain, model = (tiny_model("qwen3", **TINY) for _ in range(2))
    model = offloaded(model, "disk", tmp_path / "offload")
    assert_edits_alike(lambda each: TPatcherEditor.for_backbone(each, [2], steps=2), tiny_tokenizer, plain, model)


def test_a_file_says_where_the_parts_go(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=False)
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "places.yaml").write_text(yaml.safe_dump(HALF_ON_DISK))
    spread, _ = load_model(tmp_path / "model", device_map=str(tmp_path / "places.yaml"))
    devices = [spread.model.layers[i].mlp.down_proj.weight.device.type for i in range(4)]
    assert devices == ["meta", "meta", "cpu", "cpu"] and torch.equal(logits(spread), logits(model))
    (tmp_path / "places.yaml").write_text("- cpu\n")
    with pytest.raises(ValueError, match=r"places\.yaml.*a device_map is a device, cpu or disk by module name"):
        load_model(tmp_path / "model", device_map=str(tmp_path / "places.yaml"))
