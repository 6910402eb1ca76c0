"""Fingerprints of weights: a sample that tells backbones apart in any precision, and digests that tell any change.

Each answers another question. An edit remembers a *sample* of its layers, which survives rounding to another
precision. A run that is taken up again compares the *digest* of all weights. A cache of what a model computes is
named by a *quick digest*: a few values of every parameter, so that a large model is not read through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .offload import offloaded_tensor
from .shards import whole

SAMPLED = 16  # values of a layer
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(modules: Mapping[str, nn.Module], values: int = SAMPLED) -> dict[str, list[float]]:
    """Sample a few weights of each layer: tells backbones apart in any precision (compare with a 2 % tolerance)."""
    sampled = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type == "meta":
            weight = offloaded_tensor(module)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
            sampled[name] = [round(v, 6) for v in whole(weight.detach()).flatten()[:values].float().tolist()]
    return sampled


def same_backbone(mine: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Compare two fingerprints on the layers that both have."""
    return all(
        len(mine[name]) == len(other[name])
        and torch.allclose(torch.tensor(mine[name]), torch.tensor(other[name]), rtol=0.02, atol=1e-4)
        for name in set(mine) & set(other)
    )


def weights_digest(module: nn.Module, *more: str) -> str:
    """Tell a module from one of any other weights; they are summed as integers: exact in any order, and quick.

    Args:
        module: The module.
        more: What else is part of the digest.
    """
    parts = []
    for name, tensor in module.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        stored = offloaded_tensor(module.get_submodule(prefix), leaf) if tensor.is_meta else None
        parts.append(f"{name} {tuple(tensor.shape)} {_integer_sum(whole(tensor) if stored is None else stored)}")
    return digest_of([*more, *parts], length=12)


def quick_digest(module: nn.Module, *more: str) -> str:
    """Tell a module from others by a few values of every parameter.

    Args:
        module: The module.
        more: What else is part of the digest.
    """
    digest = hashlib.sha256(" ".join(more).encode())
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta":
            digest.update(
                name.encode() + whole(parameter.detach()).flatten()[:SAMPLED].float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()[:24]


def digest_of(parts: Iterable[str], *, length: int) -> str:
    """Return the first hexadecimal digits of the SHA-256 of texts, one a line."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:length]


def _integer_sum(tensor: Tensor) -> int | None:
    if tensor.is_meta or tensor.is_complex():
        return None
    return int(tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
