"""Layers whose weights accelerate keeps elsewhere (a `device_map` with cpu or disk) and brings in for a forward pass.

Between forward passes such a weight is an empty tensor on the meta device: reading it gives nothing and writing to it
does nothing, without an error. Accelerate is not imported: its hooks lie on the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any:
    """Return the hook of accelerate that brings a layer's weights in, None where they stay."""
    hook = getattr(getattr(module, "base_layer", module), "_hf_hook", None)  # a PEFT layer wraps the layer
    return next((part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device that an offloaded layer computes on, None where it is not offloaded."""
    hook = offload_hook(module)
    if hook is None or hook.execution_device is None:
        return None
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def offloaded_tensor(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a tensor of an offloaded layer, read from memory or disk; None where there is none."""
    hook = offload_hook(module)
    if hook is None or hook.weights_map is None:
        return None
    try:
        tensor = hook.weights_map[name]
    except KeyError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def is_in_memory(module: nn.Module) -> bool:
    """Tell whether an offloaded weight lies in memory, so that writing lasts; one on disk is read anew each time."""
    first, second = offloaded_tensor(module), offloaded_tensor(module)
    return first is not None and second is not None and first.data_ptr() == second.data_ptr()
