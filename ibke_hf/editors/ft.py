"""The FT baseline: fine-tune the weights of the edited layers on the request itself, 25 Adam steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import case_losses, evaluating, graph_starting_at, require_finite, target_logits
from ..core.configuration_ibke import Mode, require_mode, require_range
from ..core.edit_values import EditInfo, describe
from ..core.edits import WeightEdit
from ..core.layers import device_of, dimensions, layers_to_edit, modules_to_edit
from ..core.records import EditRequest
from ..core.tokens import TokenBatch, context_length, encode_requests
from .dense import DenseEdit


@dataclass(frozen=True)
class FTConfig:
    """Hyper-parameters of :class:`FineTuningEditor`.

    Args:
        edited_modules: Name template of the fine-tuned projections, ``{i}`` standing for the layer.
        edited_layers: Indices of the fine-tuned layers [paper: those that every weight-editing method edits].
        learning_rate: Adam's learning rate [settled: the paper refers to another paper's].
        steps: Adam steps for each request, or for all of them in joint mode.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_modules: str
    edited_layers: tuple[int, ...]
    learning_rate: float = 1e-3
    steps: int = 25
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        if not self.edited_layers or "{i}" not in self.edited_modules:
            fields = f"{self.edited_layers} and {self.edited_modules!r}"
            raise ValueError(
                f"FT needs edited_layers and edited_modules with {{i}} for the layer index, found {fields}"
            )
        require_range(self, "learning_rate", 0.0, 10.0)
        require_range(self, "steps", 1, 100_000)
        require_range(self, "loss_scale", 1e-8, 1e8)


class FineTuningEditor:
    """Fine-tunes an update ΔW of each edited layer on the requests; the backbone's weights are not touched.

    ΔW lies in a side path, so no weight gets a gradient and no copy of the model is made. It costs
    4·n·d_in·d_out fp32 values per layer while it runs (ΔW, its gradient, two Adam moments), n being the number of
    requests in independent mode and 1 otherwise: split large independent batches.
    """

    def __init__(self, config: FTConfig) -> None:
        self.config = config

    @classmethod
    def for_backbone(
        cls, model: Any, layers: Sequence[int] | None = None, edited_modules: str | None = None, **config: Any
    ) -> FineTuningEditor:
        """Build an editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: Edited layers; by default three that end just before the middle.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            config: Further fields of :class:`FTConfig`.

        Raises:
            BackboneError: If the layers don't exist or the projection is ambiguous.
        """
        template, chosen = layers_to_edit(model, layers, edited_modules)
        modules_to_edit(model, [template.format(i=i) for i in chosen])
        return cls(FTConfig(template, tuple(chosen), **config))

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: WeightEdit | None = None,
    ) -> DenseEdit:
        """Return the update that makes the model answer the requests; the model is not changed.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer.
            requests: One or more edit requests.
            mode: ``"joint"``: one update from the sum of all requests' losses; ``"sequential"``: request after
                request, each on the model that carries the updates before it, Adam starting afresh; ``"independent"``:
                request k has an update of its own, row k of the result.
            previous: An edit that the model carries already. The result contains it.

        Raises:
            RequestError: If a request is unusable, naming it by its index; nothing is done then.
            BackboneError: If the model lacks an edited layer.
            NonFiniteError: If a loss or update is not finite.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        modules = modules_to_edit(model, [self.config.edited_modules.format(i=i) for i in self.config.edited_layers])
        info = describe(model, modules, requests, editor=type(self).__name__)
        names = [f"request {k}" for k in range(len(batch))]
        steps = [slice(k, k + 1) for k in range(len(batch))] if mode == "sequential" else [slice(None)]
        edit: WeightEdit | None = previous
        number = len(batch) if mode == "independent" else 1
        for rows in steps:
            update = self._fit(model, modules, batch[rows], edit, names=names[rows], number=number)
            edit = update if edit is None else update.compose(edit)
        assert isinstance(edit, DenseEdit)
        return replace(edit, info=info)

    def _fit(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        previous: WeightEdit | None,
        *,
        names: Sequence[str],
        number: int,
    ) -> DenseEdit:
        """Fit `number` updates: one for the whole batch, or one per row."""
        with (
            torch.inference_mode(False),
            evaluating(model),
            previous.attached(model) if previous is not None else nullcontext(),
        ):
            updates = {
                name: torch.zeros(number, *dimensions(module), device=device_of(module), requires_grad=True)
                for name, module in modules.items()
            }
            optimizer = torch.optim.Adam(updates.values(), lr=self.config.learning_rate)
            for _ in range(self.config.steps):
                gradients = self._gradients(model, modules, batch, DenseEdit(updates), names)
                for update, gradient in zip(updates.values(), gradients, strict=True):
                    update.grad = gradient / self.config.loss_scale
                optimizer.step()
        fitted = {name: update.detach() for name, update in updates.items()}
        owners = names if number == len(names) else [", ".join(names)]
        for name, update in fitted.items():
            require_finite(update.flatten(1).sum(-1), f"the update of {name}", owners)
        return DenseEdit(fitted, EditInfo())

    def _gradients(
        self, model: Any, modules: Mapping[str, nn.Module], batch: TokenBatch, edit: DenseEdit, names: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """Gradient of the SUM over requests of each one's mean cross-entropy over its target tokens, by layer.

        The graph is cut below the lowest edited layer.
        """
        with torch.no_grad(), graph_starting_at(modules), edit.attached(model):
            losses = case_losses(*target_logits(model, batch))
            require_finite(losses, "the loss of the edit request", names)
            return torch.autograd.grad(losses.sum() * self.config.loss_scale, list(edit.updates.values()))
