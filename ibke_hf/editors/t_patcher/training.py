"""Patches of T-Patcher while they are trained: their losses, and what they must stay silent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from .editor import TPatcherConfig

Patches = Mapping[str, Tensor]
# queries nearer than this fraction of their norm are one query: 16-bit models read the same prompt no more exactly
SAME = 0.02


class NewPatches:
    """P patches in training, each in a row and place of the sets that they join.

    Attributes:
        requests: (P,) the request that each belongs to.
        changes: What is trained: by how many units key (P, d), bias (P,) and value (P, d_out) differ from their start.
    """

    def __init__(
        self,
        config: TPatcherConfig,
        requests: Tensor,
        rows: Tensor,
        places: Tensor,
        mistakes: Tensor,
        outputs: Tensor,
        centre: Tensor,
    ) -> None:
        """Start from k_p = q/|q|², q = q_e - μ, so that the activation is 1 [paper: μ = 0], and v_p = 0.

        μ (d,) is the centre of the memory; the bias is trained as b_p + μ·k_p. Queries of a language model have most
        of their length in common, along which a patch would otherwise be pushed away from its own mistake too.
        """
        self.config, self.requests, self.rows, self.places, self.mistakes = config, requests, rows, places, mistakes
        self._centre = centre
        apart = mistakes - centre
        self._key = apart / apart.square().sum(-1, keepdim=True).clamp(min=1e-12)
        self._units = [_rms(self._key), torch.ones_like(mistakes[:, 0]), _rms(outputs)]
        self.changes = [torch.zeros_like(part, requires_grad=True) for part in (mistakes, mistakes[:, 0], outputs)]

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, biases and values as they are now."""
        key, bias, value = (unit * change for unit, change in zip(self._units, self.changes, strict=True))
        key = self._key + key
        return key, bias - key @ self._centre, value

    def size(self) -> Tensor:
        """Return a number (P,) that is finite if the whole patch is."""
        return torch.stack(
            [part.detach().flatten(1).sum(-1) if part.ndim > 1 else part.detach() for part in self.parts()]
        ).sum(0)

    def beside(self, patches: Patches) -> dict[str, Tensor]:
        """Return the sets with room for the new patches, and their queries."""
        room = int(self.places.max()) + 1 - patches["biases"].shape[1]
        pads = {name: (0, 0, 0, room) if tensor.ndim == 3 else (0, room) for name, tensor in patches.items()}
        wider = {name: functional.pad(tensor, pads[name]) for name, tensor in patches.items()}
        wider["queries"][self.rows, self.places] = self.mistakes
        return wider

    def written_to(self, patches: Patches) -> dict[str, Tensor]:
        """Return the sets with the patches in their places."""
        parts = zip(("keys", "biases", "values"), self.parts(), strict=True)
        where = (self.rows.to(self.mistakes.device), self.places.to(self.mistakes.device))
        return {**patches, **{name: patches[name].index_put(where, part) for name, part in parts}}

    def silent_on(self, memory: Tensor, queries: Tensor, real: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (c, d) and which of them each patch must be silent on (P, c).

        These are the memory (m, d), the other tokens of the batch (b, l, d) that its row carries, and the queries of
        earlier patches (n, p, d) in its row, but for those that are its own query to rounding.
        """
        rows = self.rows.to(memory.device).unsqueeze(1)
        of_rows = torch.arange(len(earlier), device=memory.device)
        owner = (
            of_rows.repeat_interleave(real.shape[1])
            if len(earlier) > 1
            else torch.zeros_like(real.flatten(), dtype=torch.long)
        )
        mine = (owner == rows) & real.flatten()
        before = (of_rows.repeat_interleave(earlier.shape[1]) == rows) & (earlier != 0).any(-1).flatten()
        others = torch.cat([memory, queries.flatten(0, 1), earlier.flatten(0, 1)])
        allowed = torch.cat(
            [torch.ones(len(rows), len(memory), dtype=torch.bool, device=memory.device), mine, before], 1
        )
        same = torch.cdist(self.mistakes, others) <= SAME * self.mistakes.norm(dim=-1, keepdim=True)
        return others, allowed & ~same

    def losses(self, others: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return a l_a + m (l_m1 + l_m2) (P,), and the highest activation on what each must be silent on (P,)."""
        config, (keys, biases, _) = self.config, self.parts()
        on_mistake = (self.mistakes * keys).sum(-1) + biases
        heard = (keys @ others.T + biases.unsqueeze(1)).masked_fill(~allowed, -torch.inf)
        silence = top_mean_exp(heard - config.activation_threshold, config.memory_top_k)
        margin = top_mean_exp(heard - on_mistake.unsqueeze(1) - config.activation_margin, config.memory_top_k)
        return config.activation_weight * (-on_mistake).exp() + config.memory_weight * (
            silence + margin
        ), heard.detach().amax(-1)

    def step(self, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], learning: Tensor) -> None:
        """Take an optimizer step on the patches that are learning."""
        before = [change.detach().clone() for change in self.changes]
        for change, gradient in zip(self.changes, gradients, strict=True):
            change.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for change, old in zip(self.changes, before, strict=True):
                change.copy_(torch.where(learning.to(old.device).view(-1, *[1] * (old.ndim - 1)), change, old))


def top_mean_exp(values: Tensor, k: int) -> Tensor:
    """S: mean of the k largest exp(v), (P, c) -> (P,); entries of -inf do not count."""
    counted = torch.isfinite(values).sum(-1).clamp(min=1, max=k)
    return values.topk(min(k, values.shape[1]), -1).values.exp().sum(-1) / counted


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
