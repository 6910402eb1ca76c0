"""The FT baseline: fine-tune the weights of the edited layers on the request itself, 25 Adam steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import case_losses, evaluating, graph_starting_at, require_finite, target_logits
from ..core.configuration_ibke import Mode, require_mode, require_range, steps_of
from ..core.edit_values import EditInfo, describe, described
from ..core.edits import WeightEdit
from ..core.layers import device_of, dimensions, layers_to_edit, modules_to_edit
from ..core.records import EditRequest
from ..core.tokens import TokenBatch, context_length, encode_requests
from .dense import DenseEdit

VALUE_BYTES, COPIES = 4, 4  # fp32; ΔW, its gradient and Adam's two moments
MIB = 1 << 20


@dataclass(frozen=True)
class FTConfig:
    """Hyper-parameters of :class:`FineTuningEditor`.

    Args:
        edited_modules: Name template of the fine-tuned projections, ``{i}`` standing for the layer.
        edited_layers: Indices of the fine-tuned layers [paper: those that every weight-editing method edits].
        learning_rate: Adam's learning rate [settled: the paper refers to another paper's].
        steps: Adam steps for each request, or for all of them in joint mode.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
        memory_bytes: Most that independent edits may take: the result, and what is being fitted of it.
    """

    edited_modules: str
    edited_layers: tuple[int, ...]
    learning_rate: float = 1e-3
    steps: int = 25
    loss_scale: float = 1.0
    memory_bytes: int = 8 << 30

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
        require_range(self, "memory_bytes", 1, 1 << 60)

    def module_names(self) -> list[str]:
        """Return the full names of the fine-tuned projections."""
        return [self.edited_modules.format(i=i) for i in self.edited_layers]


class FineTuningEditor:
    """Fine-tunes an update ΔW of each edited layer on the requests; the backbone's weights are not touched.

    ΔW lies in a side path, so no weight gets a gradient and no copy of the model is made. An edit takes
    :meth:`edit_bytes`: d_in·d_out fp32 values for each layer, 600 MB for three layers of an 8B model, and four times
    that while it is fitted (ΔW, its gradient, two Adam moments). Independent edits, one such for each request, are
    fitted in lots that keep within `memory_bytes`; those whose result alone would not are refused.
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

    def edit_bytes(self, model: Any) -> int:
        """Return how many bytes one edit of a model takes.

        Raises:
            BackboneError: If the model lacks an edited layer.
        """
        modules = modules_to_edit(model, self.config.module_names())
        return sum(VALUE_BYTES * math.prod(dimensions(module)) for module in modules.values())

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: WeightEdit | None = None,
    ) -> DenseEdit:
        """Return the update that makes the model answer the requests, see :class:`~ibke_hf.core.edit_values.Editor`.

        In joint mode it follows the sum of all requests' losses; in sequential mode Adam starts afresh
        for each request.

        Raises:
            ValueError: Also if independent edits would take more than `memory_bytes`; says how many would fit.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        modules = modules_to_edit(model, self.config.module_names())
        info = describe(model, modules, requests, editor=type(self).__name__)
        names = [f"request {k}" for k in range(len(batch))]
        if mode == "independent":
            update = self._fit_in_lots(model, modules, batch, previous, names)
            return described(update if previous is None else update.compose(previous), info, previous)
        edit: WeightEdit | None = previous
        for rows in steps_of(mode, len(batch)):
            update = self._fit(model, modules, batch[rows], edit, names=names[rows], number=1)
            edit = update if edit is None else update.compose(edit)
        assert isinstance(edit, DenseEdit)
        return described(edit, info, previous)

    def _fit_in_lots(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        previous: WeightEdit | None,
        names: Sequence[str],
    ) -> DenseEdit:
        """Fit an update for each row, as many at once as memory has room for."""
        size, room = self.edit_bytes(model), self.config.memory_bytes
        if len(batch) > 1 and len(batch) * size > room:
            raise ValueError(
                f"{len(batch)} independent edits of {size / MIB:,.1f} MiB each take more than memory_bytes, "
                f"{room / MIB:,.1f} MiB; edit at most {max(room // size, 1)} requests at a time, or raise memory_bytes"
            )
        at_once = max(room // (COPIES * size), 1)
        lots = []
        for start in range(0, len(batch), at_once):
            rows = slice(start, start + at_once)
            carried = previous if previous is None or len(previous) == 1 else previous.select(range(len(batch))[rows])
            number = len(names[rows])
            lots.append(self._fit(model, modules, batch[rows], carried, names=names[rows], number=number))
        if len(lots) == 1:
            return lots[0]
        return DenseEdit({name: torch.cat([lot.updates[name] for lot in lots]) for name in modules}, EditInfo())

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
