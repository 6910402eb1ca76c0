"""The IBKE editor: hypernetworks that turn gradient factors into a low-rank edit (Eq. 25-33).

`forward` is pure: factors in, adapted factors out; `edit` puts capture before it. The backbone is never held, saved or
trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .adapter_files import publisher
from .capture import GradientFactors, capture_factors, evaluating
from .configuration_ibke import GradientEditorConfig, IBKEConfig, Mode, require_mode
from .edit_values import EditInfo, describe
from .edits import LowRankEdit
from .layers import BackboneError, dimensions, layers_to_edit, modules_to_edit
from .records import EditRequest
from .tokens import TokenBatch, context_length, encode_requests

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AdaptedFactors:
    """What a hypernetwork makes of the factors of b requests at one layer.

    Attributes:
        layer_inputs: ĥ, (b, l_e, d_in); zero on padding.
        output_gradients: û, (b, l_e, d_out); zero on padding.
        gates: f_{W_s}(s̃) before the sigmoid, (b, l_e); None for editors without a scale factor.
        latent: z, (b, l_m, d_m); None for editors without a latent, like the next two.
        mean: μ, (b, l_m, d_m).
        log_variance: log v², (b, l_m, d_m).
        step_size: η, (); None for that of the editor at the time. It is an output like the others, so that DDP, which
            wraps `forward`, reduces the gradient of η too.
    """

    layer_inputs: Tensor
    output_gradients: Tensor
    gates: Tensor | None = None
    latent: Tensor | None = None
    mean: Tensor | None = None
    log_variance: Tensor | None = None
    step_size: Tensor | None = None


class CrossAttention(nn.Module):
    """Cross-attention δ(q W_q (k W_k)ᵀ) k W_v with biases (Eq. 28), scores divided by sqrt(d_m / heads)."""

    def __init__(self, query_dim: int, key_dim: int, dim: int, *, scale: bool, heads: int = 1) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(key_dim, dim)
        self.value = nn.Linear(key_dim, dim)
        self.heads = heads
        self.scale = 1 / math.sqrt(dim // heads) if scale else 1.0

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, q, query_dim), (b, k, key_dim), mask (b, k) True on real keys -> (b, q, dim)."""
        q, k, v = (self._split(t) for t in (self.query(queries), self.key(keys), self.value(keys)))
        allowed = None if mask is None else mask[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class IBKEHypernetwork(nn.Module):
    """The hypernetwork of one edited layer: bottleneck (first stage) and adaptation (second stage)."""

    def __init__(self, config: IBKEConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        width, dim, scale = d_in + d_out, config.latent_dim, config.attention_scale
        self.config, self.d_in, hidden = config, d_in, config.second_stage_mlp
        self.queries = nn.Parameter(torch.empty(config.latent_length, dim))
        self.mean = CrossAttention(dim, width, dim, scale=scale)
        self.log_variance = CrossAttention(dim, width, dim, scale=scale) if config.use_information_bottleneck else None
        self.readout = CrossAttention(width, dim, dim, scale=scale, heads=config.second_stage_heads)
        self.skip = nn.Linear(width, dim) if config.second_stage_skip else None
        self.mlp = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            if hidden
            else None
        )
        self.residual = nn.Linear(dim, width)
        self.gate = nn.Linear(dim, 1) if config.use_scale_factor else None

    def forward(self, x: Tensor, mask: Tensor, *, sample: bool = False, gates: Tensor | None = None) -> AdaptedFactors:
        """Adapt standardised factors x (b, l_e, d_in + d_out); `gates` (b, l_e) override the pre-sigmoid gates."""
        latent, mean, log_variance = self.encode(x, mask, sample=sample)
        state = self.readout(x, latent)  # Eq. 31
        if self.skip is not None:
            state = state + self.skip(x)
        if self.mlp is not None:
            state = state + self.mlp(state)
        if gates is None and self.gate is not None:
            gates = self.gate(state).squeeze(-1)
        adapted = x + self.residual(state)  # Eq. 32
        if gates is not None:
            adapted = torch.sigmoid(gates).unsqueeze(-1) * adapted
        adapted = adapted * mask.unsqueeze(-1)  # after the residual, whose bias would fill padding rows
        layer_inputs, output_gradients = adapted.split([self.d_in, adapted.shape[-1] - self.d_in], -1)
        return AdaptedFactors(layer_inputs, output_gradients, gates, latent, mean, log_variance)

    def encode(self, x: Tensor, mask: Tensor, *, sample: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return z, μ and log v² (Eq. 26-30); every request draws its own ε."""
        queries = self.queries.expand(len(x), -1, -1)
        mean = self.mean(queries, x, mask)
        if self.log_variance is None:
            return mean, mean, None
        log_variance = self.log_variance(queries, x, mask).clamp(*self.config.log_variance_range)
        if not sample:
            return mean, mean, log_variance
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean), mean, log_variance


class GradientEditor(PreTrainedModel):
    """Base of the editors that adapt gradient factors by hypernetworks, one per edited layer.

    A subclass gives each layer a hypernetwork that maps standardised factors to :class:`AdaptedFactors`.
    """

    config_class = GradientEditorConfig
    base_model_prefix = "editor"
    main_input_name = "factors"
    _keep_in_fp32_modules_strict = ["statistics", "log_step_sizes"]  # noqa: RUF012  as transformers declares it

    def __init__(self, config: GradientEditorConfig) -> None:
        super().__init__(config)
        if not config.edited_layers or not config.input_dims or not config.output_dims:
            raise ValueError("the config names no edited layers; use from_preset(name) or for_backbone(model)")
        dims = list(zip(config.input_dims, config.output_dims, strict=True))
        self.hypernetworks = nn.ModuleList(self.build_hypernetwork(d_in, d_out) for d_in, d_out in dims)
        self.statistics = nn.ModuleList(_Statistics(d_in + d_out) for d_in, d_out in dims)
        self.log_step_sizes = nn.Parameter(torch.zeros(len(dims)))
        self.post_init()

    def build_hypernetwork(self, d_in: int, d_out: int) -> nn.Module:
        """Return the hypernetwork of one layer."""
        raise TypeError(
            f"{type(self).__name__} builds no hypernetwork ({d_in} to {d_out}); use IBKEEditor or MENDEditor"
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, IBKEHypernetwork):
            nn.init.normal_(module.queries)  # zeros would collapse the latents
            nn.init.zeros_(module.residual.weight)  # training starts from a gated step along the standardised factors
            nn.init.zeros_(module.residual.bias)
        elif isinstance(module, _Statistics):
            module.reset()
        elif module is self:
            nn.init.zeros_(self.log_step_sizes)

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def for_backbone(
        cls, model: Any, layers: Sequence[int] | None = None, edited_modules: str | None = None, **config: Any
    ) -> Any:
        """Build an untrained editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: Edited layers; by default three that end just before the middle.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            config: Further config fields.

        Raises:
            BackboneError: If the layers don't exist or the projection is ambiguous.
        """
        template, chosen = layers_to_edit(model, layers, edited_modules)
        modules = modules_to_edit(model, [template.format(i=i) for i in chosen])
        dims = [dimensions(module) for module in modules.values()]
        fields = {
            "backbone": model.config.name_or_path,
            "edited_modules": template,
            "edited_layers": chosen,
            "input_dims": [d for d, _ in dims],
            "output_dims": [d for _, d in dims],
        }
        return cls(cls.config_class(**{**fields, **config}))

    def modules_of(self, model: Any) -> dict[str, nn.Module]:
        """Return the edited projections of a backbone.

        Raises:
            BackboneError: If layers are missing or have other widths; says what was expected and found.
        """
        modules = modules_to_edit(model, self.config.module_names())
        for (name, module), d_in, d_out in zip(
            modules.items(), self.config.input_dims, self.config.output_dims, strict=True
        ):
            if dimensions(module) != (d_in, d_out):
                raise BackboneError(
                    f"this editor was built for {self.config.backbone or 'a backbone'} where {name} maps {d_in} "
                    f"to {d_out}; "
                    f"the given model's maps {dimensions(module)[0]} to {dimensions(module)[1]}"
                )
        given = getattr(model.config, "name_or_path", "")
        if self.config.backbone and given and given != self.config.backbone:
            logger.warning_once(f"the editor was trained for {self.config.backbone!r} and is used on {given!r}")
        return modules

    @property
    def step_sizes(self) -> Tensor:
        """η of each layer, exp(θ)."""
        return self.log_step_sizes.exp()

    # --- pure ---------------------------------------------------------------------------------------------------

    def forward(
        self, factors: Sequence[GradientFactors], *, sample: bool = False, gates: Sequence[Tensor | None] | None = None
    ) -> tuple[AdaptedFactors, ...]:
        """Adapt the factors of every edited layer.

        Args:
            factors: One :class:`GradientFactors` per edited layer.
            sample: Draw z (training) instead of z = μ (inference).
            gates: Pre-sigmoid gates (b, l_e) to use in place of the computed ones, per layer.
        """
        given = gates or [None] * len(self.hypernetworks)
        return tuple(self._adapt(i, f, sample, g) for i, (f, g) in enumerate(zip(factors, given, strict=True)))

    def _adapt(self, index: int, factors: GradientFactors, sample: bool, gates: Tensor | None) -> AdaptedFactors:
        factors = factors.to(self.log_step_sizes.device)
        network: Any = self.hypernetworks[index]
        x = self.standardise(index, factors).to(next(network.parameters()).dtype)
        return replace(network(x, factors.mask, sample=sample, gates=gates), step_size=self.step_sizes[index])

    def standardise(self, index: int, factors: GradientFactors) -> Tensor:
        """Return x = (s - mean)/(std + ε) over s = h ⊕ u, (b, l_e, d_in + d_out), zero on padding (SPEC §2.4)."""
        statistics: Any = self.statistics[index]
        s = torch.cat((factors.layer_inputs, factors.output_gradients), -1)
        return (s - statistics.mean) / (statistics.std + self.config.statistics_epsilon) * factors.mask.unsqueeze(-1)

    def as_edit(
        self, adapted: Sequence[AdaptedFactors], groups: Tensor | None = None, info: EditInfo | None = None
    ) -> LowRankEdit:
        """Fold -η into û and join the rows of each group of requests into one edit (Eq. 33).

        Args:
            adapted: One per layer, for b requests.
            groups: (b,) index of the edit that each request belongs to, 0…n-1; default: one edit of all requests.
            info: Provenance of the edit.
        """
        inputs, outputs = {}, {}
        for name, factors, own in zip(self.config.module_names(), adapted, self.step_sizes, strict=True):
            step_size = own if factors.step_size is None else factors.step_size
            inputs[name] = join_groups(factors.layer_inputs.float(), groups)
            outputs[name] = join_groups(-step_size * factors.output_gradients.float(), groups)
        return LowRankEdit(inputs, outputs, info or EditInfo())

    # --- with a backbone ----------------------------------------------------------------------------------------

    def capture(
        self, model: Any, batch: TokenBatch, previous: Any = None, names: Sequence[str] | None = None
    ) -> list[GradientFactors]:
        """Read the factors of a batch of requests, on the model as edited by `previous`."""
        modules = self.modules_of(model)
        with previous.attached(model) if previous is not None else nullcontext():
            factors = capture_factors(model, modules, batch, loss_scale=self.config.capture_loss_scale, names=names)
        return list(factors.values())

    @torch.no_grad()
    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: LowRankEdit | None = None,
    ) -> LowRankEdit:
        """Return the edit that makes the model answer the requests; the model is not changed.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer.
            requests: One or more edit requests.
            mode: ``"joint"``: one edit from gradients on the unedited model; ``"sequential"``: request k is read on
                the model that carries the edits before it; ``"independent"``: request k is row k of the result, for a
                batch in which every row carries its own edit.
            previous: An edit that the model carries already. The result contains it.

        Raises:
            RequestError: If a request is unusable, naming it by its index; nothing is done then.
            BackboneError: If the model does not fit the editor.
            NonFiniteError: If a loss or factor is not finite.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        info = self._info(model, requests)
        with evaluating(self):
            if mode == "sequential":
                return self._edit_sequentially(model, batch, previous, info)
            adapted = self(self.capture(model, batch, previous))
        edit = self.as_edit(adapted, torch.arange(len(batch)) if mode == "independent" else None, info)
        return replace(
            edit.compose() if previous is None else previous.compose(edit), info=info
        )  # recompresses large joint edits

    def _edit_sequentially(
        self, model: Any, batch: TokenBatch, previous: LowRankEdit | None, info: EditInfo
    ) -> LowRankEdit:
        edit = previous
        for k in range(len(batch)):
            step = self.as_edit(self(self.capture(model, batch[k : k + 1], edit, [f"request {k}"])), None, info)
            edit = step if edit is None else edit.compose(step)
        assert edit is not None
        return replace(edit, info=info)

    def _info(self, model: Any, requests: Sequence[EditRequest]) -> EditInfo:
        editor = self.config.name_or_path or type(self).__name__
        return describe(model, self.modules_of(model), requests, editor=editor, backbone=self.config.backbone)

    @torch.no_grad()
    def calibrate(self, model: Any, batches: Sequence[TokenBatch]) -> Mapping[str, float]:
        """Measure the standardisation statistics and set η's start (SPEC §2.4 and §3); once, before training.

        Args:
            model: The backbone.
            batches: Requests, at least 256 together for stable statistics.

        Returns:
            η of each layer by module name.
        """
        captured = [self.capture(model, batch) for batch in batches]
        device = self.log_step_sizes.device
        for i, statistics in enumerate(self._all_statistics()):
            rows = [torch.cat((f[i].layer_inputs, f[i].output_gradients), -1)[f[i].mask].to(device) for f in captured]
            statistics.measure(rows)
        ratios: list[list[Tensor]] = [[] for _ in self.statistics]
        for factors in captured:
            for i, adapted in enumerate(self(factors)):
                x = factors[i].layer_inputs.to(device)
                side = torch.bmm(torch.bmm(x, adapted.layer_inputs.float().mT), adapted.output_gradients.float())
                ratios[i].append(side.flatten(1).norm(dim=-1) / factors[i].output_norms.to(device))
        for i, ratio in enumerate(ratios):
            self.log_step_sizes[i] = (
                math.log(self.config.initial_edit_ratio) - torch.cat(ratio).median().clamp(min=1e-12).log()
            )
        return dict(zip(self.config.module_names(), self.step_sizes.tolist(), strict=True))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Publish weights, config, card, results and code in one commit; options: :func:`ibke_hf.hub.push.push_editor`."""
        return publisher().push_editor(self, repo_id, **options)

    @property
    def is_calibrated(self) -> bool:
        """Tell whether the statistics were measured."""
        return all(bool(statistics.count > 0) for statistics in self._all_statistics())

    def _all_statistics(self) -> list[_Statistics]:
        return [module for module in self.statistics if isinstance(module, _Statistics)]


class _Statistics(nn.Module):
    """Mean and standard deviation per feature of h ⊕ u: saved buffers, frozen after calibration."""

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("count", torch.zeros(()))

    def reset(self) -> None:
        self.mean.zero_()
        self.std.fill_(1.0)
        self.count.zero_()

    def measure(self, rows: Sequence[Tensor]) -> None:
        """Set the statistics from rows (tokens, width), in two passes."""
        number = sum(len(row) for row in rows)
        mean = torch.stack([row.sum(0) for row in rows]).sum(0) / number
        variance = torch.stack([(row - mean).square().sum(0) for row in rows]).sum(0) / number
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt())
        self.count.fill_(number)


def join_groups(rows: Tensor, groups: Tensor | None) -> Tensor:
    """Concatenate the token rows of each group: (b, l, d) and groups (b,) -> (n, m·l, d), zero-padded to equal m."""
    if groups is None:
        return rows.reshape(1, -1, rows.shape[-1])
    groups = groups.to(rows.device)
    sizes = torch.bincount(groups)
    if int(sizes.max()) == 1 and torch.equal(groups, torch.arange(len(groups), device=groups.device)):
        return rows
    order = torch.argsort(groups, stable=True)
    starts = sizes.cumsum(0) - sizes
    slots = torch.empty_like(groups)
    slots[order] = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    joined = rows.new_zeros(len(sizes), int(sizes.max()), *rows.shape[1:])
    return joined.index_put((groups, slots), rows).flatten(1, 2)


class IBKEEditor(GradientEditor):
    """Information Bottleneck Knowledge Editor (Eq. 25-33)."""

    config_class = IBKEConfig

    def build_hypernetwork(self, d_in: int, d_out: int) -> nn.Module:
        """Return the hypernetwork of one layer."""
        return IBKEHypernetwork(self.config, d_in, d_out)  # type: ignore[arg-type]

    @classmethod
    def from_preset(cls, backbone: str, **overrides: Any) -> IBKEEditor:
        """Return an untrained editor in the paper's configuration for a backbone of SPEC §6."""
        return cls(IBKEConfig.from_preset(backbone, **overrides))


AutoConfig.register("ibke", IBKEConfig, exist_ok=True)
AutoModel.register(IBKEConfig, IBKEEditor, exist_ok=True)
