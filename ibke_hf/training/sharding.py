"""Shards a frozen backbone over the processes of a training, for backbones that one device does not hold.

The editor is not sharded: each process has the whole of it and trains it on records of its own (DDP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.layers import BackboneError
from ..core.offload import offload_hook


def shard_backbone(model: Any, device: torch.device) -> Any:
    """Shard a backbone over all processes (FSDP2), block by block; each keeps a part of every weight on its device.

    Args:
        model: The backbone, loaded in each process, in its memory; it is changed and frozen.
        device: Where this process computes.

    Raises:
        BackboneError: If it cannot be sharded; says why.
        ValueError: If there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "a backbone is sharded over several processes, and there is one; start them with torchrun or accelerate "
            "launch, or leave sharding out"
        )
    if any(offload_hook(module) is not None for module in model.modules()):
        raise BackboneError("a backbone that a device_map spreads cannot be sharded too; choose one of them")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise BackboneError("a quantised backbone cannot be sharded; load it unquantised, or whole in each process")
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embeddings and head
    return model


def end_processes() -> bool:
    """End the group of processes that a training ran in, where it ran in several; tell whether this is the first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    first = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    return first


def _blocks(model: Any) -> nn.ModuleList:
    """Return the decoder's blocks: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise BackboneError(f"{type(model).__name__}: has no list of blocks, by which it would be sharded")
    return max(lists, key=len)
