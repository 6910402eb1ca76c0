"""Edits of weights, low-rank ones above all, and everything that can be done with one.

``ΔW = ĥᵀû`` per layer, with -η folded into û (Eq. 33). ΔW is never formed, except when a user merges on purpose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter_files import AdapterError, publisher, read_edit, save_edit
from .attachment import SidePath, attached_side_paths, require_row_per_edit
from .edit_values import (
    Edit,
    EditInfo,
    EditValue,
    common_length,
    joined_info,
    name_of,
    warn_of_other_backbone,
)
from .factors import recompress, truncated
from .fingerprints import fingerprint, same_backbone
from .layers import BackboneError, dimensions, modules_to_edit
from .ridge import joined_rows
from .weights import add_to_weight, require_untied, weight_of

if TYPE_CHECKING:
    from .composition import SolvedEdit

__all__ = ["Edit", "EditInfo", "LowRankEdit", "MergedEdit", "WeightEdit", "recompress", "side_path"]


class WeightEdit(EditValue):
    """n independent updates ΔW of named layers, each held as a chain of matrices: what low-rank and dense edits share.

    Subclasses are frozen dataclasses that say which layers they change and hold the matrices.
    """

    @property
    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""

    @abstractmethod
    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return the matrices (n, a, b) of a layer whose product is ΔW (n, d_in, d_out)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrices of every layer."""
        return {f"{name}.{place}": matrix for name in self.layers for place, matrix in enumerate(self.matrices(name))}

    # --- on a model ---------------------------------------------------------------------------------------------

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that the edit changes.

        Raises:
            BackboneError: If a layer is missing or has another width; says what was expected and found.
        """
        modules = modules_to_edit(model, self.layers)
        for name, module in modules.items():
            matrices = self.matrices(name)
            widths = (matrices[0].shape[1], matrices[-1].shape[2])
            if dimensions(module) != widths:
                raise BackboneError(
                    f"the edit expects {name} to map {widths[0]} to {widths[1]}, the model's maps "
                    f"{dimensions(module)[0]} to {dimensions(module)[1]}; it was made for another backbone"
                )
        return modules

    @contextmanager
    def attached(
        self, model: nn.Module, rows: Tensor | None = None, *, all_threads: bool = False
    ) -> Iterator[nn.Module]:
        """Edit the model for the code inside the block: y <- y + x ΔW, accumulated in fp32 ((x ĥᵀ) û for factors).

        Args:
            model: The backbone; its weights are not touched, so undo is exact.
            rows: (batch,) which edit each row of the batch carries. By default a single edit applies to every row and
                n edits need a batch of exactly n rows. Beam search repeats rows, so pass
                ``torch.arange(n).repeat_interleave(num_beams)`` there.
            all_threads: Edit the model for every thread that has no edit of its own attached, not for this one alone:
                what streaming needs, where a thread that the block starts runs `generate`. Not for two users at once.

        Warns (in the log):
            Where the model's weights are not those that the edit was made on, and, once for each block, where a
            thread runs the model outside of every block.

        Raises:
            BackboneError: If the model does not fit.
            IndexError: If `rows` names an edit that does not exist.
            RuntimeError: If another thread has attached an edit to this model for all threads.
            ValueError: On a forward pass with another number of rows than edits.
        """
        edit = self if rows is None or len(self) == 1 else self.select(rows)
        shared = len(self) == 1
        modules = self.modules(model)
        if self.info.fingerprint:
            warn_of_other_backbone(self.info, fingerprint(modules), name_of(model))
        paths = {name: side_path(edit.matrices(name), shared) for name in edit.layers}
        with attached_side_paths(modules, paths, all_threads=all_threads):
            yield model

    def merge_into(self, model: nn.Module, *, force: bool = False) -> MergedEdit:
        """Add ΔW to the weights on purpose; the result undoes it bit-exactly (from saved weights, not by subtraction).

        Args:
            model: The backbone.
            force: Merge also where the model's weights are not those that the edit was made on, such as where
                another edit was merged before.

        Raises:
            ValueError: If this holds several independent edits: merge one of them.
            BackboneError: If a layer does not fit, has other weights than the edit was made on, is quantised,
                offloaded to disk, or tied to another module's; nothing is merged then.
            NonFiniteError: If a merged weight would be NaN or infinite; nothing is merged then.
        """
        self._require_one("merge")
        modules = self.modules(model)
        if not force and not same_backbone(self.info.fingerprint, fingerprint(modules)):
            raise BackboneError(
                f"the edit was made on {self.info.backbone or 'another backbone'}, and the weights of "
                f"{name_of(model) or 'this model'} differ from those (another model, or another edit was merged into "
                f"it): merge into that model, or force it (force=True, on the command line --force)"
            )
        require_untied(model, modules)
        merged = MergedEdit(modules, {name: weight_of(module).detach().clone() for name, module in modules.items()})
        try:
            for name, module in modules.items():
                add_to_weight(module, self.weight_update(name), name)
        except BaseException:
            merged.undo()
            raise
        return merged

    def weight_update(self, name: str) -> Tensor:
        """Form ΔW (d_in, d_out) of one layer in fp32: for merging and tests only."""
        self._require_one("form the dense update of")
        return self.weight_updates(name)[0]

    def weight_updates(self, name: str) -> Tensor:
        """Form ΔW (n, d_in, d_out) of one layer in fp32."""
        first, *rest = self.matrices(name)
        update = first.float()
        for matrix in rest:
            update = update @ matrix.float()
        return update

    def _require_one(self, what: str) -> None:
        if len(self) != 1:
            raise ValueError(f"cannot {what} {len(self)} independent edits at once; choose one, such as edit[0]")


def side_path(matrices: Sequence[Tensor], shared: bool) -> SidePath:
    """Return x (b, l, d_in) -> x times each of the matrices (n, a, b) in turn, in fp32.

    Args:
        matrices: A chain whose product is ΔW (n, d_in, d_out).
        shared: One edit (n = 1) for every row; otherwise row i of the batch carries edit i, and a forward pass with
            another number of rows raises a ValueError.
    """

    def apply(x: Tensor) -> Tensor:
        require_row_per_edit(len(matrices[0]), x, shared=shared)
        y = x.float()
        for matrix in matrices:
            factor = matrix.to(x.device).float()
            if factor.is_inference() and torch.is_grad_enabled():
                factor = factor.clone()  # an edit made in inference mode, on a model that gradients go through
            y = y @ (factor[0] if shared else factor)
        return y

    return apply


@dataclass(frozen=True, eq=False)
class LowRankEdit(WeightEdit):
    """n independent low-rank edits of the same layers (n = 1 for a joint or sequential edit).

    Attributes:
        inputs: ĥ by module name, each (n, r, d_in).
        outputs: û by module name with -η folded in, each (n, r, d_out); r may differ between layers.
        info: Requests, editor and backbone.
        relative_error: ‖ΔW - ΔW_truncated‖ / ‖ΔW‖ by module name, after :meth:`truncate`.
        keys: Inputs of the layers at the tokens of the requests that the edit was made for, on the model that carries
            it, (n, l, d_in) by module name, each as long as it counts and zero on padding; empty where they are not
            known. What composition solves for.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    info: EditInfo = field(default_factory=EditInfo)
    relative_error: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse factors that do not belong together."""
        if not self.inputs or set(self.inputs) != set(self.outputs):
            raise ValueError(
                f"an edit needs both factors of at least one layer, found {sorted(self.inputs)} and "
                f"{sorted(self.outputs)}"
            )
        for name, layer_inputs in self.inputs.items():
            if (
                layer_inputs.ndim != 3
                or self.outputs[name].ndim != 3
                or layer_inputs.shape[:2] != self.outputs[name].shape[:2]
            ):
                shapes = f"{tuple(layer_inputs.shape)} and {tuple(self.outputs[name].shape)}"
                raise ValueError(f"factors of {name!r} must be (n, r, d_in) and (n, r, d_out), found {shapes}")
        for name, keys in self.keys.items():
            if name not in self.inputs:
                raise ValueError(f"keys of {name!r}, a layer that the edit does not change")
            layer_inputs = self.inputs[name]
            number, _, width = layer_inputs.shape
            if keys.ndim != 3 or (keys.shape[0], keys.shape[2]) != (number, width):
                raise ValueError(f"keys of {name!r} must be ({number}, l, {width}), found {tuple(keys.shape)}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""
        return tuple(self.inputs)

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return ĥᵀ (n, d_in, r) and û (n, r, d_out) of a layer."""
        return self.inputs[name].mT, self.outputs[name]

    @property
    def has_keys(self) -> bool:
        """Tell whether it carries the keys of all its layers, so that it can be solved together with other edits."""
        return set(self.inputs) == set(self.keys)

    @property
    def ranks(self) -> dict[str, int]:
        """Stored rank r of each layer."""
        return {name: tensor.shape[1] for name, tensor in self.inputs.items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> LowRankEdit:
        return replace(
            self,
            inputs={k: change(t) for k, t in self.inputs.items()},
            outputs={k: change(t) for k, t in self.outputs.items()},
            keys={k: change(t) for k, t in self.keys.items()},
        )

    def expanded(self, number: int) -> LowRankEdit:
        """Return the edit as `number` independent ones, which are the same where it is one for all."""
        return self if len(self) == number else self._map(lambda t: t.expand(number, -1, -1))

    @property
    def nbytes(self) -> int:
        """Memory that factors and keys take, in bytes."""
        return super().nbytes + sum(keys.nbytes for keys in self.keys.values())

    # --- algebra ------------------------------------------------------------------------------------------------

    def compose(
        self,
        *others: LowRankEdit | SolvedEdit,
        how: str = "sum",
        ridge: float | None = None,
        covariance: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the edit that does all of them; a single edit composes with n independent ones, joining each of them.

        Edits that are at odds are named in the log, see :func:`~ibke_hf.core.conflicts.conflicts`.

        Args:
            others: The other edits.
            how: ``"sum"``: side paths added up, recompressed exactly (QR) once the rank passes min(d_in, d_out).
                ``"solve"``: a :class:`~ibke_hf.SolvedEdit`, which does what each edit does where it was made, and
                from which each can be taken out again; every edit has to carry its keys.
            ridge: λ of the solve, as a share of the mean diagonal (0.1 by default): small, and each edit is kept where
                it was made; large, and all else is kept.
            covariance: Covariance of the keys of a corpus by module name, (d_in, d_in), that the solve is whitened by,
                such as :attr:`KeyStatistics.moments`; none: not whitened.

        Raises:
            ValueError: If there is no such `how`, an edit has no keys where they are needed, lengths differ, or a
                ridge or covariance is given for a sum.
        """
        from .composition import compose, warn_of_conflicts

        if how != "sum" or ridge is not None or covariance is not None:
            return compose((self, *others), how, ridge, covariance)
        warn_of_conflicts([self, *others])
        return self._sum([edit if isinstance(edit, LowRankEdit) else edit.low_rank() for edit in others])

    def _sum(self, others: Sequence[LowRankEdit]) -> LowRankEdit:
        edits = (self, *others)
        number = common_length(edits)
        inputs, outputs = {}, {}
        for name in dict.fromkeys(name for edit in edits for name in edit.inputs):
            parts = [edit for edit in edits if name in edit.inputs]
            h = joined_rows([part.inputs[name].expand(number, -1, -1) for part in parts])
            u = joined_rows([part.outputs[name].expand(number, -1, -1) for part in parts])
            inputs[name], outputs[name] = recompress(h, u) if h.shape[1] > min(h.shape[2], u.shape[2]) else (h, u)
        info = joined_info([(edit.info, len(edit)) for edit in edits], number)
        return LowRankEdit(inputs, outputs, info, keys={} if others else self.keys)

    def truncate(self, rank: int) -> LowRankEdit:
        """Return the best rank-`rank` edit in Frobenius norm, by QR and SVD of the factors; ΔW is not formed.

        The result's `relative_error` holds ‖ΔW - ΔW_r‖ / ‖ΔW‖ of each layer (the worst over independent edits).
        Gradients go through the factors, with the directions that are kept held fixed.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, found {rank}")
        inputs, outputs, errors = {}, {}, {}
        for name in self.inputs:
            inputs[name], outputs[name], errors[name] = truncated(self.inputs[name], self.outputs[name], rank)
        return replace(self, inputs=inputs, outputs=outputs, relative_error=errors)

    def padded(self, rank: int) -> LowRankEdit:
        """Return the same edit with zero rows up to one uniform rank, as LoRA serving engines want it."""

        def pad(t: Tensor) -> Tensor:
            return nn.functional.pad(t, (0, 0, 0, rank - t.shape[1]))

        if rank < max(self.ranks.values()):
            raise ValueError(f"rank {rank} is below the edit's rank {max(self.ranks.values())}; truncate it first")
        return replace(self._map(pad), keys=self.keys)

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save as a PEFT LoRA adapter plus ``edit.json``; see :func:`ibke_hf.core.adapter_files.save_edit`."""
        save_edit(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> LowRankEdit:
        """Load a saved edit or any LoRA adapter; see :func:`ibke_hf.core.adapter_files.read_edit`."""
        fields = read_edit(name_or_path, **kwargs)
        try:
            return cls(*fields)
        except ValueError as error:
            raise AdapterError(f"{name_or_path}: {error}; save or download it again") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish as a LoRA adapter with a card; see :func:`ibke_hf.hub.push.push_edit`."""
        return publisher().push_edit(self, repo_id, **kwargs)


@dataclass(frozen=True)
class MergedEdit:
    """An edit that was merged into weights, with the weights from before."""

    modules: Mapping[str, nn.Module]
    saved: Mapping[str, Tensor]

    def undo(self) -> None:
        """Put the saved weights back, bit by bit."""
        with torch.no_grad():
            for name, module in self.modules.items():
                weight_of(module).copy_(self.saved[name])
