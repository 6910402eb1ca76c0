"""The GRACE baseline: a codebook of keys, values and radii beside one layer, each edit an entry of it.

Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS. With x a
layer's input at a token (the query), K the keys and ε the radii of the codebook, the layer's output there becomes

    y = V_i  if d(x, K_i) < ε_i, i = argmin_j d(x, K_j), d the Euclidean distance;  y = layer(x)  otherwise: deferral.

Who looks up: every token, for itself, and only its own output is replaced. The key of a request is the query of its
last prompt token, the one token that the paper replaces for autoregressive models. A token's query depends on the
tokens before it alone, so that token is found wherever the text goes on: teacher-forced, prefilled, or held in a KV
cache; no step needs to know where the prompt ended. The layers above attend to the replaced output, which is how one
value spells several tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.attachment import LayerHook, hooked, require_row_per_edit
from ..core.capture import case_losses, evaluating, graph_starting_at, require_finite, target_logits
from ..core.configuration_ibke import Mode, require_mode, require_range
from ..core.edit_values import Edit, describe, require_length
from ..core.layers import BackboneError, device_of, dimensions, layers_to_edit, modules_to_edit, number_of_layers
from ..core.records import EditRequest
from ..core.tokens import IGNORED, TokenBatch, context_length, encode_requests
from .memory import MemoryEdit

KeyTokens = Literal["prompt", "mistakes"]
FREE = -1.0  # radius of a place of the codebook that holds no entry
# keys nearer than this fraction of their norm are one key: 16-bit models read the same prompt no more exactly
SAME = 0.01
INSIDE = 1.01  # a grown ball reaches a little past the key that it is grown to contain


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
        if "{i}" not in self.edited_modules:
            raise ValueError(
                f"edited_modules must contain {{i}} in place of the layer's index, found {self.edited_modules!r}"
            )
        if self.key_tokens not in get_args(KeyTokens):
            raise ValueError(f"key_tokens must be one of {', '.join(get_args(KeyTokens))}, found {self.key_tokens!r}")
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


@dataclass(frozen=True, eq=False)
class GRACEEdit(MemoryEdit):
    """n independent codebooks of up to m entries beside one layer.

    `memory` holds ``keys`` (n, m, d_in), ``values`` (n, m, d_out) and ``radii`` (n, m), -1 where a place is free, all
    fp32, and ``targets`` (n, m, t): the token ids that each entry answers with, filled up with -100. `settings` names
    the ``module``.
    """

    kind = "grace"

    def __post_init__(self) -> None:
        """Refuse a codebook that lacks a part."""
        super().__post_init__()
        shapes = {name: tuple(self.memory[name].shape) for name in ("keys", "values", "radii", "targets")}
        if not isinstance(self.settings["module"], str) or [len(shape) for shape in shapes.values()] != [3, 3, 2, 3]:
            raise ValueError(
                f"a codebook has keys and values (n, m, d), radii (n, m) and targets (n, m, t), found {shapes}"
            )
        if len({shape[:2] for shape in shapes.values()}) > 1:
            raise ValueError(f"keys, values, radii and targets must be of the same (n, m) entries, found {shapes}")

    @property
    def entries(self) -> list[int]:
        """Number of entries of each codebook."""
        counts: list[int] = (self.memory["radii"] > 0).sum(-1).tolist()
        return counts

    def to(self, *args: Any, **kwargs: Any) -> GRACEEdit:
        """Return the edit on another device or in another dtype; token ids stay whole numbers."""
        moved = super().to(*args, **kwargs)
        targets = self.memory["targets"].to(moved.memory["keys"].device)
        return GRACEEdit({**moved.memory, "targets": targets}, moved.settings, moved.info)

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return the layer and the lookup in its codebook."""
        name = self.settings["module"]
        module = modules_to_edit(model, [name])[name]
        wanted = (self.memory["keys"].shape[-1], self.memory["values"].shape[-1])
        if dimensions(module) != wanted:
            raise BackboneError(
                f"the codebook expects {name} to map {wanted[0]} to {wanted[1]}, the model's maps "
                f"{dimensions(module)[0]} to {dimensions(module)[1]}; it was made for another backbone"
            )
        device = device_of(module)
        keys, values, radii = (self.memory[part].to(device) for part in ("keys", "values", "radii"))
        return {name: (module, _lookup(keys.float(), values, radii.float()))}


def _lookup(keys: Tensor, values: Tensor, radii: Tensor) -> LayerHook:
    """Return x (b, l, d_in), y (b, l, d_out) -> y with the values of the tokens whose query lies in a ball."""
    number = len(keys)

    def look_up(x: Tensor, y: Tensor) -> Tensor:
        require_row_per_edit(number, x)
        queries = x.detach().float().reshape(number, -1, x.shape[-1])  # one codebook serves all rows as one
        distances = torch.cdist(
            queries, keys, compute_mode="donot_use_mm_for_euclid_dist"
        )  # (n, tokens, m), exact near 0
        distances = distances.masked_fill(radii.unsqueeze(1) <= 0, torch.inf)
        nearest = distances.argmin(-1)
        found = distances.amin(-1) < radii.gather(1, nearest)
        retrieved = values[torch.arange(number, device=values.device).unsqueeze(1), nearest]
        inside = found.reshape(*x.shape[:-1], 1)
        return torch.where(inside, retrieved.to(y.dtype).reshape(y.shape), y)

    return look_up


class Codebooks:
    """n codebooks that are being written: the paper's rules of adding, expanding and splitting, without the training.

    Attributes:
        memory: Like that of :class:`GRACEEdit`.
    """

    def __init__(self, module: str, memory: dict[str, Tensor]) -> None:
        self.module, self.memory = module, memory

    @classmethod
    def blank(cls, module: str, number: int, widths: tuple[int, int], device: torch.device) -> Codebooks:
        """Return codebooks of one free place each."""
        keys, values = (torch.zeros(number, 1, width, device=device) for width in widths)
        targets = torch.full((number, 1, 1), IGNORED, device=device)
        return cls(
            module,
            {
                "keys": keys,
                "values": values,
                "radii": torch.full((number, 1), FREE, device=device),
                "targets": targets,
            },
        )

    def __len__(self) -> int:
        return len(self.memory["keys"])

    def edit(self, values: Mapping[tuple[Tensor, Tensor], Tensor] | None = None) -> GRACEEdit:
        """Return the codebooks as an edit, with other values (e, d_out) at the given rows and places."""
        memory = dict(self.memory)
        for places, others in (values or {}).items():
            memory["values"] = memory["values"].index_put(places, others)
        return GRACEEdit(memory, {"module": self.module})

    def reserve(self, places: int) -> None:
        """Add free places to each codebook."""
        pads = {
            "keys": (0, 0, 0, places),
            "values": (0, 0, 0, places),
            "radii": (0, places),
            "targets": (0, 0, 0, places),
        }
        fill = {"radii": FREE, "targets": IGNORED}
        self.memory = {
            name: functional.pad(self.memory[name], pad, value=fill.get(name, 0)) for name, pad in pads.items()
        }

    def trim(self) -> None:
        """Remove places that are free in every codebook."""
        used = max(int((self.memory["radii"] > 0).any(0).sum()), 1)
        self.memory = {name: tensor[:, :used].clone() for name, tensor in self.memory.items()}

    def file(self, row: int, key: Tensor, target: Tensor, initial_radius: float) -> tuple[int, bool]:
        """Add, expand or split for a key (d_in,) whose answer is `target` (t,); return its place and whether it is a new entry.

        Far from all balls, the key is a new entry with a ball of its own. Near a key of the same target, that one's
        ball grows to contain it. Near a key of another target, both balls end half-way; if the two keys are one, the
        later edit wins.
        """
        keys, radii = self.memory["keys"][row], self.memory["radii"][row]
        norm = float(key.norm())
        radius = max(initial_radius * norm, 1e-6)
        distances = (keys - key).norm(dim=-1).masked_fill(radii <= 0, torch.inf)
        nearest, distance = int(distances.argmin()), float(distances.min())
        place = int((radii <= 0).int().argmax())
        if distance <= float(radii[nearest]) + radius:
            if self._answers(row, nearest, target):
                radii[nearest] = max(float(radii[nearest]), INSIDE * distance)
                return nearest, False
            if distance <= SAME * norm:
                place, radius = nearest, float(radii[nearest])
            else:
                radii[nearest] = min(float(radii[nearest]), distance / 2)
                radius = min(radius, distance / 2)
        keys[place], radii[place] = key, radius
        self._write_target(row, place, target)
        return place, True

    def _answers(self, row: int, place: int, target: Tensor) -> bool:
        held = self.memory["targets"][row, place]
        return torch.equal(held[held != IGNORED], target)

    def _write_target(self, row: int, place: int, target: Tensor) -> None:
        missing = max(len(target) - self.memory["targets"].shape[-1], 0)
        self.memory["targets"] = functional.pad(self.memory["targets"], (0, missing), value=IGNORED)
        held = self.memory["targets"][row, place]
        held[: len(target)], held[len(target) :] = target, IGNORED


class GRACEEditor:
    """Writes each request into a codebook beside one layer; only the values of new entries are trained.

    Requests of one call in joint mode are filed in their order and their values trained at once; in sequential mode
    each value is trained before the next request is filed, on the model with the codebook so far. An edit is made also
    where the model is right already: the paper skips those.
    """

    supports_independent = True

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
            model, layers or [max(number_of_layers(model) // 2 - 1, 0)], edited_modules
        )
        modules_to_edit(model, [template.format(i=layer)])
        return cls(GRACEConfig(template, layer, **config))

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: Edit | None = None,
    ) -> GRACEEdit:
        """Return the codebook that makes the model answer the requests; the model is not changed.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer.
            requests: One or more edit requests.
            mode: ``"joint"``: one codebook, its values trained at once; ``"sequential"``: one codebook, request after
                request; ``"independent"``: request k has a codebook of its own, row k of the result.
            previous: A codebook that the model carries already, or one for each request in independent mode. The
                result contains it.

        Raises:
            RequestError: If a request is unusable, naming it by its index; nothing is done then.
            BackboneError: If the model lacks the edited layer.
            NonFiniteError: If a key, loss or value is not finite.
            ValueError: If `previous` is no codebook of this layer, or of another number than fits the mode.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        modules = modules_to_edit(model, [self.config.module])
        number = len(batch) if mode == "independent" else 1
        books = self._books(previous, number, modules[self.config.module])
        names = [f"request {k}" for k in range(len(batch))]
        steps = [slice(k, k + 1) for k in range(len(batch))] if mode == "sequential" else [slice(None)]
        with torch.inference_mode(False), evaluating(model):
            for rows in steps:
                self._write(model, modules, batch[rows].trimmed(), books, names[rows])
        return replace(books.edit(), info=describe(model, modules, requests, editor=type(self).__name__))

    def _books(self, previous: Edit | None, number: int, module: nn.Module) -> Codebooks:
        """Return the codebooks that `previous` holds, or empty ones; `number` of them."""
        if previous is None:
            return Codebooks.blank(self.config.module, number, dimensions(module), device_of(module))
        if not isinstance(previous, GRACEEdit) or previous.settings["module"] != self.config.module:
            found = previous.settings["module"] if isinstance(previous, GRACEEdit) else type(previous).__name__
            raise ValueError(
                f"GRACE goes on from a codebook beside {self.config.module}, previous is one of {found}; attach "
                f"both instead"
            )
        require_length(previous, number)
        memory = previous.to(device_of(module)).memory
        return Codebooks(
            self.config.module,
            {name: tensor.expand(number, *tensor.shape[1:]).clone() for name, tensor in memory.items()},
        )

    def _write(
        self, model: Any, modules: Mapping[str, nn.Module], batch: TokenBatch, books: Codebooks, names: Sequence[str]
    ) -> None:
        """File the key tokens of the requests, then train the values of the entries that are new."""
        inputs, outputs, wrong = self._read(model, modules, batch, books, names)
        judged = batch.labels != IGNORED
        columns = [row.nonzero().flatten().tolist() for row in judged]
        filed = [
            [c for c in own if c == own[0] or (wrong[k, c] and self.config.key_tokens == "mistakes")]
            for k, own in enumerate(columns)
        ]
        number = len(books)
        books.reserve(max(map(len, filed)) if number > 1 else sum(map(len, filed)))
        owners: dict[tuple[int, int], list[int]] = {}
        start: dict[tuple[int, int], Tensor] = {}
        for k, own in enumerate(filed):
            for column in own:
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
        """Return the layer's input (b, l, d_in), its output (b, l, d_out), and where the model errs (b, l), under the codebooks."""
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
        who = [", ".join(names[k] for k in own) for own in owners.values()]
        require_finite(fitted.sum(-1), f"a value beside {self.config.module}", who)
        books.memory["values"][rows, places] = fitted
