"""Finds the FFN output projections of a decoder, and knows how their weights are laid out.

The only place with Linear/Conv1D orientation: it comes from the module's type, never from shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .offload import execution_device

MOST_NAMES = 16  # that an error lists
FEW = 4  # FFN outputs in fewer than one of so many blocks are passed over

logger = logging.get_logger(__name__)


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
    projections: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_projection(module) and ".base_layer" not in name and ".lora_" not in name:
            projections.setdefault(plain_name(name), module)
    return projections


def modules_to_edit(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the named projections in the given order.

    Raises:
        BackboneError: If one is missing; lists what the model has instead.
    """
    projections = named_projections(model)
    missing = next((name for name in names if name not in projections), None)
    if missing is not None:
        candidates = sorted({_template(name) for name in projections})
        alternatives = f"its linear layers are {_listed(candidates)}"
        if _template(missing) in candidates:
            layers = [str(_block_of(name)) for name in projections if _template(name) == _template(missing)]
            alternatives = f"it has {_template(missing)} for i = {_listed(layers)}"
        raise BackboneError(f"{type(model).__name__} has no linear layer named {missing!r}; {alternatives}")
    return {name: projections[name] for name in names}


def find_ffn_output(model: Any) -> str:
    """Return the name template of the FFN output projection, such as ``model.layers.{i}.mlp.down_proj``.

    Structure alone decides: within a decoder block, outside of whatever mixes tokens (attention, convolutions) and of
    routed experts, the last registered projection of a sub-module that maps to the hidden size. Of templates that
    share no block, as where the first blocks have a plain FFN and the others a shared expert, the one of most blocks.

    Raises:
        BackboneError: If none or several templates qualify; lists the candidates.
    """
    return _only_candidate(model, _output_projections(model, mixing=False), "FFN output projection")


def projection_to_edit(model: Any) -> str:
    """Return the name template that is edited by default: the FFN's output, else that of attention.

    Models whose FFNs are routed experts, held in one tensor for all, have no FFN output that can be edited (or in few
    blocks only); the output projection of their attention is edited there, and a warning says so once.

    Raises:
        BackboneError: If neither is found, or several are; lists the candidates and what to name.
    """
    outputs = _output_projections(model, mixing=False)
    blocks = {layer for layers in outputs.values() for layer in layers}
    if len(blocks) * FEW < number_of_layers(model) and (mixers := _output_projections(model, mixing=True)):
        template = _only_candidate(model, mixers, "output projection of attention")
        logger.warning_once(
            f"{type(model).__name__}: {'few' if blocks else 'none'} of its blocks has an FFN output that can be "
            f"edited (routed experts cannot yet); {template} is edited in its place, which may store facts less well. "
            "Choose another with edited_modules"
        )
        return template
    return _only_candidate(model, outputs, "FFN output projection")


def _only_candidate(model: Any, candidates: Mapping[str, Sequence[int]], what: str) -> str:
    """Return the one template, or of several that share no block the one of most blocks."""
    layers = [layer for of_one in candidates.values() for layer in of_one]
    ranked = sorted(candidates, key=lambda template: -len(candidates[template]))
    apart = len(set(layers)) == len(layers)
    if ranked and (len(ranked) == 1 or (apart and len(candidates[ranked[0]]) > len(candidates[ranked[1]]))):
        return ranked[0]
    candidates = candidates or _output_projections(model, mixing=False, routed=True)
    raise BackboneError(
        f"{type(model).__name__}: {len(candidates)} candidates for the {what} "
        f"({_listed(list(candidates)) or 'none'}); "
        'name the one to edit, such as edited_modules="model.layers.{i}.mlp.down_proj" (--edited-modules)'
        + (
            f"; its linear layers are {_listed(sorted({_template(n) for n in named_projections(model)}))}"
            * (not candidates)
        )
    )


def _output_projections(model: Any, *, mixing: bool, routed: bool = False) -> dict[str, list[int]]:
    """Return the templates of projections that end a part of a decoder block, with the blocks that have each.

    Args:
        model: Any decoder of the transformers library.
        mixing: Those within attention, else those outside of whatever mixes tokens. (State-space layers may hand
            the weight of their output to a kernel, which calls no hook.)
        routed: Those of the numbered parts of a block, such as routed experts, which see some tokens only.
    """
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    text = _text_decoder(model)
    mixers = {
        f"{plain_name(name)}.": _is_attention(name, module)
        for name, module in model.named_modules()
        if _mixes_tokens(name, module)
    }
    last: dict[str, str] = {}
    for name, module in named_projections(model).items():
        numbers = sum(part.isdigit() for part in name.split(".")[:-1])  # of the block, and of a routed expert in it
        if numbers == 0 or (numbers > 1) != routed or not name.startswith(text) or dimensions(module)[1] != hidden:
            continue
        if mixing and "gate" in name.rpartition(".")[2]:
            continue  # scales what a mixer returns, and may be registered behind its output
        mixer = next((mixer for mixer in mixers if name.startswith(mixer)), None)
        if (mixer is not None) == mixing and (mixer is None or mixers[mixer]):
            last[mixer or name.rpartition(".")[0]] = name
    templates: dict[str, list[int]] = {}
    for name in last.values():
        templates.setdefault(_template(name), []).append(_block_of(name))
    return templates


def _text_decoder(model: Any) -> str:
    """Return the prefix of the names of the decoder's modules, which leaves out towers for images and sound."""
    inner = getattr(model, "get_decoder", lambda: None)()
    if not isinstance(inner, nn.Module) or inner is model or is_projection(inner):  # some call their LM head a decoder
        return ""
    return next((f"{plain_name(name)}." for name, module in model.named_modules() if name and module is inner), "")


def _mixes_tokens(name: str, module: nn.Module) -> bool:
    """Tell attention by its names, state-space and gated convolution layers by the convolution that they hold."""
    return _is_attention(name, module) or any(isinstance(child, nn.Conv1d) for child in module.children())


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__.rstrip("0123456789")  # FlashAttention2; LinearAttentionDecoderLayer is a whole block
    return kind.endswith("Attention") or name.endswith(("attn", "attention"))


def layers_to_edit(
    model: Any,
    layers: Sequence[int] | None = None,
    edited_modules: str | None = None,
    *,
    default: Sequence[int] | None = None,
) -> tuple[str, list[int]]:
    """Return the name template and the indices of the layers that an editor of this model edits.

    Args:
        model: Any decoder of the transformers library.
        layers: The layers that the user asks for.
        edited_modules: Name template with ``{i}``; by default the projection found by structure.
        default: The editor's own choice where the user makes none, each moved to the nearest layer that has the
            projection; three that end just before the middle if not given.

    Raises:
        BackboneError: If a layer doesn't exist or is named twice, or the projection is ambiguous.
    """
    template = edited_modules or projection_to_edit(model)
    if "{i}" not in template:
        raise BackboneError(f"edited_modules must contain {{i}} in place of the layer's index, found {template!r}")
    depth = number_of_layers(model)
    chosen = _default_layers(model, template, default) if layers is None else list(layers)
    if not chosen or min(chosen) < 0 or max(chosen) >= depth:
        raise BackboneError(f"layers must be between 0 and {depth - 1} for this backbone, found {chosen}")
    if len(set(chosen)) < len(chosen):
        raise BackboneError(f"layers must differ, found {chosen}")
    return template, chosen


def _default_layers(model: Any, template: str, default: Sequence[int] | None) -> list[int]:
    depth = number_of_layers(model)
    having = sorted({_block_of(name) for name in named_projections(model) if _template(name) == template})
    having = having or list(range(depth))  # whoever looks the modules up says which name is missing
    if default is None:
        return [layer for layer in having if layer <= depth // 2][-3:] or having[:3]
    return sorted({min(having, key=lambda layer: abs(layer - preferred)) for preferred in default})


def number_of_layers(model: Any) -> int:
    """Return the number of decoder blocks that the config states.

    Raises:
        BackboneError: If it states none.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        raise BackboneError(f"{type(model).__name__}: its config states no num_hidden_layers, so it cannot be edited")
    return int(depth)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a projection, or a part that consists of some, computes on.

    Raises:
        BackboneError: If its weights have no values and nothing brings them in.
    """
    device = next(chain(module.parameters(), module.buffers())).device  # some quantised layers have buffers alone
    if device.type != "meta":
        return device
    computes_on = next(filter(None, map(execution_device, module.modules())), None)
    if computes_on is None:
        raise BackboneError(
            f"a {type(module).__name__} has no values (they are on the meta device); load the model's weights, "
            f"without preload_module_classes if they are offloaded"
        )
    return computes_on


def input_device(model: Any) -> torch.device:
    """Return the device that token ids have to be on, also for a model spread or offloaded by `device_map`."""
    return device_of(model.get_input_embeddings())


def _layer_index(name: str) -> int | None:
    return next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None)


def _block_of(name: str) -> int:
    """Return the number of the decoder block in a module's name."""
    return int(name.split(".")[_layer_index(name) or 0])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _template(name: str) -> str:
    """Replace the block number of a module name by ``{i}``."""
    parts, index = name.split("."), _layer_index(name)
    return name if index is None else ".".join([*parts[:index], "{i}", *parts[index + 1 :]])
