"""The IBKE editor: hypernetworks that turn gradient factors into a low-rank edit (Eq. 25-33).

`forward` is pure: factors in, adapted factors out; `edit` puts capture before it. The backbone is never held, saved or
trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from .adapter_files import publisher
from .capture import GradientFactors, capture_factors, evaluating, read_layers
from .composition import SolvedEdit, keys_of, warn_of_conflicts
from .configuration_ibke import (
    COMPOSITIONS,
    Composition,
    GradientEditorConfig,
    IBKEConfig,
    Mode,
    require_choice,
    require_mode,
)
from .conflicts import conflict_warning, conflicting_requests
from .edit_values import EditInfo, EditValue, describe, described
from .editor_model import EditorModel
from .edits import LowRankEdit
from .factor_statistics import FactorStatistics, Moments
from .factors import join_groups
from .hypernetworks import AdaptedFactors, IBKEHypernetwork
from .layers import BackboneError, dimensions, input_device, layers_to_edit, modules_to_edit
from .records import EditRequest
from .ridge import in_16_bit
from .tokens import TokenBatch, context_length, encode_requests

logger = logging.get_logger(__name__)
EDITS_AT_ONCE = 32  # of a sequence that are made in one batch: what bounds memory
Capture = Callable[[Any, TokenBatch], Sequence[GradientFactors]]


class GradientEditor(EditorModel):
    """Base of the editors that adapt gradient factors by hypernetworks, one per edited layer.

    A subclass gives each layer a hypernetwork that maps standardised factors to :class:`AdaptedFactors`.
    """

    config_class = GradientEditorConfig
    config: Any
    main_input_name = "factors"
    _keep_in_fp32_modules_strict = ["statistics", "log_step_sizes"]  # noqa: RUF012  as transformers declares it

    def __init__(self, config: GradientEditorConfig) -> None:
        super().__init__(config)
        if not config.edited_layers or not config.input_dims or not config.output_dims:
            raise ValueError("the config names no edited layers; use from_preset(name) or for_backbone(model)")
        dims = list(zip(config.input_dims, config.output_dims, strict=True))
        self.hypernetworks = nn.ModuleList(self.build_hypernetwork(d_in, d_out) for d_in, d_out in dims)
        self.statistics = nn.ModuleList(FactorStatistics(d_in + d_out) for d_in, d_out in dims)
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
        elif isinstance(module, FactorStatistics):
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
            "base_model_name_or_path": model.config.name_or_path,
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
                    f"this editor was built for {self.config.base_model_name_or_path or 'a backbone'} where "
                    f"{name} maps {d_in} to {d_out}; the given model's maps {dimensions(module)[0]} to "
                    f"{dimensions(module)[1]}"
                )
        self.warn_of_other_backbone(model)
        return modules

    @property
    def step_sizes(self) -> Tensor:
        """η of each layer, exp(θ)."""
        return self.log_step_sizes.exp()

    # --- pure ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        factors: Sequence[GradientFactors],
        *,
        sample: bool = False,
        gates: Sequence[Tensor | None] | None = None,
        with_variance: bool = True,
    ) -> tuple[AdaptedFactors, ...]:
        """Adapt the factors of every edited layer.

        Args:
            factors: One :class:`GradientFactors` per edited layer.
            sample: Draw z (training) instead of z = μ (inference).
            gates: Pre-sigmoid gates (b, l_e) to use in place of the computed ones, per layer.
            with_variance: Compute v² also where nothing is drawn with it: a fifth of the work, which edits do without.
        """
        overrides = gates or [None] * len(self.hypernetworks)
        options = {"sample": sample, "with_variance": with_variance}
        return tuple(
            self._adapt(i, f, gates=g, **options) for i, (f, g) in enumerate(zip(factors, overrides, strict=True))
        )

    def _adapt(self, index: int, factors: GradientFactors, **options: Any) -> AdaptedFactors:
        factors = factors.to(self.log_step_sizes.device)
        network: Any = self.hypernetworks[index]
        x = self.standardise(index, factors).to(next(network.parameters()).dtype)
        adapted = replace(network(x, factors.mask, **options), step_size=self.step_sizes[index])
        if self.config.size_by_gradient:
            size = self._relative_sizes(index, factors).to(x.dtype)
            share = size / (size + self.config.size_by_gradient)
            adapted = replace(adapted, output_gradients=adapted.output_gradients * share[:, None, None])
        return adapted

    def _relative_sizes(self, index: int, factors: GradientFactors) -> Tensor:
        """Return the size (b,) of each request's u beside that of the calibration set, where a typical one has 1."""
        statistics: Any = self.statistics[index]
        mean, std = (part[factors.layer_inputs.shape[-1] :] for part in (statistics.mean, statistics.std))
        usual = (mean.square() + std.square()).sum() * factors.mask.sum(-1)
        return (factors.output_gradients.square().sum((1, 2)) / usual.clamp(min=1e-30)).sqrt()

    def standardise(self, index: int, factors: GradientFactors) -> Tensor:
        """Return x = (s - mean)/(std + ε) over s = h ⊕ u, (b, l_e, d_in + d_out), zero on padding (SPEC §2.4)."""
        statistics: Any = self.statistics[index]
        s = torch.cat((factors.layer_inputs, factors.output_gradients), -1)
        return (s - statistics.mean) / (statistics.std + self.config.statistics_epsilon) * factors.mask.unsqueeze(-1)

    def as_edit(
        self,
        adapted: Sequence[AdaptedFactors],
        groups: Tensor | None = None,
        info: EditInfo | None = None,
        captured: Sequence[GradientFactors] = (),
    ) -> LowRankEdit:
        """Fold -η into û and join the rows of each group of requests into one edit (Eq. 33).

        Args:
            adapted: One per layer, for b requests.
            groups: (b,) index of the edit that each request belongs to, 0…n-1; default: one edit of all requests.
            info: Provenance of the edit.
            captured: The factors that were adapted, whose inputs become the edit's keys; none: it has none.
        """
        inputs, outputs = {}, {}
        for name, factors, current in zip(self.config.module_names(), adapted, self.step_sizes, strict=True):
            step_size = current if factors.step_size is None else factors.step_size
            whole = factors.layer_inputs.float().contiguous()  # a view would keep û's columns alive beside it
            inputs[name] = join_groups(whole, groups)
            outputs[name] = join_groups(-step_size * factors.output_gradients.float(), groups)
        named = zip(self.config.module_names(), captured, strict=False)
        keys = {name: in_16_bit(join_groups(factors.layer_inputs, groups)) for name, factors in named}
        edit = LowRankEdit(inputs, outputs, info or EditInfo(), keys=keys)
        return edit.truncate(self.config.edit_rank) if self.config.edit_rank else edit

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
        previous: LowRankEdit | SolvedEdit | None = None,
        composition: Composition | None = None,
    ) -> LowRankEdit | SolvedEdit:
        """Return the edit that makes the model answer the requests; arguments and errors are :class:`Editor`'s.

        In joint mode it comes of gradients on the unedited model. `previous` is low-rank or solved. How requests are
        carried together, in sequential mode and with `previous`, is the config's `composition` unless it is given:
        where it is ``"solve"``, every edit is made on the unedited model, and all of them are solved together. A
        `previous` without keys, such as one of an earlier version or of another editor, cannot be solved: by default
        the new edits are then summed onto it, which is logged. An edit that is made in company, or by
        ``"solve"``, reads its keys under itself, which takes one more pass of its requests; a lone one by ``"auto"``
        has those of the unedited model, which are there anyway and serve a little less well.
        Edits that are at odds are named in the log, see :func:`~ibke_hf.core.conflicts.conflicts`.

        Raises:
            ValueError: Also if `composition` is ``"solve"`` and `previous` has no keys.
        """
        require_mode(mode)
        how = self._composition(composition, previous)
        if mode == "joint" or (mode == "sequential" and how == "sum"):
            self._warn_of_large_groups(requests, previous if how == "sum" else None)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        info = self._info(model, requests)
        in_company = previous is not None or (mode == "sequential" and len(batch) > 1)
        if how == "sum" or mode == "independent" or not in_company:
            _warn_of_conflicting_requests(requests, mode, previous)
        if how == "solve":
            reads_keys = in_company or "solve" in (composition, self.config.composition)
            return self._edit_solved(model, batch, info, mode, previous, reads_keys=reads_keys)
        if isinstance(previous, SolvedEdit):
            previous = previous.low_rank()
        with evaluating(self):
            if mode == "sequential":
                return self._edit_sequentially(model, batch, previous, info)
            adapted = self(self.capture(model, batch, previous), with_variance=False)
        edit = self.as_edit(adapted, None if mode == "joint" else torch.arange(len(batch)))
        if previous is None:
            return described(edit.compose(), info)  # recompresses large joint edits
        return described(previous._sum([edit]), info, previous)

    def _composition(self, composition: Composition | None, previous: LowRankEdit | SolvedEdit | None) -> str:
        """Return how edits are carried together; what was saved without keys is summed unless that is forbidden."""
        if composition is not None:
            require_choice("composition", composition, COMPOSITIONS)
            return composition
        if self.config.composition != "sum" and isinstance(previous, LowRankEdit) and not previous.has_keys:
            logger.warning_once(
                "the previous edit does not carry the inputs that it was made for, so the new ones are summed onto it "
                'instead of being solved together with it; make it again, or say composition="sum"'
            )
            return "sum"
        return "sum" if self.config.composition == "sum" else "solve"

    def _edit_solved(
        self,
        model: Any,
        batch: TokenBatch,
        info: EditInfo,
        mode: Mode,
        previous: LowRankEdit | SolvedEdit | None,
        *,
        reads_keys: bool,
    ) -> LowRankEdit | SolvedEdit:
        edits: list[LowRankEdit | SolvedEdit] = [] if previous is None else [previous]
        if mode == "sequential":
            for start in range(0, len(batch), EDITS_AT_ONCE):
                places = range(start, min(start + EDITS_AT_ONCE, len(batch)))
                lot = replace(info, requests=info.requests[start : places.stop])
                part = batch[start : places.stop]
                edits += self._edit_on_unedited(model, part, lot, places, joint=False, reads_keys=reads_keys)
        else:
            joint, places = mode == "joint", range(len(batch))
            edits.append(self._edit_on_unedited(model, batch, info, places, joint=joint, reads_keys=reads_keys))
        if mode != "independent":
            warn_of_conflicts(edits)
        return SolvedEdit.of(edits, self.config.ridge)

    def _edit_on_unedited(
        self,
        model: Any,
        batch: TokenBatch,
        info: EditInfo,
        places: Sequence[int],
        *,
        joint: bool,
        reads_keys: bool,
    ) -> LowRankEdit:
        """Return the edit of some requests, or one of each, with its keys, read under it or of the unedited model."""
        groups = None if joint else torch.arange(len(batch))
        with evaluating(self):
            captured = self.capture(model, batch, names=[f"request {k}" for k in places])
            edit = self.as_edit(self(captured, with_variance=False), groups)
        if reads_keys:
            keys = self._keys(model, batch, edit, groups)
        else:
            inputs = {name: factors.layer_inputs for name, factors in zip(edit.layers, captured, strict=True)}
            keys = keys_of(batch, inputs, groups)
        edit = edit.compose() if joint else edit  # recompresses large joint edits
        return described(replace(edit, keys=keys), info)

    def _keys(self, model: Any, batch: TokenBatch, edit: LowRankEdit, groups: Tensor | None) -> dict[str, Tensor]:
        """Read the inputs of the edited layers for requests on the model that carries the edit of each."""
        batch = batch.to(input_device(model))
        with evaluating(model), edit.attached(model):
            layers = read_layers(model, self.modules_of(model), batch)
        return keys_of(batch, {name: x for name, (x, _) in layers.items()}, groups)

    def _edit_sequentially(
        self, model: Any, batch: TokenBatch, previous: LowRankEdit | None, info: EditInfo
    ) -> LowRankEdit:
        edit = previous
        for k in range(len(batch)):
            captured = self.capture(model, batch[k : k + 1], edit, [f"request {k}"])
            step = self.as_edit(self(captured, with_variance=False))
            edit = step if edit is None else edit.compose(step)
        assert edit is not None
        return described(edit, info, previous)

    def _info(self, model: Any, requests: Sequence[EditRequest]) -> EditInfo:
        editor = self.config.name_or_path or type(self).__name__
        backbone = self.config.base_model_name_or_path
        return describe(model, self.modules_of(model), requests, editor=editor, backbone=backbone)

    def _warn_of_large_groups(self, requests: Sequence[EditRequest], previous: EditValue | None) -> None:
        """Say so where one edit is to hold more requests than the editor has seen together in training."""
        trained = self.config.trained_edits_per_group
        number = len(requests) + (0 if previous is None else len(previous.info.requests))
        if trained and number > trained:
            logger.warning_once(
                f"this editor was trained on {trained} edit{'s' * (trained > 1)} at a time and is asked for one edit "
                f"of more: scores fall with each further request; check the answers, or train with edits_per_group"
            )

    @torch.no_grad()
    def calibrate(
        self, model: Any, batches: Sequence[TokenBatch], capture: Capture | None = None
    ) -> Mapping[str, float]:
        """Measure the standardisation statistics and set η's start (SPEC §2.4 and §3); once, before training.

        The batches are read twice, since η's start needs what the hypernetworks make of factors that are standardised
        by the final statistics: the factors of one batch are held at a time, whatever the number of requests.

        Args:
            model: The backbone.
            batches: Requests, at least 256 together for stable statistics.
            capture: Reads the factors of a batch, such as from a cache; by default :meth:`capture`.

        Returns:
            η of each layer by module name.
        """
        capture = capture or self.capture
        moments = [Moments(statistics.mean.numel()) for statistics in self._all_statistics()]
        for batch in batches:
            for factors, layer in zip(capture(model, batch), moments, strict=True):
                layer.add(torch.cat((factors.layer_inputs, factors.output_gradients), -1)[factors.mask])
        for statistics, layer in zip(self._all_statistics(), moments, strict=True):
            statistics.measure(layer)
        ratios = torch.cat([self._side_path_ratios(capture(model, batch)) for batch in batches], 1)
        medians = ratios.median(1).values.clamp(min=1e-12)
        self.log_step_sizes.copy_(math.log(self.config.initial_edit_ratio) - medians.log())
        return dict(zip(self.config.module_names(), self.step_sizes.tolist(), strict=True))

    def _side_path_ratios(self, captured: Sequence[GradientFactors]) -> Tensor:
        """Return ‖side path‖ / ‖layer output‖ of each layer and request at η = 1, (layers, b)."""
        ratios = []
        for factors, adapted in zip(captured, self(captured, with_variance=False), strict=True):
            x = factors.layer_inputs.to(adapted.layer_inputs.device)
            side = torch.bmm(torch.bmm(x, adapted.layer_inputs.float().mT), adapted.output_gradients.float())
            ratios.append(side.flatten(1).norm(dim=-1) / factors.output_norms.to(side.device))
        return torch.stack([ratio.to(self.log_step_sizes.device) for ratio in ratios])

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Publish weights, config, card, results and code in one commit.

        Options: those of :func:`ibke_hf.hub.push.push_editor`.
        """
        return publisher().push_editor(self, repo_id, **options)

    @property
    def is_calibrated(self) -> bool:
        """Tell whether the statistics were measured."""
        return all(bool(statistics.count > 0) for statistics in self._all_statistics())

    def _all_statistics(self) -> list[FactorStatistics]:
        return [module for module in self.statistics if isinstance(module, FactorStatistics)]


def _warn_of_conflicting_requests(requests: Sequence[EditRequest], mode: Mode, previous: EditValue | None) -> None:
    """Name requests at odds that one edit is to hold; of edits that are solved together their keys tell as well."""
    if previous is None:
        together = [] if mode == "independent" else [list(requests)]
    else:
        before = [previous.info.requests_of(row, len(previous)) for row in range(len(previous))]
        ours = [[one] for one in requests] if mode == "independent" else [list(requests)]
        rows = max(len(before), len(ours))
        together = [[*before[row % len(before)], *ours[row % len(ours)]] for row in range(rows)]
    for group in together:
        if warning := conflict_warning(conflicting_requests([[request] for request in group])):
            logger.warning_once(warning)


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
