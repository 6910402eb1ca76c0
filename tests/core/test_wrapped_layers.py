"""Layers behind wrappers, quantised ones, and updates in their own orientation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibke_hf.core.layers import (
    BackboneError,
    device_of,
    dimensions,
    find_ffn_output,
    input_device,
    is_projection,
    is_transposed,
    modules_to_edit,
    named_projections,
    plain_name,
)
from ibke_hf.core.weights import add_to_weight, weight_of


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_proj"),
        ("_orig_mod.model.layers.0.mlp", "model.layers.0.mlp"),
        ("base_model.model.model.layers.0.mlp", "model.layers.0.mlp"),
        ("_orig_mod.base_model.model.model.layers.0", "model.layers.0"),
        ("module._orig_mod.model.layers.0", "model.layers.0"),
        ("model.layers.0._orig_mod.mlp", "model.layers.0.mlp"),
        ("_orig_mod.module.base_model.model.transformer", "transformer"),
        ("model.my_module.layers.0", "model.my_module.layers.0"),
        ("model.module.layers.0", "model.module.layers.0"),
        ("", ""),
    ],
)
def test_wrappers_are_stripped_from_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("wrap", ["compile", "peft", "peft and compile", "one block compiled", "data parallel"])
def test_wrapped_models_keep_their_names(tiny_model: Callable[..., Any], family: str, wrap: str) -> None:
    plain = tiny_model(family)
    plain_projections, template = named_projections(plain), find_ffn_output(plain)
    model: Any = plain
    if "peft" in wrap:
        peft = pytest.importorskip("peft")
        targets = ["c_proj", "c_attn"] if family == "gpt2" else ["down_proj", "q_proj"]
        config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
        model = peft.get_peft_model(model, config)
    if wrap == "one block compiled":
        blocks = model.get_submodule(template.partition(".{i}")[0])
        blocks[1] = torch.compile(blocks[1])
    elif "compile" in wrap:
        model = torch.compile(model)
    if wrap == "data parallel":
        model = nn.DataParallel(model)
        model.config = plain.config
    projections = named_projections(model)
    assert set(projections) == set(plain_projections)
    assert find_ffn_output(model) == template
    for name, module in modules_to_edit(model, [template.format(i=1)]).items():
        assert dimensions(module) == dimensions(plain_projections[name]) == (48, 32)
        assert weight_of(module) is weight_of(
            plain_projections[name]
        )  # a PEFT layer stands for the layer that it wraps
        assert is_transposed(module) == (family == "gpt2")
    if wrap != "data parallel":
        assert input_device(model) == torch.device("cpu")


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 6), (6, 4), (4, 6)])
def test_updates_are_added_in_the_layers_own_orientation(kind: type, d_in: int, d_out: int) -> None:
    torch.manual_seed(0)
    layer = Conv1D(d_out, d_in) if kind is Conv1D else nn.Linear(d_in, d_out)
    assert is_projection(layer)
    assert dimensions(layer) == (d_in, d_out)
    x, update = torch.randn(3, d_in), torch.randn(d_in, d_out)
    with torch.no_grad():
        expected = layer(x) + x @ update
        add_to_weight(layer, update)
        torch.testing.assert_close(layer(x), expected)


def test_updates_of_16_bit_weights_are_summed_in_fp32() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    expected = (layer.weight.float() + 1e-3).to(torch.bfloat16)
    add_to_weight(layer, torch.full((4, 3), 1e-3))
    assert torch.equal(layer.weight, expected)


class Quantised(nn.Module):
    """Like the layers of quantisers: widths, and a weight of bytes in a buffer or a parameter."""

    def __init__(self, weight: torch.Tensor, parameter: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        if parameter:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("qweight", weight)


@pytest.mark.parametrize(
    "layer",
    [
        Quantised(torch.zeros(3, 4, dtype=torch.uint8), parameter=False),
        Quantised(torch.zeros(3, 4, dtype=torch.int8), parameter=True),
        Quantised(torch.zeros(3, 4).to(torch.float8_e4m3fn), parameter=True),
    ],
)
def test_quantised_layers_are_found_and_take_no_merged_edit(layer: Quantised) -> None:
    assert is_projection(layer)
    assert dimensions(layer) == (4, 3)
    assert device_of(layer) == torch.device("cpu")
    with pytest.raises(BackboneError, match="a quantised weight cannot take a merged edit; attach the edit"):
        add_to_weight(layer, torch.zeros(4, 3))


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Embedding(3, 4), nn.Conv1d(4, 4, 1), nn.ReLU()])
def test_other_modules_are_no_projections(module: nn.Module) -> None:
    assert not is_projection(module)
