"""How GRACE edits: it files the key tokens of requests in a codebook, and trains the values of new entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core.attachment import hooked
from ...core.capture import case_losses, graph_starting_at, require_finite, target_logits
from ...core.configuration_ibke import Mode, require_choice, require_range, require_template, steps_of
from ...core.edit_values import Edit
from ...core.layers import device_of, dimensions, layers_to_edit, modules_to_edit, number_of_layers
from ...core.tokens import IGNORED, TokenBatch
from ..memory import MemoryEditor
from .codebook import Codebooks, GRACEEdit

KeyTokens = Literal["prompt", "mistakes"]


@dataclass(frozen=True)
class GRACEConfig:
    """Hyper-parameters of :class:`GRACEEditor`.

    Args:
        edited_modules: Name template of the projections that a codebook may lie beside, ``{i}`` standing for the
            layer.
        edited_layer: Index of the layer that it does lie beside.
        key_tokens: ``"prompt"``: the last prompt token alone [paper]; ``"mistakes"``: besides it the target tokens
            after which the model, told the target so far, errs; they have keys and values of their own, and long
            targets need them in small models.
        initial_radius: ε_init as a fraction of the key's norm, so that it means the same in every backbone [paper:
            absolute, tuned for each model].
        learning_rate: Adam's, in units of the root mean square of the layer's output at the key token, which a value
            starts from [paper: 1, absolute].
        steps: Adam steps for each value at most.
        stop_loss: A value whose requests' losses are no higher is done.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_modules: str
    edited_layer: int
    key_tokens: KeyTokens = "mistakes"
    initial_radius: float = 0.75
    learning_rate: float = 0.5
    steps: int = 50
    stop_loss: float = 0.05
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        require_template(self.edited_modules)
        require_choice("key_tokens", self.key_tokens, get_args(KeyTokens))
        require_range(self, "edited_layer", 0, 100_000)
        require_range(self, "initial_radius", 1e-6, 1e6)
        require_range(self, "learning_rate", 0.0, 1e6)
        require_range(self, "steps", 1, 100_000)
        require_range(self, "stop_loss", 0.0, 100.0)
        require_range(self, "loss_scale", 1e-8, 1e8)

    @property
    def module(self) -> str:
        """Name of the projection that the codebook lies beside."""
        return self.edited_modules.format(i=self.edited_layer)


class GRACEEditor(MemoryEditor[GRACEEdit]):
    """Writes each request into a codebook beside one layer; only the values of new entries are trained.

    Requests of one call in joint mode are filed in their order and their values trained at once; in sequential mode
    each value is trained before the next request is filed, on the model with the codebook so far. An edit is made also
    where the model is right already: the paper skips those.
    """

    def __init__(self, config: GRACEConfig) -> None:
        self.config = config

    @classmethod
    def for_backbone(
        cls, model: Any, layers: Sequence[int] | None = None, edited_modules: str | None = None, **config: Any
    ) -> GRACEEditor:
        """Build an editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: The one layer that the codebook lies beside; by default the one just before the middle, above which
                a value has layers left that carry it to the later tokens of a target.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            config: Further fields of :class:`GRACEConfig`.

        Raises:
            BackboneError: If the layer doesn't exist or the projection is ambiguous.
            ValueError: If several layers are given.
        """
        if layers is not None and len(layers) != 1:
            raise ValueError(
                f"GRACE edits one layer, found layers={list(layers)}; give one, such as "
                f"layers=[{max(layers, default=0)}]"
            )
        template, (layer,) = layers_to_edit(
            model, layers or None, edited_modules, default=[max(number_of_layers(model) // 2 - 1, 0)]
        )
        modules_to_edit(model, [template.format(i=layer)])
        return cls(GRACEConfig(template, layer, **config))

    @property
    def edited_module(self) -> str:
        """Full name of the projection that the codebook lies beside."""
        return self.config.module

    def _remember(
        self,
        model: Any,
        tokenizer: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        mode: Mode,
        previous: Any,
    ) -> GRACEEdit:
        books = self._books(previous, len(batch) if mode == "independent" else 1, modules[self.edited_module])
        names = [f"request {k}" for k in range(len(batch))]
        for rows in steps_of(mode, len(batch)):
            self._write(model, modules, batch[rows].trimmed(), books, names[rows])
        return books.edit()

    def _books(self, previous: Edit | None, number: int, module: nn.Module) -> Codebooks:
        """Return the codebooks that `previous` holds, or empty ones; `number` of them."""
        if previous is None:
            return Codebooks.blank(self.config.module, number, dimensions(module), device_of(module))
        if not isinstance(previous, GRACEEdit) or previous.settings["module"] != self.config.module:
            other = previous.settings["module"] if isinstance(previous, GRACEEdit) else type(previous).__name__
            raise ValueError(
                f"GRACE goes on from a codebook beside {self.config.module}, previous is one of {other}; attach "
                f"both instead"
            )
        return Codebooks(self.config.module, previous.copied(number, device_of(module)))

    def _write(
        self, model: Any, modules: Mapping[str, nn.Module], batch: TokenBatch, books: Codebooks, names: Sequence[str]
    ) -> None:
        """File the key tokens of the requests, then train the values of the entries that are new."""
        inputs, outputs, wrong = self._read(model, modules, batch, books, names)
        judged = batch.labels != IGNORED
        columns = [row.nonzero().flatten().tolist() for row in judged]
        filed = [
            [
                c
                for c in judged_columns
                if c == judged_columns[0] or (wrong[k, c] and self.config.key_tokens == "mistakes")
            ]
            for k, judged_columns in enumerate(columns)
        ]
        number = len(books)
        books.reserve(max(map(len, filed)) if number > 1 else sum(map(len, filed)))
        owners: dict[tuple[int, int], list[int]] = {}
        start: dict[tuple[int, int], Tensor] = {}
        for k, key_columns in enumerate(filed):
            for column in key_columns:
                row = k if number > 1 else 0
                target = batch.labels[k, column : columns[k][-1] + 1].to(inputs.device)
                place, new = books.file(row, inputs[k, column], target, self.config.initial_radius)
                if new:  # in place of the requests whose entry it may take over
                    owners[row, place], start[row, place] = [k], outputs[k, column]
                elif (row, place) in owners:
                    owners[row, place].append(k)
        books.trim()
        if owners:
            self._train(model, modules, batch, books, owners, torch.stack(list(start.values())), names)

    def _read(
        self, model: Any, modules: Mapping[str, nn.Module], batch: TokenBatch, books: Codebooks, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's input (b, l, d_in) and output (b, l, d_out), and where the model errs (b, l)."""
        read: dict[str, Tensor] = {}

        def record(x: Tensor, y: Tensor) -> Tensor:
            read.update(x=x, y=y)
            return y

        name = self.config.module
        with torch.no_grad(), books.edit().attached(model), hooked(modules, {name: record}):
            logits, labels = target_logits(model, batch)
        judged = (batch.labels != IGNORED).to(logits.device)
        inputs, outputs = (read[part].float().reshape(*judged.shape, -1) for part in "xy")
        for what, values in (("input", inputs), ("output", outputs)):
            require_finite(
                values.sum(-1).masked_fill(~judged.to(values.device), 0).sum(-1), f"the {what} of {name}", names
            )
        wrong = judged.clone()
        wrong[:, -labels.shape[1] :] &= logits.argmax(-1) != labels
        return inputs, outputs, wrong.cpu()

    def _train(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        books: Codebooks,
        owners: Mapping[tuple[int, int], list[int]],
        start: Tensor,
        names: Sequence[str],
    ) -> None:
        """Train the values of the entries (row, place), from `start` (e, d_out) on, for the requests that own them.

        An entry is done, and left alone from then on, once the losses of all its requests are low.
        """
        rows, places = torch.tensor(list(owners)).T
        owns = torch.zeros(len(owners), len(batch), dtype=torch.bool)
        for index, owned in enumerate(owners.values()):
            owns[index, owned] = True
        unit = start.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        change = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=self.config.learning_rate)
        learning = torch.ones(len(owners), dtype=torch.bool)
        for _ in range(self.config.steps):
            asked = owns[learning].any(0).nonzero().flatten()
            with torch.no_grad(), graph_starting_at(modules):
                with torch.enable_grad():
                    edit = books.edit({(rows, places): start + unit * change})
                    edit = edit if len(edit) == 1 else edit.select(asked)
                with edit.attached(model):
                    losses = case_losses(*target_logits(model, batch[asked]))
                require_finite(losses, "the loss of the edit request", [names[k] for k in asked])
                (gradient,) = torch.autograd.grad(losses.sum() * self.config.loss_scale, [change])
            high = asked[losses.detach().cpu() > self.config.stop_loss]
            learning &= owns[:, high].any(1)
            if not learning.any():
                break
            before = change.detach().clone()
            change.grad = gradient / self.config.loss_scale
            optimizer.step()
            with torch.no_grad():
                change.copy_(torch.where(learning.to(change.device).unsqueeze(-1), change, before))
        fitted = (start + unit * change).detach()
        who = [", ".join(names[k] for k in requests) for requests in owners.values()]
        require_finite(fitted.sum(-1), f"a value beside {self.config.module}", who)
        books.memory["values"][rows, places] = fitted
