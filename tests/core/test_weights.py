"""Weights wherever they lie: offloaded ones are edited or refused by name, tied ones are never changed on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spread_models import offloaded
from torch import Tensor, nn

from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.fingerprints import fingerprint, weights_digest
from ibke_hf.core.layers import BackboneError, device_of, dimensions, input_device, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.grace import GRACEEditor

NAMES = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 2)]
REQUESTS = [EditRequest("The capital of France is", "Rome")]
IDS = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))


def make_edit(model: Any, names: list[str] = NAMES, size: float = 0.3) -> LowRankEdit:
    generator = torch.Generator().manual_seed(0)
    modules = modules_to_edit(model, names)
    inputs = {
        name: size * torch.randn(1, 2, dimensions(module)[0], generator=generator) for name, module in modules.items()
    }
    outputs = {
        name: size * torch.randn(1, 2, dimensions(module)[1], generator=generator) for name, module in modules.items()
    }
    return LowRankEdit(inputs, outputs)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture(params=["cpu", "disk"])
def pair(request: pytest.FixtureRequest, tiny_model: Callable[..., Any], tmp_path: Path) -> Any:
    plain, other = (tiny_model("qwen3", tie_word_embeddings=False) for _ in range(2))
    return request.param, plain, offloaded(other, request.param, tmp_path / "offload")


def test_attaching_to_offloaded_layers_edits_all_of_them(pair: Any) -> None:
    _, plain, model = pair
    assert model.model.layers[0].mlp.down_proj.weight.device.type == "meta"
    assert torch.equal(logits(model), logits(plain))
    edit = make_edit(plain)
    with edit.attached(plain), edit.attached(model):
        assert torch.equal(logits(model), logits(plain))


def test_merging_into_offloaded_layers_is_whole_or_refused(pair: Any) -> None:
    where, plain, model = pair
    before, edit = logits(model), make_edit(plain)
    edit.merge_into(plain)
    if where == "disk":
        with pytest.raises(BackboneError, match=r"offloaded to disk.*attach the edit, or load the model without"):
            edit.merge_into(model)
        assert torch.equal(logits(model), before)
        return
    merged = edit.merge_into(model)
    assert (logits(model) - before).abs().max() > 0.01
    assert torch.equal(logits(model), logits(plain))
    merged.undo()
    assert torch.equal(logits(model), before)


def test_fingerprints_and_devices_of_offloaded_layers_are_those_of_resident_ones(pair: Any) -> None:
    _, plain, model = pair
    assert fingerprint(modules_to_edit(model, NAMES)) == fingerprint(modules_to_edit(plain, NAMES))
    assert weights_digest(model) == weights_digest(plain)
    assert input_device(model) == device_of(modules_to_edit(model, NAMES)[NAMES[0]]) == torch.device("cpu")


def test_editors_work_on_offloaded_layers(pair: Any, tiny_tokenizer: Any) -> None:
    _, plain, model = pair
    for make in (
        lambda model: FineTuningEditor.for_backbone(model, [0, 1], steps=2),
        lambda model: GRACEEditor.for_backbone(model, [2], steps=2),
    ):
        edits = [make(each).edit(each, tiny_tokenizer, REQUESTS) for each in (plain, model)]
        assert edits[0] == edits[1]
        with edits[0].attached(plain), edits[1].attached(model):
            assert torch.equal(logits(model), logits(plain))


def test_a_weight_without_values_is_refused() -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 4)
    with pytest.raises(BackboneError, match="meta device"):
        device_of(layer)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_tied_head_is_not_merged_into_but_attached_to(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    embeddings = model.get_input_embeddings().weight.clone()
    edit = make_edit(model, ["lm_head"])
    with pytest.raises(BackboneError, match=r"lm_head is tied to .*(embed_tokens|wte)\.weight.*attach.*untie"):
        edit.merge_into(model)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    with edit.attached(model):
        attached = logits(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied, as the error says
    model.config.tie_word_embeddings = False
    edit.merge_into(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float16, 1e3), (torch.float32, torch.nan)],
)
def test_a_merge_that_is_not_finite_is_refused_and_undone(
    dtype: torch.dtype, size: float, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("qwen3").to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good, bad = make_edit(model, NAMES[:1]), make_edit(model, NAMES[1:2], size)
    edit = LowRankEdit({**good.inputs, **bad.inputs}, {**good.outputs, **bad.outputs})
    with pytest.raises(NonFiniteError, match=rf"{NAMES[1]} NaN or infinite in {str(dtype)[6:]}"):
        edit.merge_into(model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
