"""Finds the FFN output projections of a decoder, and knows how their weights are laid out.

The only place with Linear/Conv1D orientation: it comes from the module's type, never from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MOST_NAMES = 16  # that an error lists


class BackboneError(ValueError):
    """A backbone that does not fit; the message says what was expected, what was found and what to do."""


def is_projection(module: nn.Module) -> bool:
    """Tell whether a module is a linear map: nn.Linear, Conv1D, or a quantised layer with in and out features."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def dimensions(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a projection."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a projection, of a PEFT layer the weight that it wraps.

    Raises:
        BackboneError: If the weight is quantised, so that nothing can be added to it.
    """
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.itemsize < 2
    ):  # 8-bit floats have scales beside
        raise BackboneError(
            "a quantised weight cannot take a merged edit; attach the edit, or load the model unquantised"
        )
    return weight


def add_to_weight(module: nn.Module, update: Tensor) -> None:
    """Add ΔW (d_in, d_out) to a projection's weight in place, accumulated in fp32.

    Raises:
        BackboneError: If the weight is quantised, so that nothing can be added to it.
    """
    weight = weight_of(module)
    oriented = update if is_transposed(module) else update.T
    with torch.no_grad():
        weight.copy_(weight.float() + oriented.to(weight.device))


def is_transposed(module: nn.Module) -> bool:
    """Tell whether the weight is stored (d_in, d_out), which PEFT calls fan_in_fan_out."""
    return isinstance(
        getattr(module, "base_layer", module), Conv1D
    )  # a PEFT layer is oriented as the layer that it wraps


def plain_name(name: str) -> str:
    """Strip what torch.compile, PEFT and DDP put in front of or inside a module's name."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)


def named_projections(model: nn.Module) -> dict[str, nn.Module]:
    """Return every projection of a model by its plain name, a PEFT layer standing for the layer it wraps."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_projection(module) and ".base_layer" not in name and ".lora_" not in name:
            found.setdefault(plain_name(name), module)
    return found


def modules_to_edit(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the named projections in the given order.

    Raises:
        BackboneError: If one is missing; lists what the model has instead.
    """
    projections = named_projections(model)
    missing = next((name for name in names if name not in projections), None)
    if missing is not None:
        candidates = sorted({_template(name) for name in projections})
        found = f"its linear layers are {_listed(candidates)}"
        if _template(missing) in candidates:
            layers = [
                name.split(".")[_layer_index(name) or 0]
                for name in projections
                if _template(name) == _template(missing)
            ]
            found = f"it has {_template(missing)} for i = {_listed(layers)}"
        raise BackboneError(f"{type(model).__name__} has no linear layer named {missing!r}; {found}")
    return {name: projections[name] for name in names}


def find_ffn_output(model: Any) -> str:
    """Return the name template of the FFN output projection, such as ``model.layers.{i}.mlp.down_proj``.

    Structure alone decides: within a decoder block, outside of whatever mixes tokens (attention, convolutions), the
    last registered projection of a sub-module that maps to the hidden size.

    Raises:
        BackboneError: If none or several templates qualify; lists the candidates.
    """
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    mixers = [f"{plain_name(name)}." for name, module in model.named_modules() if _mixes_tokens(name, module)]
    last: dict[str, str] = {}
    for name, module in named_projections(model).items():
        if _layer_index(name) is not None and not name.startswith(tuple(mixers)) and dimensions(module)[1] == hidden:
            last[name.rpartition(".")[0]] = name
    candidates = list(dict.fromkeys(map(_template, last.values())))
    if len(candidates) != 1:
        raise BackboneError(
            f"{type(model).__name__}: {len(candidates)} candidates for the FFN output projection "
            f"({_listed(candidates) or 'none'}); "
            'name the one to edit, such as edited_modules="model.layers.{i}.mlp.down_proj"'
        )
    return candidates[0]


def _mixes_tokens(name: str, module: nn.Module) -> bool:
    """Tell attention by its names, state-space and gated convolution layers by the convolution that they hold."""
    kind = type(module).__name__.rstrip(
        "0123456789"
    )  # FlashAttention2; a LinearAttentionDecoderLayer is a whole block
    if kind.endswith("Attention") or name.endswith(("attn", "attention")):
        return True
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def layers_to_edit(
    model: Any, layers: Sequence[int] | None = None, edited_modules: str | None = None
) -> tuple[str, list[int]]:
    """Return the name template and the indices of the layers that an editor of this model edits.

    Args:
        model: Any decoder of the transformers library.
        layers: The wanted layers; by default three that end just before the middle.
        edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.

    Raises:
        BackboneError: If a layer doesn't exist or is named twice, or the projection is ambiguous.
    """
    template = edited_modules or find_ffn_output(model)
    if "{i}" not in template:
        raise BackboneError(f"edited_modules must contain {{i}} in place of the layer's index, found {template!r}")
    depth = number_of_layers(model)
    chosen = list(layers) if layers is not None else list(range(max(depth // 2 - 2, 0), max(depth // 2 + 1, 1)))
    if not chosen or min(chosen) < 0 or max(chosen) >= depth:
        raise BackboneError(f"layers must be between 0 and {depth - 1} for this backbone, found {chosen}")
    if len(set(chosen)) < len(chosen):
        raise BackboneError(f"layers must differ, found {chosen}")
    return template, chosen


def number_of_layers(model: Any) -> int:
    """Return the number of decoder blocks that the config states."""
    return int(model.config.get_text_config().num_hidden_layers)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a projection computes on."""
    return next(chain(module.parameters(), module.buffers())).device  # some quantised layers have buffers alone


def input_device(model: Any) -> torch.device:
    """Return the device that token ids have to be on, also for a model spread by `device_map`."""
    return next(model.get_input_embeddings().parameters()).device


def _layer_index(name: str) -> int | None:
    return next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _template(name: str) -> str:
    """Replace the block number of a module name by ``{i}``."""
    parts, index = name.split("."), _layer_index(name)
    return name if index is None else ".".join([*parts[:index], "{i}", *parts[index + 1 :]])
