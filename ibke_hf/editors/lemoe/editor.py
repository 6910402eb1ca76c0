"""How LEMoE edits: it inserts an expert for each batch of requests and trains it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.attachment import hooked
from ...core.capture import case_losses, graph_starting_at, require_finite, target_logits
from ...core.configuration_ibke import Mode, require_range
from ...core.edit_values import EditInfo, require_length
from ...core.layers import BackboneError, dimensions, layers_to_edit, modules_to_edit, number_of_layers
from ...core.tokens import IGNORED, TokenBatch
from ..memory import MemoryEditor
from .mixture import EXPERT, LEMoEEdit, add_where_routed, run_expert, unit
from .planning import anchors, clustered


@dataclass(frozen=True)
class LEMoEConfig:
    """Hyper-parameters of :class:`LEMoEEditor`.

    Args:
        edited_module: Full name of the FFN output projection that the experts lie beside.
        expert_width: Hidden width of an expert.
        edits_per_expert: Requests that an expert is made for in joint mode, on average; more of them are clustered.
        top_k: Most experts that a token is routed to.
        routing_threshold: Least cosine similarity of a value to a key of an expert that it is routed to [ours].
        temperature: Divides the similarities in the softmax over the routed experts.
        learning_rate: Adam's learning rate.
        steps: Adam steps for each expert.
        loss_floor: Loss of a request that is low enough; its gradient ends there, so that no answer is louder than it
            must be [ours].
        seed: Seed of the first layer of the experts.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_module: str
    expert_width: int
    edits_per_expert: int = 10
    top_k: int = 1
    routing_threshold: float = 0.25
    temperature: float = 0.1
    learning_rate: float = 1e-2
    steps: int = 100
    loss_floor: float = 0.05
    seed: int = 0
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        if not self.edited_module:
            raise ValueError(
                "edited_module must name a layer, such as 'model.layers.4.mlp.down_proj'; or use "
                "LEMoEEditor.for_backbone"
            )
        for name in ("expert_width", "edits_per_expert", "top_k", "steps"):
            require_range(self, name, 1, 1_000_000)
        require_range(self, "routing_threshold", 1e-3, 1.0 - 1e-3)
        require_range(self, "temperature", 1e-4, 1e4)
        require_range(self, "learning_rate", 0.0, 10.0)
        require_range(self, "loss_floor", 0.0, 10.0)
        require_range(self, "loss_scale", 1e-8, 1e8)


class LEMoEEditor(MemoryEditor[LEMoEEdit]):
    """Inserts an expert for each batch of edits into a mixture beside one FFN; the backbone's weights are not touched.

    Only layers from the edited one on are differentiated. In independent mode the n experts are trained in one batch.
    """

    def __init__(self, config: LEMoEConfig) -> None:
        self.config = config

    @classmethod
    def for_backbone(
        cls, model: Any, layers: Sequence[int] | None = None, edited_modules: str | None = None, **config: Any
    ) -> LEMoEEditor:
        """Build an editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: The one layer that the experts lie beside; by default the one in the middle.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            config: Further fields of :class:`LEMoEConfig`; `expert_width` is a sixth of the layer's output width by
                default, at least 16.

        Raises:
            BackboneError: If the layer doesn't exist, there is more than one, or the projection is ambiguous.
        """
        depth = number_of_layers(model)
        template, chosen = layers_to_edit(model, layers, edited_modules, default=[depth // 2])
        if len(chosen) != 1:
            raise BackboneError(f"LEMoE lies beside one layer, found {chosen}; give one, such as layers=[{chosen[0]}]")
        name = template.format(i=chosen[0])
        width = dimensions(modules_to_edit(model, [name])[name])[1]
        return cls(LEMoEConfig(name, **{"expert_width": max(width // 6, 16), **config}))

    @property
    def edited_module(self) -> str:
        """Full name of the projection that the mixture lies beside."""
        return self.config.edited_module

    def _remember(
        self,
        model: Any,
        tokenizer: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        mode: Mode,
        previous: Any,
    ) -> LEMoEEdit:
        number = len(batch) if mode == "independent" else 1
        self._require_fit(previous, number)
        edit: LEMoEEdit | None = previous
        for rows in self._batches(model, modules, batch, mode):
            expert = self._fit(model, modules, batch[rows], edit, number=number, names=[f"request {k}" for k in rows])
            edit = expert if edit is None else edit.joined(expert)
        assert edit is not None
        return edit

    def _require_fit(self, previous: Any, number: int) -> None:
        if previous is None:
            return
        if not isinstance(previous, LEMoEEdit):
            raise ValueError(
                f"previous must be an edit of LEMoE, which inserts experts into it, found a "
                f"{type(previous).__name__}; "
                "attach the other edit around the call instead"
            )
        require_length(previous, number)

    def _batches(self, model: Any, module: Mapping[str, nn.Module], batch: TokenBatch, mode: str) -> list[list[int]]:
        """Return the requests of each expert, in the order of insertion."""
        everything = list(range(len(batch)))
        clusters = math.ceil(len(batch) / self.config.edits_per_expert)
        if mode == "independent" or (mode == "joint" and clusters == 1):
            return [everything]
        if mode == "sequential":
            return [[k] for k in everything]
        names = [f"request {k}" for k in everything]
        keys = anchors(self._values(model, module, batch, names)[0], batch.labels)
        return clustered(unit(keys.sum(1)), clusters)

    def _values(
        self, model: Any, module: Mapping[str, nn.Module], batch: TokenBatch, names: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the values (b, l, d_in) at the edited layer, which no expert changes, and y's root mean square."""
        read: list[Tensor] = []

        def record(layer_inputs: Tensor, output: Tensor) -> Tensor:
            read.extend(tensor.detach().float().reshape(*batch.labels.shape, -1) for tensor in (layer_inputs, output))
            return output

        with torch.no_grad(), hooked(module, dict.fromkeys(module, record)):
            target_logits(model, batch)
        judged = (batch.labels != IGNORED).to(read[0].device)
        for tensor in read:
            require_finite(
                (tensor * judged.unsqueeze(-1)).flatten(1).sum(-1), f"the layer {self.config.edited_module}", names
            )
        scale = (read[1].square().mean(-1) * judged).sum(-1) / judged.sum(-1)
        return unit(read[0]), scale.sqrt().clamp(min=1e-6)

    def _fit(
        self,
        model: Any,
        module: Mapping[str, nn.Module],
        batch: TokenBatch,
        previous: LEMoEEdit | None,
        *,
        number: int,
        names: Sequence[str],
    ) -> LEMoEEdit:
        """Train an expert on the requests of a batch, or one on each of them where `number` is more than 1."""
        values, scales = self._values(model, module, batch, names)
        keys = anchors(values, batch.labels)
        keys = keys.unsqueeze(1) if number > 1 else keys.flatten(0, 1)[None, None]
        scale = scales if number > 1 else scales.mean(0, keepdim=True)
        fresh = self._new_expert(keys, dimensions(next(iter(module.values()))))
        full = fresh if previous is None else previous.joined(fresh)
        gates = full.gates(values)
        frozen = full.answer(values, functional.pad(gates[..., :-1], (0, 1)))
        weights = [fresh.memory[name][:, 0].clone().requires_grad_(True) for name in EXPERT]
        optimizer = torch.optim.Adam(weights, lr=self.config.learning_rate)
        rows = {"frozen": frozen, "gates": gates, "values": values, "scale": scale[:, None, None]}
        for _ in range(self.config.steps):
            for weight, gradient in zip(
                weights, self._gradients(model, module, batch, weights, rows, names), strict=True
            ):
                weight.grad = gradient / self.config.loss_scale
            optimizer.step()
        owners = names if number > 1 else [", ".join(names)]
        down, down_bias, up, up_bias = (weight.detach() for weight in weights)
        trained = dict(
            zip(EXPERT, (down, down_bias, up * scale[:, None, None], up_bias * scale[:, None]), strict=True)
        )
        for weight in trained.values():
            require_finite(weight.flatten(1).sum(-1), "the new expert", owners)
        return replace(fresh, memory={"keys": keys, **{name: weight.unsqueeze(1) for name, weight in trained.items()}})

    def _new_expert(self, keys: Tensor, dims: tuple[int, int]) -> LEMoEEdit:
        """Return an expert that answers zero: keys (n, 1, a, d_in); each of the n starts from the same weights."""
        config, (d_in, d_out) = self.config, dims
        shape = (len(keys), 1, config.expert_width)
        down = torch.randn(d_in, config.expert_width, generator=torch.Generator().manual_seed(config.seed)).to(
            keys.device
        )
        memory = {
            "keys": keys,
            "down": down.expand(len(keys), 1, -1, -1).clone(),
            "down_bias": keys.new_zeros(shape),
            "up": keys.new_zeros(*shape, d_out),
            "up_bias": keys.new_zeros(*shape[:2], d_out),
        }
        settings = {
            "layer": config.edited_module,
            "top_k": config.top_k,
            "threshold": config.routing_threshold,
            "temperature": config.temperature,
        }
        return LEMoEEdit(memory, settings, EditInfo())

    def _gradients(
        self,
        model: Any,
        module: Mapping[str, nn.Module],
        batch: TokenBatch,
        weights: Sequence[Tensor],
        rows: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> tuple[Tensor, ...]:
        """Gradient, by weight of the new expert, of the SUM over requests of each one's mean cross-entropy.

        A request whose loss is below the floor adds nothing.
        """

        def edited(_: Tensor, output: Tensor) -> Tensor:
            new = rows["gates"][..., -1:] * rows["scale"] * run_expert(rows["values"], *weights)
            answer, gates = (tensor.view(*output.shape[:-1], -1) for tensor in (rows["frozen"] + new, rows["gates"]))
            return add_where_routed(output, answer, gates)

        with torch.no_grad(), graph_starting_at(module), hooked(module, dict.fromkeys(module, edited)):
            losses = case_losses(*target_logits(model, batch))
            require_finite(losses, "the loss of the edit request", names)
            return torch.autograd.grad(
                losses.clamp(min=self.config.loss_floor).sum() * self.config.loss_scale, list(weights)
            )
