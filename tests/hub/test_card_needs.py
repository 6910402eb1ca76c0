"""What training an editor needs: parameters of the published backbones, and activations that autograd keeps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ibke_hf.core.attachment import hooked
from ibke_hf.core.configuration_ibke import PRESETS
from ibke_hf.core.layers import modules_to_edit
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.hub.cards.needs import CASES, ROW_TOKENS, SHAPES, training_needs


def meta_backbone(backbone: str) -> Any:
    kind, shape = SHAPES[backbone]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("EleutherAI/gpt-j-6b", 6_050_882_784),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_are_those_of_the_published_backbone_and_of_the_editor(backbone: str, parameters: int) -> None:
    needs, m, rows = training_needs(backbone), 1024, 10
    assert needs.backbone_parameters == parameters
    attention = [
        3 * m * m + 3 * m + 2 * (w - m) * m for w in needs.widths
    ]  # from the latent to the factors; the readout is the same size
    readout = [w * m + 2 * m * m + 3 * m for w in needs.widths]
    expected = (
        sum(rows * m + 2 * a + r + m * w + w + m + 1 for a, r, w in zip(attention, readout, needs.widths, strict=True))
        + 3
    )
    assert needs.editor_parameters == expected
    preset = PRESETS[backbone]
    with torch.device("meta"):
        built = IBKEEditor.for_backbone(meta_backbone(backbone), preset["edited_layers"])
    assert built.config.edited_modules == preset["edited_modules"]
    assert (built.config.input_dims, built.config.output_dims) == (needs.config.input_dims, needs.config.output_dims)
    assert needs.total == sum(size for _, size in needs.memory().values())
    for formula, size in needs.memory().values():
        assert math.prod(int(number.replace(",", "")) for number in re.findall(r"(?:^|× )([\d,]+)", formula)) == size


@pytest.mark.parametrize("backbone", SHAPES)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(backbone: str) -> None:
    needs, rows = training_needs(backbone), 2
    model = meta_backbone(backbone).to(getattr(torch, needs.dtype))
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.update({} if storage._cdata in weights else {storage._cdata: storage})
        return tensor

    def start(_: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        torch._C._set_grad_enabled(True)
        return output.detach().requires_grad_(True)

    with torch.device("meta"):
        ids, mask = (
            torch.zeros(rows, ROW_TOKENS, dtype=torch.long),
            torch.ones(rows, 1, ROW_TOKENS, ROW_TOKENS, dtype=torch.bool),
        )
    lowest = modules_to_edit(model, needs.config.module_names()[:1])
    with (
        torch.no_grad(),
        hooked(lowest, dict.fromkeys(lowest, start)),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    estimate = needs.memory()["activations"][1] * rows / (needs.batch * CASES)
    assert 0.75 < kept_bytes / estimate < 1.25
