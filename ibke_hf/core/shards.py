"""Backbones whose weights are sharded over processes (FSDP2), each of which holds a part of every weight.

A forward pass gathers the weights block by block, which all processes do together: they have to run the same passes in
the same order. Only the passes of a whole model gather, not a call of one of its layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model's weights are sharded over processes, also while some of them are gathered."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_shard(weight: Any) -> bool:
    """Tell whether a tensor is a part of one that is sharded over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def whole(weight: Tensor) -> Tensor:
    """Return a weight in one piece; one that is sharded is gathered, which all processes have to do together."""
    gathered: Tensor = weight.full_tensor() if is_shard(weight) else weight  # type: ignore[attr-defined]
    return gathered
