"""What a router reads: the states of a model at a few places below its lowest edited layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attachment import detached, hooked
from ..core.forward import evaluating, target_logits
from ..core.layers import BackboneError, dimensions, is_projection, modules_to_edit, plain_name
from ..core.tokens import TokenBatch

MOST_BLOCKS = 3  # whose outputs are read, besides the embeddings and the input of the lowest edited layer


class _Reached(Exception):  # noqa: N818  control flow
    """The pass has come to the lowest edited layer."""


@dataclass(frozen=True)
class Sources:
    """The places of a model that a router reads.

    Attributes:
        names: Modules whose outputs are read: the embeddings and blocks below the lowest edited layer.
        lowest: The lowest edited layer, whose input is read.
        dims: Width of each state, that of the lowest layer last.
    """

    names: tuple[str, ...]
    lowest: str
    dims: tuple[int, ...]

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules by name, the lowest edited layer last.

        Raises:
            BackboneError: If one is missing; names it.
        """
        modules = {plain_name(name): module for name, module in model.named_modules()}
        if missing := [name for name in self.names if name not in modules]:
            raise BackboneError(
                f"{type(model).__name__} has no module named {missing[0]!r}, which the router reads; train one for "
                f"this model: ibke train-router"
            )
        lowest = modules_to_edit(model, [self.lowest])
        return {name: modules[name] for name in self.names} | lowest


def sources_of(model: Any, layers: Sequence[str]) -> Sources:
    """Return what a router of the editors of these layers reads: what is computed before the lowest of them.

    Raises:
        BackboneError: If the model lacks a layer, or the layers are not in one list of blocks.
    """
    modules_to_edit(model, layers)
    names = {plain_name(name): module for name, module in model.named_modules()}
    parts = [name.split(".") for name in layers]
    places = [next((i for i, part in enumerate(name) if part.isdigit()), -1) for name in parts]
    if not parts or min(places) < 1:
        raise BackboneError(f"{', '.join(layers) or 'no layer'}: a router needs edited layers within numbered blocks")
    prefixes = {".".join(name[:place]) for name, place in zip(parts, places, strict=True)}
    if len(prefixes) > 1:
        raise BackboneError(f"the edited layers are in several lists of blocks: {', '.join(sorted(prefixes))}")
    prefix = prefixes.pop()
    block, lowest = min((int(name[place]), ".".join(name)) for name, place in zip(parts, places, strict=True))
    embeddings = model.get_input_embeddings()
    read = [name for name, module in names.items() if module is embeddings][:1]
    step = max(block / MOST_BLOCKS, 1)
    chosen = sorted({block - 1 - round(i * step) for i in range(MOST_BLOCKS)} & set(range(block)))
    read += [f"{prefix}.{i}" for i in chosen]
    probe = Sources(tuple(read), lowest, ())
    states, _ = read_states(model, probe, _two_tokens(model))
    return Sources(tuple(read), lowest, tuple(state.shape[-1] for state in states))


def _two_tokens(model: Any) -> TokenBatch:
    ids = torch.arange(1, 3).unsqueeze(0) % int(model.get_input_embeddings().weight.shape[0])
    ones = torch.ones_like(ids)
    return TokenBatch(ids, ones, ids)


def dimension_of(model: Any, name: str, module: nn.Module, lowest: str) -> int | None:
    """Return the width of a state without running the model, None where it cannot be told."""
    if name == lowest:
        return dimensions(module)[0]
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    if is_projection(module):
        return dimensions(module)[1]
    return getattr(model.config.get_text_config(), "hidden_size", None)


@torch.no_grad()
def read_states(model: Any, sources: Sources, batch: TokenBatch) -> tuple[list[Tensor], Tensor]:
    """Run a model up to its lowest edited layer, unedited.

    Args:
        model: The backbone.
        sources: What is read.
        batch: The texts.

    Returns:
        The states (b, l, d) at each source, and the mask (b, l) of real tokens, on the device of the lowest layer.
    """
    modules = sources.modules(model)
    states: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(x: Tensor, y: Tensor) -> Tensor:
            states[name] = y
            return y

        return hook

    def stop(x: Tensor, y: Tensor) -> Tensor:
        states[sources.lowest] = x
        raise _Reached

    hooks = {name: stop if name == sources.lowest else record(name) for name in modules}
    try:
        with evaluating(model), detached(), hooked(modules, hooks):
            target_logits(model, batch)
    except _Reached:
        mask = batch.attention_mask.bool()
        device = states[sources.lowest].device
        rows = [by_token(states[name].to(device), mask) for name in modules]
        return rows, mask.to(device)
    raise BackboneError(f"{type(model).__name__} never calls {sources.lowest}, so nothing can be read before it")


def by_token(states: Tensor, mask: Tensor) -> Tensor:
    """Give states as (b, l, d) also for models that flatten batch and tokens."""
    return states.reshape(*mask.shape, states.shape[-1])
