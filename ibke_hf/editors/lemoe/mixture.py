"""What LEMoE's edits are: mixtures of experts beside one FFN, and how a token is routed to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.attachment import LayerHook
from ...core.layers import (
    BackboneError,
    dimensions,
    modules_to_edit,
)
from ..memory import MemoryEdit

EXPERT = ("down", "down_bias", "up", "up_bias")  # the weights of an expert
# scores that are equal to 1/TIE tie, and the newest expert wins: whoever edits a fact again means the last answer
TIE = 1e4


@dataclass(frozen=True, eq=False)
class LEMoEEdit(MemoryEdit):
    """n independent mixtures of e experts beside one FFN.

    Attributes:
        memory: ``keys`` (n, e, a, d_in): the anchors of each expert, of unit length, zero where one has fewer than a.
            ``down`` (n, e, d_in, w), ``down_bias`` (n, e, w), ``up`` (n, e, w, d_out), ``up_bias`` (n, e, d_out): E(v)
            = gelu(v down + b) up + c.
        settings: ``layer``, the hooked projection, ``top_k``, ``threshold`` and ``temperature``.
    """

    kind = "lemoe"

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        super().__post_init__()
        if set(self.memory) != {"keys", *EXPERT} or len({tensor.shape[1] for tensor in self.memory.values()}) > 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.memory.items()}
            raise ValueError(
                f"a mixture needs keys, {', '.join(EXPERT)} of the same number of experts, found {shapes}"
            )

    @property
    def experts(self) -> int:
        """Number of experts of each edit."""
        return self.memory["keys"].shape[1]

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return the hook of the FFN output projection.

        Raises:
            BackboneError: If the layer is missing or has other widths.
        """
        name = self.settings["layer"]
        module = modules_to_edit(model, [name])[name]
        widths = (self.memory["down"].shape[2], self.memory["up"].shape[3])
        if dimensions(module) != widths:
            raise BackboneError(
                f"the edit expects {name} to map {widths[0]} to {widths[1]}, the model's maps "
                f"{dimensions(module)[0]} to "
                f"{dimensions(module)[1]}; it was made for another backbone"
            )
        return {name: (module, self._replace)}

    def _replace(self, layer_inputs: Tensor, output: Tensor) -> Tensor:
        """Add what the routed experts make of x (b, l, d_in) to y (b, l, d_out).

        Tokens that are routed nowhere stay bit-identical.
        """
        x = layer_inputs if layer_inputs.ndim == 3 else layer_inputs.unsqueeze(0)
        values = unit(x)
        gates = self.gates(values)
        return add_where_routed(output, self.answer(values, gates).view_as(output), gates.view(*output.shape[:-1], -1))

    def gates(self, values: Tensor) -> Tensor:
        """Weight of each expert at each token: values (b, l, d_in) -> (b, l, e), all zero where none is routed to.

        An expert's score is the cosine similarity of the value to the nearest of its keys. The `top_k` best experts
        that reach the threshold share the token by a softmax over score / temperature.
        """
        keys = self._at("keys", values)
        scores = (values @ keys.flatten(1, 2).mT).unflatten(-1, keys.shape[1:3]).amax(-1)
        scores = (scores * TIE).round() / TIE
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.settings["top_k"]]
        chosen = scores.shape[-1] - 1 - order
        best = scores.gather(-1, chosen)
        routed = best >= self.settings["threshold"]
        weights = (
            (best / self.settings["temperature"]).masked_fill(~routed, -math.inf).softmax(-1).masked_fill(~routed, 0.0)
        )
        return torch.zeros_like(scores).scatter(-1, chosen, weights)

    def answer(self, values: Tensor, gates: Tensor) -> Tensor:
        """Return the sum over the routed experts of gate times E(v): (b, l, d_in), (b, l, e) -> (b, l, d_out)."""
        total = values.new_zeros(*values.shape[:2], self.memory["up"].shape[3])
        for expert in gates.flatten(0, 1).any(0).nonzero().flatten().tolist():
            down, down_bias, up, up_bias = (self._at(name, values)[:, expert] for name in EXPERT)
            total = total + gates[..., expert, None] * run_expert(values, down, down_bias, up, up_bias)
        return total

    def _at(self, name: str, values: Tensor) -> Tensor:
        """Return a tensor of the memory in fp32 where the values are; autograd can use it whatever mode made it."""
        tensor = self.memory[name].to(values.device).float()
        return tensor.clone() if tensor.is_inference() and torch.is_grad_enabled() else tensor

    def joined(self, other: LEMoEEdit) -> LEMoEEdit:
        """Return the mixture of the experts of both, those of `other` being the newer ones; one edit joins each of n.

        Raises:
            ValueError: If they belong to different layers or have experts of different widths.
        """
        mine, others = (edit.memory["down"].shape[2:] for edit in (self, other))
        if self.settings != other.settings or mine != others:
            raise ValueError(
                f"cannot add experts of {dict(other.settings)}, width {others[1]}, to {dict(self.settings)}, "
                f"width {mine[1]}; "
                "use the same editor for all edits of a model"
            )
        number, anchors = max(len(self), len(other)), max(edit.memory["keys"].shape[2] for edit in (self, other))
        parts = []
        for edit in (self, other):
            padded = functional.pad(edit.memory["keys"], (0, 0, 0, anchors - edit.memory["keys"].shape[2]))
            memory = {**edit.memory, "keys": padded}
            parts.append({name: memory[name].expand(number, *memory[name].shape[1:]) for name in self.memory})
        device = self.memory["keys"].device
        return replace(
            self, memory={name: torch.cat([part[name].to(device) for part in parts], 1) for name in self.memory}
        )


def unit(x: Tensor) -> Tensor:
    """Values that route and that experts read: x of unit length in fp32."""
    return functional.normalize(x.float(), dim=-1, eps=1e-12)


def run_expert(values: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """E(v) = gelu(v down + b) up + c: (b, l, d_in) -> (b, l, d_out), with an expert for each row or one for all."""
    return functional.gelu(values @ down + down_bias.unsqueeze(1)) @ up + up_bias.unsqueeze(1)


def add_where_routed(output: Tensor, answer: Tensor, gates: Tensor) -> Tensor:
    """Add in fp32 where a token has a gate above zero; elsewhere the output is the very same bits."""
    routed = (gates > 0).any(-1, keepdim=True)
    return torch.where(routed, (output.float() + answer.to(output.device)).to(output.dtype), output)
