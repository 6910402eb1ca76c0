"""The T-Patcher baseline: one trained neuron in the last FFN for each token that the model gets wrong.

Huang et al. 2023, "Transformer-Patcher: One Mistake worth One Neuron", ICLR. With q the input of the last FFN at a
token, patches (k_p, b_p, v_p) change its output to

    FFN_p(q) = FFN(q) + Σ_p Act(q·k_p + b_p) v_p

and are trained at the query q_e of the mistake, among memory queries M of text that they must stay silent on, by

    l = l_e + a l_a + m (l_m1 + l_m2)          l_e: cross-entropy of the target
    l_a  = exp(-q_e·k_p - b_p)                 the patch fires on the mistake
    l_m1 = S(M k_p + b_p - β)                  it is silent on the memory: below β
    l_m2 = S((M - q_e) k_p - γ)                and far below the mistake's own activation: by γ
    S(v) = mean of the k largest exp(v).

A patch of a ReLU that is silent adds an exact zero, so a token that no patch fires on is predicted bit-identically.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.attachment import LayerHook, hooked, require_row_per_edit
from ..core.capture import case_losses, evaluating, graph_starting_at, require_finite, target_logits
from ..core.configuration_ibke import Mode, require_mode, require_range
from ..core.edit_values import Edit, describe, require_length
from ..core.layers import (
    BackboneError,
    device_of,
    dimensions,
    is_projection,
    layers_to_edit,
    modules_to_edit,
    number_of_layers,
    plain_name,
)
from ..core.records import EditRequest
from ..core.tokens import IGNORED, TokenBatch, context_length, encode_prompt, encode_requests, pad_and_label
from ._patches import NewPatches, Patches
from .memory import MemoryEdit

Activation = Literal["relu", "gelu", "silu"]
OWN_TEXTS, OWN_LENGTH = 64, 32  # what the model writes itself where no memory is given


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
        if "{i}" not in self.edited_modules:
            raise ValueError(
                f"edited_modules must contain {{i}} in place of the layer's index, found {self.edited_modules!r}"
            )
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, found {self.activation!r}")
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


@dataclass(frozen=True, eq=False)
class TPatcherEdit(MemoryEdit):
    """n independent sets of up to p patches of one FFN.

    `memory` holds ``keys`` (n, p, d), ``biases`` (n, p) and ``values`` (n, p, d_out) of the patches, and the
    ``queries`` (n, p, d) that they were trained to fire on, which later patches stay silent on; all are zero where a
    set has fewer patches. `settings` names the ``module`` (the FFN's output projection) and the ``activation``.
    """

    kind = "t_patcher"

    def __post_init__(self) -> None:
        """Refuse patches that lack a part."""
        super().__post_init__()
        shapes = {name: tuple(self.memory[name].shape) for name in ("keys", "biases", "values", "queries")}
        number = shapes["biases"]
        expected = {"keys": (*number, shapes["keys"][-1]), "biases": number, "values": (*number, shapes["values"][-1])}
        if len(number) != 2 or shapes != expected | {"queries": expected["keys"]}:
            raise ValueError(
                f"patches have keys and queries (n, p, d), biases (n, p) and values (n, p, d_out), found {shapes}"
            )
        if self.settings["activation"] not in get_args(Activation) or not isinstance(self.settings["module"], str):
            raise ValueError(f"the settings must name the module and the activation, found {dict(self.settings)}")

    @property
    def patches(self) -> list[int]:
        """Number of patches of each set."""
        counts: list[int] = (self.memory["queries"] != 0).any(-1).sum(-1).tolist()
        return counts

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return the FFN and its patches."""
        name, module = patched_ffn(model, self.settings["module"])
        wanted, found = (
            (self.memory["keys"].shape[-1], self.memory["values"].shape[-1]),
            _widths(model, self.settings["module"]),
        )
        if wanted != found:
            raise BackboneError(
                f"the patches expect {name} to map {wanted[0]} to {wanted[1]}, the model's maps {found[0]} to "
                f"{found[1]}; "
                "they were made for another backbone"
            )
        keys, biases, values = (
            self.memory[part].to(device_of(module)).float() for part in ("keys", "biases", "values")
        )
        return {name: (module, _patched(keys, biases, values, getattr(functional, self.settings["activation"])))}


def _patched(keys: Tensor, biases: Tensor, values: Tensor, activation: Any) -> LayerHook:
    """Return x (b, l, d), y (b, l, d_out) -> y + Σ_p Act(x·k_p + b_p) v_p, summed in fp32."""
    number = len(keys)

    def patch(x: Tensor, y: Tensor) -> Tensor:
        require_row_per_edit(number, x)
        queries = x.float().reshape(number, -1, x.shape[-1])  # one set of patches serves all rows as one
        added = activation(queries @ keys.mT + biases.unsqueeze(1)) @ values
        return (y + added.reshape(y.shape)).to(y.dtype)

    return patch


def patched_ffn(model: Any, projection: str) -> tuple[str, nn.Module]:
    """Return, by name, the FFN module that an output projection is part of.

    Raises:
        BackboneError: If the model lacks the projection, or it lies in the decoder block itself, without an FFN module
            around it.
    """
    modules_to_edit(model, [projection])
    name = projection.rpartition(".")[0]
    if name.rpartition(".")[2].isdigit() or not name:
        raise BackboneError(
            f"{projection} lies in the decoder block {name!r} itself; T-Patcher needs an FFN that is a module of "
            f"its own"
        )
    found = next(module for full, module in model.named_modules() if plain_name(full) == name)
    return name, found


def _widths(model: Any, projection: str) -> tuple[int, int]:
    """Return (d, d_out): the width of an FFN's input, which its first projection reads, and of its output."""
    _, ffn = patched_ffn(model, projection)
    first = next(module for module in ffn.modules() if is_projection(module))
    return dimensions(first)[0], dimensions(modules_to_edit(model, [projection])[projection])[1]


class TPatcherEditor:
    """Adds a neuron for every target token that the model, told the target so far, does not predict.

    A patch is trained to stay silent on the memory, on the other tokens of its request, on the queries of the patches
    that `previous` holds, and in joint mode on the other requests. What the model predicts right already gets no
    patch.
    """

    supports_independent = True

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
        template, (layer,) = layers_to_edit(model, layers or [number_of_layers(model) - 1], edited_modules)
        made = TPatcherConfig(template, layer, memory if isinstance(memory, str) else tuple(memory), **config)  # type: ignore[arg-type]
        patched_ffn(model, made.module)
        return cls(made)

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: Edit | None = None,
    ) -> TPatcherEdit:
        """Return the patches that make the model answer the requests; the model is not changed.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer.
            requests: One or more edit requests.
            mode: ``"joint"``: one set of patches, trained at once; ``"sequential"``: request after request, each on
                the model that carries the patches before it; ``"independent"``: request k has a set of its own, row k
                of the result.
            previous: Patches that the model carries already, or one set for each request in independent mode. The
                result contains them, unchanged.

        Raises:
            RequestError: If a request is unusable, naming it by its index; nothing is done then.
            BackboneError: If the model lacks the patched FFN.
            NonFiniteError: If a query, loss or patch is not finite.
            ValueError: If `previous` holds no patches of this FFN, or another number of sets than fits the mode.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        ffn, module = patched_ffn(model, self.config.module)
        number = len(batch) if mode == "independent" else 1
        patches = self._patches_of(previous, number, _widths(model, self.config.module), device_of(module))
        names = [f"request {k}" for k in range(len(batch))]
        steps = [slice(k, k + 1) for k in range(len(batch))] if mode == "sequential" else [slice(None)]
        with torch.inference_mode(False), evaluating(model):
            memory = self._memory(model, tokenizer, {ffn: module})
            for rows in steps:
                patches = self._add(model, {ffn: module}, batch[rows].trimmed(), patches, memory, names[rows])
        modules = modules_to_edit(model, [self.config.module])
        return replace(self._edit_of(patches), info=describe(model, modules, requests, editor=type(self).__name__))

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
            found = dict(previous.settings) if isinstance(previous, TPatcherEdit) else type(previous).__name__
            raise ValueError(
                f"T-Patcher goes on from patches of {self._settings()}, previous holds {found}; attach both instead"
            )
        require_length(previous, number)
        return {
            name: tensor.expand(number, *tensor.shape[1:]).clone()
            for name, tensor in previous.to(device).memory.items()
        }

    def _memory(self, model: Any, tokenizer: Any, ffn: Mapping[str, nn.Module]) -> Tensor:
        """Return the memory queries M (c, d); they are read once for each model."""
        if model not in self._memories:
            longest = context_length(model)
            texts = [encode_prompt(tokenizer, text)[:longest] for text in self.config.memory] or own_texts(model)
            found = []
            for start in range(0, len(texts), OWN_TEXTS):
                batch = _prompts(texts[start : start + OWN_TEXTS])
                queries = _run(model, ffn, batch)[0]
                names = [f"memory text {start + k}" for k in range(len(batch))]
                require_finite(queries.flatten(1).sum(-1), "the input of the patched FFN", names)
                found.append(queries[batch.attention_mask.bool().to(queries.device)])
            queries = torch.cat(found)
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
            queries, outputs, logits = _run(model, ffn, batch)
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
        """Train the new patches; those of a request stop, and are left alone, once it is answered and they are silent."""
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


def own_texts(model: Any) -> list[list[int]]:
    """Let the model write texts of its own, each from a random token on, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.get_text_config().vocab_size, (OWN_TEXTS, 1), generator=generator)
    for _ in range(min(OWN_LENGTH, context_length(model) or OWN_LENGTH) - 1):
        with torch.no_grad():
            logits = target_logits(model, _prompts(texts.tolist()))[0][:, -1].float().cpu()
        require_finite(logits.sum(-1), "the model's prediction", [f"its own text {k}" for k in range(OWN_TEXTS)])
        texts = torch.cat([texts, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return texts.tolist()  # type: ignore[no-any-return]


def _prompts(texts: Sequence[Sequence[int]]) -> TokenBatch:
    """Pad texts of which every token is fed; the label, which nobody reads, keeps the last column's logits."""
    return pad_and_label([([*ids, 0], len(ids)) for ids in texts])


def _run(model: Any, ffn: Mapping[str, nn.Module], batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return input (b, l, d) and output (b, l, d_out) of the FFN, fp32, and the logits of the columns that hold labels."""
    seen: dict[str, Tensor] = {}

    def record(x: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x, y=y)
        return y

    with torch.no_grad(), hooked(ffn, dict.fromkeys(ffn, record)):
        logits = target_logits(model, batch)[0]
    x, y = (seen[part].float().reshape(*batch.labels.shape, -1) for part in "xy")
    return x, y, logits
