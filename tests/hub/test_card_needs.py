"""What training an editor needs: parameters of the published backbones."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ibke_hf.core.configuration_ibke import PRESETS
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.training.needs import SHAPES, training_needs


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
    counted = needs.memory().pop("a step")[1]
    assert counted == needs.step_passes.peak > 0
    for formula, size in list(needs.memory().values())[:2]:
        assert math.prod(int(number.replace(",", "")) for number in re.findall(r"(?:^|× )([\d,]+)", formula)) == size
