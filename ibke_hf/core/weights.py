"""Reading and writing the weights of projections: wherever they lie, and only where nothing else changes too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .capture import NonFiniteError
from .layers import BackboneError, is_transposed
from .offload import is_in_memory, offload_hook, offloaded_tensor
from .shards import is_shard


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a projection, to be changed in place; of a PEFT layer the weight that it wraps.

    Raises:
        BackboneError: If the weight is quantised, sharded or offloaded to disk, so that nothing can be added to it.
    """
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize < 2
    ):  # 8-bit floats have scales beside
        raise BackboneError(
            "a quantised weight cannot take a merged edit; attach the edit, or load the model unquantised"
        )
    if is_shard(weight):
        raise BackboneError(
            "the weight is sharded over processes, each of which holds a part; attach the edit, or merge it into the "
            "model loaded in one process"
        )
    if weight.device.type != "meta":
        return weight
    offloaded = offloaded_tensor(module) if is_in_memory(module) else None
    if offloaded is None:
        where = "offloaded to disk" if offload_hook(module) is not None else "without values (on the meta device)"
        raise BackboneError(
            f"the weight is {where}, where a merged edit would be lost; attach the edit, or load the model without "
            f"a device_map that offloads to disk"
        )
    return offloaded


def add_to_weight(module: nn.Module, update: Tensor, name: str = "the layer") -> None:
    """Add ΔW (d_in, d_out) to a projection's weight in place, accumulated in fp32.

    Args:
        module: The projection.
        update: ΔW.
        name: What errors call the layer.

    Raises:
        BackboneError: If the weight is quantised or on disk, so that nothing can be added to it.
        NonFiniteError: If the sum is not finite in the weight's precision; the weight is as it was then.
    """
    weight = weight_of(module)
    oriented = update if is_transposed(module) else update.T
    with torch.no_grad():
        total = (weight.float() + oriented.to(weight.device)).to(weight.dtype)
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"merging makes the weight of {name} NaN or infinite in {str(weight.dtype).removeprefix('torch.')}; "
                f"the edit is too large or damaged, or the weight was: make the edit again"
            )
        weight.copy_(total)


def require_untied(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse to write to weights that other modules share, such as a head that is tied to the embeddings.

    Raises:
        BackboneError: If one is shared; names both and what to do.
    """
    for name, module in modules.items():
        sharer = _sharer(model, getattr(module, "base_layer", module))
        if sharer is not None:
            raise BackboneError(
                f"the weight of {name} is tied to {sharer}, which merging would change too; attach the edit instead, "
                f"or untie them first (give the layer a copy of the weight as a new nn.Parameter and set "
                f"config.tie_word_embeddings = False)"
            )


def _sharer(model: nn.Module, module: nn.Module) -> str | None:
    """Return the name of a parameter of another module that is the weight of this one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    weight_name = ""
    for prefix, other in model.named_modules():
        if other is module:
            weight_name = f"{prefix}.weight"
            continue
        for name, parameter in other.named_parameters(recurse=False):
            if parameter is weight or (parameter.data_ptr() == weight.data_ptr() != 0):
                return f"{prefix}.{name}"
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if weight.device.type != "meta" or not isinstance(tied, Mapping):  # offloaded weights have no address
        return None
    return tied.get(weight_name) or next((other for other, name in tied.items() if name == weight_name), None)
