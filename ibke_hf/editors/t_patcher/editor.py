"""How T-Patcher edits: it adds a neuron for every target token that the model does not predict, and trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.capture import case_losses, graph_starting_at, require_finite, target_logits
from ...core.configuration_ibke import Mode, require_choice, require_range, require_template, steps_of
from ...core.edit_values import Edit
from ...core.layers import (
    device_of,
    layers_to_edit,
    number_of_layers,
)
from ...core.tokens import IGNORED, TokenBatch, context_length, encode_prompt
from ..memory import MemoryEditor
from .patches import Activation, TPatcherEdit, patched_ffn, widths_of
from .queries import SAMPLED_TEXTS, prompts, run, sampled_texts
from .training import NewPatches, Patches


@dataclass(frozen=True)
class TPatcherConfig:
    """Hyper-parameters of :class:`TPatcherEditor`.

    Args:
        edited_modules: Name template of the FFN output projections, ``{i}`` standing for the layer; the patches join
            the FFN module that it is part of.
        edited_layer: Index of the layer [paper: the last].
        memory: Texts whose tokens the patches must stay silent on [paper: training data]. By default the model writes
            them itself, 64 of 32 tokens from a fixed seed.
        memory_size: Number of memory queries at most, spread evenly over the texts.
        activation: Act of the patches; only with ``"relu"`` silence is exact.
        learning_rate: Adam's, in units of what each part starts from, so that it means the same in every backbone: the
            root mean square of k_p, 1 for b_p, the root mean square of the FFN's output for v_p.
        steps: Adam steps at most for each request.
        stop_loss: A request is done once its loss is no higher and its patches are silent on all of the memory.
        activation_weight: a [paper: 1].
        memory_weight: m [paper: 10; 1 was silent enough with our μ, and fires on more rephrases].
        activation_threshold: β, what activations on the memory are pushed below [paper: -3].
        activation_margin: γ, their difference to the mistake's, likewise [paper: -3].
        memory_top_k: k of S [paper: 1,000, of a larger memory].
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_modules: str
    edited_layer: int
    memory: tuple[str, ...] = ()
    memory_size: int = 4096
    activation: Activation = "relu"
    learning_rate: float = 0.1
    steps: int = 300
    stop_loss: float = 0.05
    activation_weight: float = 1.0
    memory_weight: float = 1.0
    activation_threshold: float = -3.0
    activation_margin: float = -3.0
    memory_top_k: int = 1000
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        require_template(self.edited_modules)
        require_choice("activation", self.activation, get_args(Activation))
        if isinstance(self.memory, str) or not all(isinstance(text, str) and text.strip() for text in self.memory):
            raise ValueError("memory must be a sequence of texts, each with at least one word")
        for name, low, high in (
            ("edited_layer", 0, 100_000),
            ("memory_size", 1, 10_000_000),
            ("learning_rate", 0, 1e6),
            ("steps", 1, 100_000),
            ("stop_loss", 0, 100),
            ("activation_weight", 0, 1e6),
            ("memory_weight", 0, 1e6),
            ("activation_threshold", -50, 50),
            ("activation_margin", -50, 50),
            ("memory_top_k", 1, 10_000_000),
            ("loss_scale", 1e-8, 1e8),
        ):
            require_range(self, name, low, high)

    @property
    def module(self) -> str:
        """Name of the output projection of the patched FFN."""
        return self.edited_modules.format(i=self.edited_layer)


class TPatcherEditor(MemoryEditor[TPatcherEdit]):
    """Adds a neuron for every target token that the model, told the target so far, does not predict.

    A patch is trained to stay silent on the memory, on the other tokens of its request, on the queries of the patches
    that `previous` holds, and in joint mode on the other requests. What the model predicts right already gets no
    patch.
    """

    def __init__(self, config: TPatcherConfig) -> None:
        self.config = config
        self._memories: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    @classmethod
    def for_backbone(
        cls,
        model: Any,
        layers: Sequence[int] | None = None,
        edited_modules: str | None = None,
        *,
        memory: Sequence[str] = (),
        **config: Any,
    ) -> TPatcherEditor:
        """Build an editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: The one layer whose FFN is patched; by default the last.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            memory: Texts whose tokens the patches must stay silent on; by default the model's own.
            config: Further fields of :class:`TPatcherConfig`.

        Raises:
            BackboneError: If the layer doesn't exist, the projection is ambiguous, or its FFN is no module of its own.
            ValueError: If several layers are given, or a hyper-parameter is out of range.
        """
        if layers is not None and len(layers) != 1:
            raise ValueError(
                f"T-Patcher patches one layer, found layers={list(layers)}; give one, such as "
                f"[{number_of_layers(model) - 1}]"
            )
        template, (layer,) = layers_to_edit(
            model, layers or None, edited_modules, default=[number_of_layers(model) - 1]
        )
        texts: Any = memory if isinstance(memory, str) else tuple(memory)  # the config refuses a bare text
        settings = TPatcherConfig(template, layer, texts, **config)
        patched_ffn(model, settings.module)
        return cls(settings)

    @property
    def edited_module(self) -> str:
        """Full name of the projection that the patched FFN ends with."""
        return self.config.module

    def _modules(self, model: Any) -> Mapping[str, nn.Module]:
        patched_ffn(model, self.edited_module)  # says so if the FFN is no module of its own
        return super()._modules(model)

    def _remember(
        self,
        model: Any,
        tokenizer: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        mode: Mode,
        previous: Any,
    ) -> TPatcherEdit:
        ffn, module = patched_ffn(model, self.edited_module)
        number = len(batch) if mode == "independent" else 1
        patches = self._patches_of(previous, number, widths_of(model, self.edited_module), device_of(module))
        names = [f"request {k}" for k in range(len(batch))]
        memory = self._memory(model, tokenizer, {ffn: module})
        for rows in steps_of(mode, len(batch)):
            patches = self._add(model, {ffn: module}, batch[rows].trimmed(), patches, memory, names[rows])
        return self._edit_of(patches)

    def _edit_of(self, patches: Patches) -> TPatcherEdit:
        return TPatcherEdit(patches, self._settings())

    def _settings(self) -> dict[str, str]:
        return {"module": self.config.module, "activation": self.config.activation}

    def _patches_of(
        self, previous: Edit | None, number: int, widths: tuple[int, int], device: torch.device
    ) -> Patches:
        """Return the patches that `previous` holds, or none; `number` sets of them."""
        if previous is None:
            keys, values = (torch.zeros(number, 0, width, device=device) for width in widths)
            return {"keys": keys, "biases": keys.sum(-1), "values": values, "queries": torch.zeros_like(keys)}
        if not isinstance(previous, TPatcherEdit) or dict(previous.settings) != self._settings():
            other = dict(previous.settings) if isinstance(previous, TPatcherEdit) else type(previous).__name__
            raise ValueError(
                f"T-Patcher goes on from patches of {self._settings()}, previous holds {other}; attach both instead"
            )
        return previous.copied(number, device)

    def _memory(self, model: Any, tokenizer: Any, ffn: Mapping[str, nn.Module]) -> Tensor:
        """Return the memory queries M (c, d); they are read once for each model."""
        if model not in self._memories:
            longest = context_length(model)
            texts = [encode_prompt(tokenizer, text)[:longest] for text in self.config.memory] or sampled_texts(model)
            read = []
            for start in range(0, len(texts), SAMPLED_TEXTS):
                batch = prompts(texts[start : start + SAMPLED_TEXTS])
                queries = run(model, ffn, batch)[0]
                names = [f"memory text {start + k}" for k in range(len(batch))]
                require_finite(queries.flatten(1).sum(-1), "the input of the patched FFN", names)
                read.append(queries[batch.attention_mask.bool().to(queries.device)])
            queries = torch.cat(read)
            kept = torch.linspace(0, len(queries) - 1, min(self.config.memory_size, len(queries))).round().long()
            self._memories[model] = queries[kept.to(queries.device)]
        return self._memories[model]

    def _add(
        self,
        model: Any,
        ffn: Mapping[str, nn.Module],
        batch: TokenBatch,
        patches: Patches,
        memory: Tensor,
        names: Sequence[str],
    ) -> Patches:
        """Add a trained patch for each mistake in the batch."""
        with self._edit_of(patches).attached(model):
            queries, outputs, logits = run(model, ffn, batch)
        real = batch.attention_mask.bool().to(queries.device)
        for what, values in (("input", queries), ("output", outputs)):
            require_finite(values.sum(-1).masked_fill(~real, 0).sum(-1), f"the {what} of {next(iter(ffn))}", names)
        wrong = batch.labels != IGNORED
        wrong[:, -logits.shape[1] :] &= logits.argmax(-1).cpu() != batch.labels[:, -logits.shape[1] :]
        requests, columns = wrong.nonzero(as_tuple=True)
        if not len(requests):
            return patches
        number, old = patches["biases"].shape
        rows = requests if number > 1 else torch.zeros_like(requests)
        places = old + torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # counted within each row
        here = (requests.to(queries.device), columns.to(queries.device))
        fresh = NewPatches(self.config, requests, rows, places, queries[here], outputs[here], memory.mean(0))
        silent = fresh.silent_on(memory, queries, real, patches["queries"])
        return self._train(model, ffn, batch, fresh.beside(patches), fresh, silent, names)

    def _train(
        self,
        model: Any,
        ffn: Mapping[str, nn.Module],
        batch: TokenBatch,
        patches: Patches,
        fresh: NewPatches,
        silent: tuple[Tensor, Tensor],
        names: Sequence[str],
    ) -> Patches:
        """Train the new patches; those of a request are left alone once it is answered and they are silent."""
        learning = torch.ones(len(fresh.requests), dtype=torch.bool)
        optimizer = torch.optim.Adam(fresh.changes, lr=self.config.learning_rate)
        for _ in range(self.config.steps):
            asked = fresh.requests[learning].unique()
            with torch.no_grad(), graph_starting_at(ffn):
                with torch.enable_grad():
                    edit = self._edit_of(fresh.written_to(patches))
                    edit = edit if len(edit) == 1 else edit.select(asked)
                    terms, loudest = fresh.losses(*silent)
                with edit.attached(model):
                    losses = case_losses(*target_logits(model, batch[asked]))
                require_finite(losses, "the loss of the edit request", [names[k] for k in asked.tolist()])
                moving = learning.to(terms.device)
                total = losses.sum() + terms[moving].sum().to(losses.device)
                gradients = torch.autograd.grad(total * self.config.loss_scale, fresh.changes)
            undone = torch.zeros(len(batch), dtype=torch.bool)
            undone[asked[losses.detach().cpu() > self.config.stop_loss]] = True
            undone[fresh.requests[learning & (loudest.cpu() > 0)]] = True
            learning &= undone[fresh.requests]
            if not learning.any():
                break
            fresh.step(optimizer, [gradient / self.config.loss_scale for gradient in gradients], learning)
        added = {name: tensor.detach() for name, tensor in fresh.written_to(patches).items()}
        require_finite(fresh.size(), "a patch", [names[k] for k in fresh.requests.tolist()])
        return added
