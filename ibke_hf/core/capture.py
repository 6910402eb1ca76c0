"""Requests + backbone -> gradient factors of the edited layers (Eq. 25); learns nothing.

Only activations get gradients: the graph starts at the output of the lowest edited layer, weights never do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attachment import LayerHook, hooked
from .forward import evaluating, target_logits
from .layers import BackboneError, input_device
from .shards import is_sharded
from .tokens import IGNORED, TokenBatch

__all__ = [
    "GradientFactors",
    "NonFiniteError",
    "capture_factors",
    "case_losses",
    "evaluating",
    "graph_starting_at",
    "hidden_of",
    "mean_per_row",
    "read_layers",
    "require_finite",
    "target_logits",
]


class NonFiniteError(ArithmeticError):
    """A NaN or infinity; the message names the layer and the request, or the loss term and the step."""


@dataclass(frozen=True)
class GradientFactors:
    """Factors of one edited layer for b requests: grad W = hᵀu for each of them (Eq. 25).

    Attributes:
        layer_inputs: h, (b, l_e, d_in), fp32.
        output_gradients: u, (b, l_e, d_out), fp32: the gradient of each request's loss at the layer's output.
        mask: (b, l_e), True on real tokens; both factors are zero elsewhere.
        output_norms: ‖hW‖ per request (b,), what side paths are measured against.
    """

    layer_inputs: Tensor
    output_gradients: Tensor
    mask: Tensor
    output_norms: Tensor

    def __len__(self) -> int:
        return self.layer_inputs.shape[0]

    def to(self, device: torch.device | str) -> GradientFactors:
        """Return the factors on another device."""
        return GradientFactors(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def capture_factors(
    model: Any,
    modules: Mapping[str, nn.Module],
    batch: TokenBatch,
    *,
    loss_scale: float = 1.0,
    names: Sequence[str] | None = None,
) -> dict[str, GradientFactors]:
    """Read the gradient factors of a batch of requests off a backbone.

    The loss is the SUM over requests of each one's mean cross-entropy over its target tokens, so u does not shrink
    with the batch. Dropout is off for the length of the call.

    Args:
        model: The backbone, unchanged by the call.
        modules: Edited projections by name, the lowest first or not.
        batch: The requests.
        loss_scale: Multiplies the loss before backward and divides u in fp32 after it, for fp16 backbones.
        names: How errors call the requests; ``request 0``, … by default.

    Raises:
        BackboneError: If a layer does not read the tokens of the requests one by one; names it.
        NonFiniteError: If a loss or factor is not finite, naming layer and request.
    """
    batch = batch.to(input_device(model))
    names = names or [f"request {i}" for i in range(len(batch))]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), recording(modules, inputs, outputs):
        logits, labels = target_logits(model, batch)
        losses = case_losses(logits, labels)
        require_finite(losses, "the loss of the edit request", names)
        gradients = torch.autograd.grad(losses.sum() * loss_scale, [outputs[name] for name in modules])
    factors = {}
    for name, gradient in zip(modules, gradients, strict=True):
        mask = batch.attention_mask.bool().to(gradient.device)
        keep = mask.unsqueeze(-1)
        factors[name] = GradientFactors(
            layer_inputs=_rows(name, inputs[name], mask) * keep,
            output_gradients=_rows(name, gradient, mask) / loss_scale * keep,
            mask=mask,
            output_norms=(_rows(name, outputs[name].detach(), mask) * keep).flatten(1).norm(dim=-1),
        )
        require_finite(factors[name].layer_inputs.flatten(1).sum(-1), f"the input of {name}", names)
        require_finite(factors[name].output_gradients.flatten(1).sum(-1), f"the gradient at {name}", names)
    return factors


def case_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over each row's target positions, in fp32: (b, k, vocabulary), (b, k) -> (b,)."""
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    losses = functional.cross_entropy(logits[rows, columns].float(), labels[rows, columns], reduction="none")
    return mean_per_row(losses, rows, len(labels))


def mean_per_row(values: Tensor, rows: Tensor, number: int) -> Tensor:
    """Average values (p,) over the rows (p,) that they belong to -> (number,)."""
    total = torch.zeros(number, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    return total / torch.bincount(rows, minlength=number).clamp(min=1)


def graph_starting_at(modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
    """Build the autograd graph from the first of these layers to run upwards; for use inside of `torch.no_grad`.

    The caller's no_grad restores the mode. Attach side paths inside of this block, so that they are part of the graph.
    """
    return hooked(modules, dict.fromkeys(modules, _start_graph))


def _start_graph(_: Tensor, output: Tensor) -> Tensor:
    torch.set_grad_enabled(True)  # called as a function it outlives this hook; the no_grad around the pass ends it
    return output


def recording(
    modules: Mapping[str, nn.Module], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> AbstractContextManager[None]:
    """Record inputs and outputs of the layers; the first output to appear becomes the root of the graph."""
    return hooked(modules, {name: _recorder(name, inputs, outputs) for name in modules})


def _recorder(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> LayerHook:
    def record(layer_inputs: Tensor, output: Tensor) -> Tensor:
        inputs[name] = layer_inputs.detach()
        if not torch.is_grad_enabled():  # below this layer nothing needs a graph
            output = _start_graph(layer_inputs, output.detach().requires_grad_(True))
        outputs[name] = output
        return output

    return record


def _rows(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Give fp32 (b, l, d) also for models such as OPT that flatten batch and tokens."""
    places = x.numel() // x.shape[-1]
    if places != mask.numel():
        raise BackboneError(
            f"{name} reads {places} tokens where the requests have {mask.numel()}: the model adds tokens of its own "
            f"(CPM-Ant) or reads each in several streams (ProphetNet), so that a request's tokens cannot be told; "
            f"name another projection (edited_modules=...), or edit another model"
        )
    return x.float().reshape(*mask.shape, -1)


def require_finite(values: Tensor, what: str, names: Sequence[str]) -> None:
    """Check one value per request (b,).

    Raises:
        NonFiniteError: If one is not finite; names `what` and the request.
    """
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"{what} is not finite for {names[bad[0]]}; check the backbone's weights for NaN, "
            "or change the loss scale for an fp16 backbone"
        )


# --- without gradients ---


def read_layers(model: Any, modules: Mapping[str, nn.Module], batch: TokenBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return input (b, l, d_in) and output (b, l, d_out) of some modules by name; what follows them is not run.

    A model that is sharded over processes is run to its end, where it puts its weights away.
    """
    to_the_end = is_sharded(model)
    states: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(name: str) -> LayerHook:
        def record(layer_inputs: Tensor, output: Any) -> Any:
            shape = (*batch.input_ids.shape, -1)
            states[name] = (layer_inputs.reshape(shape), hidden_of(output).reshape(shape))
            if len(states) == len(modules) and not to_the_end:
                raise _AllRead
            return output

        return record

    with torch.no_grad(), suppress(_AllRead), hooked(modules, {name: recorder(name) for name in modules}):
        target_logits(model, batch)
    return states


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of what a projection or a decoder block returns; some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output


class _AllRead(Exception):  # noqa: N818  no error: ends a forward pass that has shown all that it had to
    pass
