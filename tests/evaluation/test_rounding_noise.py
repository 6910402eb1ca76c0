"""Noise of the size of rounding: as large as real rounding's error, for matrices alone, the same for a seed."""

import copy

import pytest
import torch
from torch import nn

from ibke_hf.atlas import load_backbone
from ibke_hf.cli import main
from ibke_hf.evaluation.rounding_noise import BLOCK, add_rounding_noise
from ibke_hf.io import read_json


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round as GGUF's Q4_1 does: of each block the least weight, and whole steps from there."""
    result = weight.clone()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], BLOCK):
            block = weight[row, start : start + BLOCK]
            step = (block.max() - block.min()) / (2**bits - 1)
            result[row, start : start + BLOCK] = block.min() + ((block - block.min()) / step).round() * step
    return result


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_noise_is_as_large_as_rounding_errs(bits: int) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(256, 64)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    error = (rounded(before, bits) - before).norm() / before.norm()
    share = add_rounding_noise(layer, bits)
    assert share == pytest.approx(float(error), rel=0.05)
    assert float((layer.weight.detach() - before).norm() / before.norm()) == pytest.approx(share, rel=1e-4)
    assert torch.equal(layer.bias, bias)


def test_a_seed_gives_the_same_noise_and_tied_matrices_get_it_once() -> None:
    model, _ = load_backbone()
    first, second, other = (copy.deepcopy(model) for _ in range(3))
    assert add_rounding_noise(first, 4) == add_rounding_noise(second, 4, seed=0)
    add_rounding_noise(other, 4, seed=1)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.dim() == 2:
            assert not torch.equal(one, three), name
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="2 to 8 bits, found 1"):
        add_rounding_noise(nn.Linear(32, 4), 1)
    with pytest.raises(ValueError, match="Linear has no matrix with rows of whole blocks of 32"):
        add_rounding_noise(nn.Linear(33, 4), 4)


def test_an_evaluation_says_how_much_noise_was_added(tmp_path) -> None:
    command = ["eval", "--dataset", "atlas", "--editor", "none", "--limit", "3", "--no-generate"]
    assert main([*command, "--rounding-noise", "3", "--out", str(tmp_path / "noisy")]) == 0
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    settings = read_json(tmp_path / "noisy" / "results.json")["settings"]
    assert settings["rounding_noise"]["bits"] == 3 and 0.01 < settings["rounding_noise"]["share"] < 0.5
    assert "rounding_noise" not in read_json(tmp_path / "plain" / "results.json")["settings"]
