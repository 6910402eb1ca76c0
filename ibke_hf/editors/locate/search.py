"""The search for the value that makes the model say the target at the subject's last token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import LayerHook, hooked
from ...core.capture import case_losses, graph_starting_at, hidden_of, require_finite, target_logits
from ...core.edit_values import Edit
from .config import LocateConfig
from .states import carrying
from .texts import SearchTexts, SubjectTexts


class ValueSearch:
    """Optimises a change δ (n, d) of a module's output at the subjects' last tokens, one for each request.

    It minimises, over the texts x_j + p of a request, the mean of -log P[target | x_j + p], plus the divergence of the
    next token after the essence prompt from the unedited model's (Meng et al. 2022, Eq. 4), plus weight decay.
    Requests do not influence each other.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        texts: SearchTexts,
        config: LocateConfig,
        edits: Sequence[Edit],
        names: Sequence[str],
    ) -> None:
        self.model, self.module, self.texts, self.config, self.edits, self.names = (
            model,
            module,
            texts,
            config,
            edits,
            names,
        )
        self.essence_logs: dict[
            int, Tensor
        ] = {}  # log-probabilities after the essence prompt of each request, before the edit

    def run(self, norms: Tensor, width: int) -> Tensor:
        """Return δ (n, d) in fp32.

        Args:
            norms: ‖h‖ of each request (n,), which steps and limits are relative to.
            width: d, of the module's output.

        Raises:
            NonFiniteError: If the objective is not finite for a request; names it.
        """
        config = self.config
        unit = (norms / math.sqrt(width)).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        change = torch.zeros(len(norms), width, device=norms.device, requires_grad=True)  # in units of h's RMS
        best, lowest = change.detach().clone(), torch.full_like(norms, torch.inf)
        optimizer = torch.optim.Adam([change], lr=config.learning_rate)
        for _ in range(config.steps + 1):
            now = change.detach()
            losses, gradient = self.objective(now * unit, searched=lowest >= config.stop_below)
            losses = losses + config.weight_decay * now.square().mean(-1)
            require_finite(losses, "the objective of the value", self.names)
            better = (losses < lowest) & (lowest >= config.stop_below)  # a request that is done stays as it is
            best[better], lowest[better] = now[better], losses[better]
            if (lowest < config.stop_below).all():
                break
            change.grad = gradient * unit + config.weight_decay * 2 / width * now
            optimizer.step()
            with torch.no_grad():
                limit = config.clamp * math.sqrt(width)
                change.mul_(limit / change.norm(dim=-1, keepdim=True).clamp(min=limit or 1.0))
        return best * unit

    def objective(self, change: Tensor, searched: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the objective without weight decay of each request (n,), and its gradient (n, d), both in fp32.

        Where `searched` (n,) is not None, requests that it is False for cost nothing, and get zeros.
        """
        active = torch.ones(len(change), dtype=torch.bool) if searched is None else searched.cpu()
        asked, essences = (texts.where(active) for texts in (self.texts.requests, self.texts.essences))
        losses, gradient = torch.zeros(len(change), device=change.device), torch.zeros_like(change)
        shares = 1 / torch.bincount(asked.owners, minlength=len(change))
        for part in asked.parts(self.config.texts_at_once):
            weights = shares[part.owners].to(change.device)
            self._add(
                change,
                part,
                lambda logits, labels, w=weights: case_losses(logits, labels) * w.to(logits.device),
                losses,
                gradient,
            )
        if self.config.kl_factor:
            for part in essences.parts(self.config.texts_at_once):
                owners = part.owners.tolist()
                self._add(
                    change,
                    part,
                    lambda logits, _, rows=owners: self._divergence(rows, logits[:, -1]),
                    losses,
                    gradient,
                )
        return losses, gradient

    def _divergence(self, owners: Sequence[int], logits: Tensor) -> Tensor:
        """KL of the next token with the edit from that without it, (b, vocabulary) -> (b,), times its factor."""
        logs = logits.float().log_softmax(-1)
        before = torch.stack(
            [self.essence_logs.setdefault(k, row) for k, row in zip(owners, logs.detach(), strict=True)]
        )  # at δ = 0
        return self.config.kl_factor * (logs.exp() * (logs - before)).sum(-1)

    def _add(self, change: Tensor, part: SubjectTexts, loss: Any, losses: Tensor, gradient: Tensor) -> None:
        """Add losses and gradient of some texts to those of their requests; the graph starts at the module."""
        leaf = change[part.owners.to(change.device)].requires_grad_(True)
        modules = {"value": self.module}
        with (
            torch.no_grad(),
            carrying(self.model, self.edits, part.owners),
            graph_starting_at(modules),
            hooked(modules, {"value": _adding(leaf, part.columns())}),
        ):
            part_losses = loss(*target_logits(self.model, part.batch))
            (slope,) = torch.autograd.grad(part_losses.sum() * self.config.loss_scale, [leaf])
        owners = part.owners.to(change.device)
        losses.index_add_(0, owners, part_losses.detach().to(losses.device))
        gradient.index_add_(0, owners, slope / self.config.loss_scale)


def _adding(change: Tensor, columns: Tensor) -> LayerHook:
    """Add a change (b, d) to the output at the marked columns (b, l), in fp32."""

    def add(_: Tensor, output: Any) -> Any:
        hidden = hidden_of(output)
        extra = columns.to(hidden.device).unsqueeze(-1) * change.to(hidden.device).unsqueeze(1)
        hidden = (hidden + extra.reshape(hidden.shape)).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add
