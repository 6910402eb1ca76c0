"""An edit is a value: the Edit protocol, low-rank edits, and everything that can be done with one.

``ΔW = ĥᵀû`` per layer, with -η folded into û (Eq. 33). ΔW is never formed, except when a user merges on purpose.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .attachment import SidePath, attached_side_paths
from .layers import BackboneError, add_to_weight, dimensions, is_transposed, modules_to_edit, weight_of
from .records import EditRequest

if TYPE_CHECKING:
    from typing_extensions import Self

@runtime_checkable
class Edit(Protocol):
    """What every editor returns: a value that can be attached to a model and leaves no trace when it is gone."""

    def __len__(self) -> int:
        """Return the number of independent edits held."""

    def attached(self, model: Any, rows: Tensor | None = None) -> AbstractContextManager[Any]:
        """Edit the model for the length of a `with` block."""

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""


@dataclass(frozen=True)
class EditInfo:
    """Where an edit comes from: saved beside it as ``edit.json``."""

    requests: tuple[EditRequest, ...] = ()
    editor: str = ""
    backbone: str = ""
    fingerprint: Mapping[str, list[float]] = field(default_factory=dict)
    transposed: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


class WeightEdit(ABC):
    """n independent updates ΔW of named layers, each held as a chain of matrices: what low-rank and dense edits share.

    Subclasses are frozen dataclasses that say which layers they change and hold the matrices.
    """

    info: EditInfo

    @property
    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""

    @abstractmethod
    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return the matrices (n, a, b) of a layer whose product is ΔW (n, d_in, d_out)."""

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the edit with every stored tensor changed."""

    # --- a value ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.matrices(self.layers[0])[0].shape[0]

    def __getitem__(self, index: int) -> Self:
        number = len(self)
        if not -number <= index < number:
            raise IndexError(f"edit {index} of {number}")
        index %= number
        return self._with_requests_of([index], self._map(lambda t: t[index : index + 1]))

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, WeightEdit) or set(self.layers) != set(other.layers):
            return False
        pairs = [pair for name in self.layers for pair in zip(self.matrices(name), other.matrices(name), strict=True)]
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """Return the independent edits `rows`, in that order; repeats are allowed, as beam search needs them.

        Raises:
            IndexError: If a row does not exist.
        """
        index = torch.as_tensor(rows, dtype=torch.long).flatten()
        chosen, number = index.tolist(), len(self)
        missing = [row for row in chosen if not 0 <= row < number]
        if missing or not chosen:
            raise IndexError(f"rows must name at least one of the {number} independent edits, 0 to {number - 1}, found {missing or 'none'}")
        return self._with_requests_of(chosen, self._map(lambda t: t.index_select(0, index.to(t.device))))

    def _with_requests_of(self, rows: Sequence[int], edit: Self) -> Self:
        """Give `edit` the requests of the rows that it was made of, where each row has one request."""
        requests = self.info.requests
        if len(requests) == len(self):
            requests = tuple(requests[row] for row in rows)
        return replace(edit, info=replace(self.info, requests=requests))  # type: ignore[type-var]

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""
        return sum(matrix.nbytes for name in self.layers for matrix in self.matrices(name))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the edit on another device or in another dtype, as `torch.Tensor.to` would."""
        return self._map(lambda t: t.to(*args, **kwargs))

    # --- on a model ---------------------------------------------------------------------------------------------

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that the edit changes.

        Raises:
            BackboneError: If a layer is missing or has another width; says what was expected and found.
        """
        modules = modules_to_edit(model, self.layers)
        for name, module in modules.items():
            matrices = self.matrices(name)
            wanted = (matrices[0].shape[1], matrices[-1].shape[2])
            if dimensions(module) != wanted:
                raise BackboneError(f"the edit expects {name} to map {wanted[0]} to {wanted[1]}, the model's maps "
                                    f"{dimensions(module)[0]} to {dimensions(module)[1]}; it was made for another backbone")  # fmt: skip
        return modules

    @contextmanager
    def attached(self, model: nn.Module, rows: Tensor | None = None) -> Iterator[nn.Module]:
        """Edit the model for the code inside the block: y <- y + x ΔW, accumulated in fp32 ((x ĥᵀ) û for factors).

        Args:
            model: The backbone; its weights are not touched, so undo is exact.
            rows: (batch,) which edit each row of the batch carries. By default a single edit applies to every row and
                n edits need a batch of exactly n rows. Beam search repeats rows, so pass
                ``torch.arange(n).repeat_interleave(num_beams)`` there.

        Raises:
            BackboneError: If the model does not fit.
            IndexError: If `rows` names an edit that does not exist.
            ValueError: On a forward pass with another number of rows than edits.
        """
        edit = self if rows is None or len(self) == 1 else self.select(rows)
        shared = len(self) == 1
        with attached_side_paths(self.modules(model), {name: side_path(edit.matrices(name), shared) for name in edit.layers}):
            yield model

    def merge_into(self, model: nn.Module) -> MergedEdit:
        """Add ΔW to the weights on purpose; the result undoes it bit-exactly (from saved weights, not by subtraction).

        Raises:
            ValueError: If this holds several independent edits: merge one of them.
            BackboneError: If a layer does not fit or is quantised; nothing is merged then.
        """
        self._require_one("merge")
        modules = self.modules(model)
        merged = MergedEdit(modules, {name: weight_of(module).detach().clone() for name, module in modules.items()})
        try:
            for name, module in modules.items():
                add_to_weight(module, self.weight_update(name))
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
        if not shared and (x.ndim != 3 or len(matrices[0]) != len(x)):
            raise ValueError(
                f"{len(matrices[0])} independent edits were attached to a batch of {len(x)} rows (input {tuple(x.shape)}); pass one row "
                "per edit, or rows= to say which edit each row carries (beam search repeats rows)"
            )
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
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    info: EditInfo = EditInfo()
    relative_error: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse factors that do not belong together."""
        if not self.inputs or set(self.inputs) != set(self.outputs):
            raise ValueError(f"an edit needs both factors of at least one layer, found {sorted(self.inputs)} and {sorted(self.outputs)}")
        for name, layer_inputs in self.inputs.items():
            if layer_inputs.ndim != 3 or self.outputs[name].ndim != 3 or layer_inputs.shape[:2] != self.outputs[name].shape[:2]:
                shapes = f"{tuple(layer_inputs.shape)} and {tuple(self.outputs[name].shape)}"
                raise ValueError(f"factors of {name!r} must be (n, r, d_in) and (n, r, d_out), found {shapes}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""
        return tuple(self.inputs)

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return ĥᵀ (n, d_in, r) and û (n, r, d_out) of a layer."""
        return self.inputs[name].mT, self.outputs[name]

    @property
    def ranks(self) -> dict[str, int]:
        """Stored rank r of each layer."""
        return {name: tensor.shape[1] for name, tensor in self.inputs.items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> LowRankEdit:
        return replace(self, inputs={k: change(t) for k, t in self.inputs.items()}, outputs={k: change(t) for k, t in self.outputs.items()})

    # --- algebra ------------------------------------------------------------------------------------------------

    def compose(self, *others: LowRankEdit) -> LowRankEdit:
        """Return the edit that does all of them; recompressed exactly (QR) once the rank passes min(d_in, d_out).

        A single edit composes with n independent ones by joining each of them.
        """
        edits = (self, *others)
        number = common_length(edits)
        inputs, outputs = {}, {}
        for name in dict.fromkeys(name for edit in edits for name in edit.inputs):
            parts = [edit for edit in edits if name in edit.inputs]
            h = _joined_rows([part.inputs[name] for part in parts], number)
            u = _joined_rows([part.outputs[name] for part in parts], number)
            inputs[name], outputs[name] = recompress(h, u) if h.shape[1] > min(h.shape[2], u.shape[2]) else (h, u)
        requests = tuple(request for edit in edits for request in edit.info.requests)
        return LowRankEdit(inputs, outputs, replace(self.info, requests=requests, scores={}))

    def truncate(self, rank: int) -> LowRankEdit:
        """Return the best rank-`rank` edit in Frobenius norm, by QR and SVD of the factors; ΔW is not formed.

        The result's `relative_error` holds ‖ΔW - ΔW_r‖ / ‖ΔW‖ of each layer (the worst over independent edits).
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, found {rank}")
        inputs, outputs, errors = {}, {}, {}
        for name in self.inputs:
            q_in, r_in = torch.linalg.qr(self.inputs[name].float().mT)
            q_out, r_out = torch.linalg.qr(self.outputs[name].float().mT)
            left, singular, right = torch.linalg.svd(r_in @ r_out.mT, full_matrices=False)
            kept = min(rank, singular.shape[-1])
            inputs[name] = (q_in @ left[..., :kept]).mT.contiguous()
            outputs[name] = singular[..., :kept, None] * (right[..., :kept, :] @ q_out.mT)
            total = singular.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            errors[name] = float((singular[..., kept:].square().sum(-1) / total).sqrt().max())
        return replace(self, inputs=inputs, outputs=outputs, relative_error=errors)

    def padded(self, rank: int) -> LowRankEdit:
        """Return the same edit with zero rows up to one uniform rank, as LoRA serving engines want it."""
        def pad(t: Tensor) -> Tensor:
            return nn.functional.pad(t, (0, 0, 0, rank - t.shape[1]))

        if rank < max(self.ranks.values()):
            raise ValueError(f"rank {rank} is below the edit's rank {max(self.ranks.values())}; truncate it first")
        return self._map(pad)

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save as a PEFT LoRA adapter, of rank ``max_rank`` at most, plus ``edit.json``; see :func:`ibke_hf.adapter_files.save_edit`."""
        from .adapter_files import save_edit

        save_edit(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> LowRankEdit:
        """Load a saved edit or any LoRA adapter, from a folder or the Hub; see :func:`ibke_hf.adapter_files.load_edit`."""
        from .adapter_files import load_edit

        return load_edit(name_or_path, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish as a LoRA adapter with a card, of rank ``max_rank`` at most; see :func:`ibke_hf.adapter_files.push_edit`."""
        from .adapter_files import push_edit

        return push_edit(self, repo_id, **kwargs)


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


def common_length(edits: Sequence[WeightEdit]) -> int:
    """Return the length that edits compose to.

    Raises:
        ValueError: Unless all lengths are equal or 1.
    """
    number = max(len(edit) for edit in edits)
    if any(len(edit) not in (1, number) for edit in edits):
        raise ValueError(f"cannot compose edits of lengths {[len(edit) for edit in edits]}; lengths must be equal or 1")
    return number


def _joined_rows(parts: Sequence[Tensor], number: int) -> Tensor:
    return torch.cat([part.to(parts[0].device).expand(number, -1, -1) for part in parts], 1)


def recompress(layer_inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite (n, r, d_in), (n, r, d_out) at rank min(d_in, d_out) without changing ĥᵀû, by QR of the narrower side."""
    narrow, wide = (layer_inputs, outputs) if layer_inputs.shape[2] <= outputs.shape[2] else (outputs, layer_inputs)
    q, r = torch.linalg.qr(narrow.float())
    merged = q.mT @ wide.float()
    return (r, merged) if narrow is layer_inputs else (merged, r)


def describe(model: Any, modules: Mapping[str, nn.Module], requests: Sequence[EditRequest], *, editor: str, backbone: str = "") -> EditInfo:
    """Return where an edit of these modules comes from; `backbone` names it where the model's config does not."""
    return EditInfo(
        requests=tuple(requests), editor=editor, backbone=getattr(model.config, "name_or_path", "") or backbone,
        fingerprint=fingerprint(modules), transposed=any(is_transposed(module) for module in modules.values()),
    )  # fmt: skip


def fingerprint(modules: Mapping[str, nn.Module], values: int = 16) -> dict[str, list[float]]:
    """Sample a few weights of each layer: tells backbones apart in any precision (compare with a 2 % tolerance)."""
    sampled = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
            sampled[name] = [round(float(v), 6) for v in weight.detach().flatten()[:values].float()]
    return sampled


def same_backbone(mine: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Compare two fingerprints on the layers that both have."""
    return all(
        torch.allclose(torch.tensor(mine[name]), torch.tensor(other[name]), rtol=0.02, atol=1e-4) for name in set(mine) & set(other)
    )


def info_json(info: EditInfo, **more: Any) -> str:
    """Serialise what ``edit.json`` holds."""
    return json.dumps({"format_version": 1, **asdict(info), **more}, indent=2, ensure_ascii=False)
