"""Noise as large as rounding to few bits makes: how an editor fares on a copy of its backbone in another precision.

A file of 4-bit blocks (such as GGUF's Q4_1) keeps, of each 32 neighbouring weights of a row, the least one and steps
of (greatest - least) / 15; rounding to them errs by at most half a step, alike to either side. Noise of that
distribution stands for the weights that the file was made from, where only the file is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 32  # weights that share a scale, as in GGUF's Q4_1


@torch.no_grad()
def add_rounding_noise(model: nn.Module, bits: int, seed: int = 0) -> float:
    """Add noise of the size that rounding to blocks of so many bits makes to every matrix of a model, in place.

    Args:
        model: The model; matrices whose rows don't fall into whole blocks, and vectors, are left as they are.
        bits: Bits a weight, 2 to 8.
        seed: Seed of the noise.

    Returns:
        Norm of the noise over the norm of the weights it was added to.

    Raises:
        ValueError: If `bits` is out of range, or no matrix can be rounded so.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"rounding noise: a weight is rounded to 2 to 8 bits, found {bits}")
    generator = torch.Generator().manual_seed(seed)
    noise_squares, squares = 0.0, 0.0
    for parameter in model.parameters():  # a tied matrix comes once
        if parameter.dim() != 2 or parameter.shape[1] % BLOCK or not parameter.is_floating_point():
            continue
        noise = _noise(parameter.detach().float().cpu(), bits, generator)
        noise_squares += float(noise.square().sum())
        squares += float(parameter.detach().float().square().sum())
        parameter.add_(noise.to(parameter.device, parameter.dtype))
    if not squares:
        raise ValueError(f"rounding noise: {type(model).__name__} has no matrix with rows of whole blocks of {BLOCK}")
    return float((noise_squares / squares) ** 0.5)


def _noise(weight: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    blocks = weight.unflatten(1, (-1, BLOCK))
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (2**bits - 1)
    return ((torch.rand(blocks.shape, generator=generator) - 0.5) * step).flatten(1)
