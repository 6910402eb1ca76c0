"""Edits that a model carries together: solved for what each of them does where it was made, not summed.

Summed side paths each act on every input, so that a hundred of them leave nothing of a model. Each edit knows the
inputs of the layers while the model carries it and reads its request (its keys X) and what it adds there (its shifts
S = X ΔW_i). The update that does so for all of them at once, and least elsewhere, is a ridge regression:

    ΔW = Xᵀ (X Xᵀ + λ I)⁻¹ S,   whitened by the covariance C of a corpus' keys:   ΔW = C⁻¹ Xᵀ (X C⁻¹ Xᵀ + λ I)⁻¹ S

which is (XᵀX + λ C)⁻¹ XᵀS. λ is a share of the mean diagonal of the matrix that it is added to. The sum over the edits
does not depend on their order, and each can be taken out again.

A row of keys counts by its squared length, and its shift scales with it. Inputs of layers differ in length by the
word, the longest being those of words that all requests share, so :func:`weighted_keys` gives all tokens the same
length, and those at which the target is said a greater one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .adapter_files import AdapterError, publisher
from .configuration_ibke import COMPOSITIONS, require_choice
from .conflicts import conflict_warning, conflicts
from .edit_values import EditInfo, common_length, joined_info
from .edits import LowRankEdit, WeightEdit
from .factors import join_groups
from .part_files import read_parts, save_parts
from .ridge import in_16_bit, joined_rows, solve_by_keys, solve_update
from .tokens import IGNORED, TokenBatch

logger = logging.get_logger(__name__)
RIDGE = 0.1  # λ as a share of the mean diagonal
TARGET_WEIGHT = 4.0  # of tokens at which the target is said, relative to the others of a request


@dataclass(frozen=True, eq=False)
class SolvedEdit(WeightEdit):
    """Several low-rank edits as one, by a ridge solve over their keys (see the module).

    Attributes:
        parts: The edits, each made on the unedited model, with keys; each of n independent edits, or of one for all.
        ridge: λ as a share of the mean diagonal.
        covariance: C of the keys of a corpus by module name, (d_in, d_in); none: not whitened.
        info: Requests, editor and backbone of all parts.
    """

    parts: tuple[LowRankEdit, ...]
    ridge: float = RIDGE
    covariance: Mapping[str, Tensor] = field(default_factory=dict)
    info: EditInfo = field(default_factory=EditInfo)

    @classmethod
    def of(
        cls,
        edits: Sequence[LowRankEdit | SolvedEdit],
        ridge: float = RIDGE,
        covariance: Mapping[str, Tensor] | None = None,
    ) -> LowRankEdit | SolvedEdit:
        """Return the edit that does all of several; a single one is left as it is.

        Args:
            edits: Low-rank edits that carry their keys, and edits that were solved before, whose parts count.
            ridge: λ as a share of the mean diagonal, above 0.
            covariance: See the class.

        Raises:
            ValueError: If an edit has no keys, lengths differ, or `ridge` is not above 0.
        """
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, found {ridge}")
        parts = tuple(part for edit in edits for part in (edit.parts if isinstance(edit, SolvedEdit) else (edit,)))
        if len(parts) == 1:
            return parts[0]
        number = common_length(parts)
        for place, part in enumerate(parts):
            missing = [name for name in part.layers if name not in part.keys]
            if missing:
                raise ValueError(
                    f"edit {place} ({part.info.editor or 'of an unknown editor'}) does not carry the inputs that it "
                    f"was made for at {missing[0]}, so it cannot be solved together with others: make it again by an "
                    f'editor whose composition is "solve", or sum them (LowRankEdit.compose)'
                )
        info = joined_info([(part.info, len(part)) for part in parts], number)
        return cls(parts, ridge, dict(covariance or {}), info)

    # --- as an edit of weights ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return common_length(self.parts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.layers))

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return ΔW (n, d_in, d_out) of a layer, or two matrices (n, d_in, r), (n, r, d_out) whose product it is."""
        return self._solved[name]

    def _keys_and_shifts(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [keys_and_shifts(part, name) for part in self.parts if name in part.layers]
        keys, shifts = (list(rows) for rows in zip(*pairs, strict=True))
        return keys, shifts

    @cached_property
    def _solved(self) -> dict[str, tuple[Tensor, ...]]:
        return {
            name: solve_update(*self._keys_and_shifts(name), self.ridge, self.covariance.get(name))
            for name in self.layers
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return keys and shifts of every layer, which say what the edit does before it is solved."""
        return {
            f"{name}.{what}": joined_rows(rows).expand(len(self), -1, -1)
            for name in self.layers
            for what, rows in zip(("keys", "shifts"), self._keys_and_shifts(name), strict=True)
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SolvedEdit) or (self.ridge, *self.covariance) != (other.ridge, *other.covariance):
            return False
        metrics = ((metric.cpu(), other.covariance[name].cpu()) for name, metric in self.covariance.items())
        return all(torch.equal(*pair) for pair in metrics) and super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def _map(self, change: Callable[[Tensor], Tensor]) -> SolvedEdit:
        return replace(self, parts=tuple(part._map(change) for part in self.parts))

    def __getitem__(self, index: int) -> SolvedEdit:
        number = len(self)
        if not -number <= index < number:
            raise IndexError(f"edit {index} of {number}")
        return self.select([index % number])

    def select(self, rows: Sequence[int] | Tensor) -> SolvedEdit:
        """Return the independent edits `rows`, in that order; they are not solved anew.

        Raises:
            IndexError: If a row does not exist.
        """
        number = len(self)
        index = torch.as_tensor(rows, dtype=torch.long).flatten()
        if not len(index) or not 0 <= int(index.min()) <= int(index.max()) < number:
            raise IndexError(f"rows must name at least one of the {number} independent edits, found {index.tolist()}")
        parts = tuple(part.select(index) if len(part) == number > 1 else part for part in self.parts)
        if number == 1:  # parts of length 1 are shared by all rows, and one says how many rows there are
            parts = (self.parts[0].select(index * 0), *self.parts[1:])
        chosen = replace(self, parts=parts, info=joined_info([(part.info, len(part)) for part in parts], len(index)))
        solved = {
            name: tuple(matrix.index_select(0, index.to(matrix.device)) for matrix in pair)
            for name, pair in self._solved.items()
        }
        vars(chosen)["_solved"] = solved
        return chosen

    @property
    def nbytes(self) -> int:
        """Memory that the parts take, in bytes, and the solved matrices, once they are there."""
        solved = vars(self).get("_solved", {})
        return sum(part.nbytes for part in self.parts) + sum(m.nbytes for pair in solved.values() for m in pair)

    # --- what is special to it ----------------------------------------------------------------------------------

    def compose(
        self,
        *others: LowRankEdit | SolvedEdit,
        how: str = "solve",
        ridge: float | None = None,
        covariance: Mapping[str, Tensor] | None = None,
    ) -> LowRankEdit | SolvedEdit:
        """Return the edit that does others too, solved anew for all, or summed as it is by now.

        Args:
            others: The other edits.
            how: ``"solve"`` or ``"sum"``, see :meth:`LowRankEdit.compose`.
            ridge: By default this edit's.
            covariance: By default this edit's.

        Raises:
            ValueError: As :meth:`LowRankEdit.compose` does.
        """
        if how == "solve":
            ridge = self.ridge if ridge is None else ridge
            covariance = self.covariance if covariance is None else covariance
        return compose((self, *others), how, ridge, covariance)

    def without(self, *places: int) -> LowRankEdit | SolvedEdit:
        """Return the edit as if the parts at these places had never been in it.

        Raises:
            IndexError: If there is no such part.
            ValueError: If no part would be left.
        """
        number = len(self.parts)
        if missing := [place for place in places if not -number <= place < number]:
            raise IndexError(f"edit {missing[0]} of {number}")
        gone = {place % number for place in places}
        kept = [part for place, part in enumerate(self.parts) if place not in gone]
        if not kept:
            raise ValueError(f"all {number} edits would be taken out; attach none instead")
        return SolvedEdit.of(kept, self.ridge, self.covariance)

    def low_rank(self) -> LowRankEdit:
        """Return the update as one low-rank edit, whose parts cannot be told apart any more."""
        factors = {name: _two_factors(matrices) for name, matrices in self._solved.items()}
        inputs = {name: left.mT for name, (left, _) in factors.items()}
        return LowRankEdit(inputs, {name: right for name, (_, right) in factors.items()}, self.info)

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save as one LoRA adapter, see :meth:`LowRankEdit.save_pretrained`, and what it was solved from beside it.

        An adapter that is truncated (`rank`, `max_rank`) does something else than the parts, which are not saved then.
        """
        save_parts(self, folder, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments: Any) -> SolvedEdit:
        """Load a saved one with its parts, each of which can be taken out again.

        Raises:
            AdapterError: If a file is missing or damaged, or the folder holds no parts.
        """
        fields, ridge, covariance, info = read_parts(name_or_path, hub_arguments)
        try:
            parts = [LowRankEdit(**part) for part in fields]
            edit = cls.of(parts, ridge, covariance)
        except ValueError as error:
            raise AdapterError(f"{name_or_path}: {error}; save or download it again") from error
        if not isinstance(edit, SolvedEdit):
            raise AdapterError(f"{name_or_path}: holds one edit alone; save or download it again")
        return replace(edit, info=info)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish as one LoRA adapter with its parts beside it, see :meth:`LowRankEdit.push_to_hub`."""
        return publisher().push_edit(self, repo_id, **options)


def compose(
    edits: Sequence[LowRankEdit | SolvedEdit],
    how: str = "sum",
    ridge: float | None = None,
    covariance: Mapping[str, Tensor] | None = None,
) -> LowRankEdit | SolvedEdit:
    """Return the edit that does all of several; arguments and errors are :meth:`LowRankEdit.compose`'s.

    Edits that are at odds are named in the log, see :func:`~ibke_hf.core.conflicts.conflicts`.
    """
    require_choice("how", how, COMPOSITIONS)
    warn_of_conflicts(edits)
    if how == "solve":
        return SolvedEdit.of(edits, RIDGE if ridge is None else ridge, covariance)
    if ridge is not None or covariance is not None:
        raise ValueError(
            'edits are summed without a ridge or a covariance; leave them out, or solve the edits (how="solve")'
        )
    first, *others = (edit.low_rank() if isinstance(edit, SolvedEdit) else edit for edit in edits)
    return first._sum(others)


def warn_of_conflicts(edits: Sequence[LowRankEdit | SolvedEdit]) -> None:
    """Say in the log, once, which of several edits are at odds, see :func:`~ibke_hf.core.conflicts.conflicts`."""
    if len(edits) > 1 and (warning := conflict_warning(conflicts(edits))):
        logger.warning_once(warning)


def solve_groups(edits: LowRankEdit, groups: Tensor, ridge: float) -> LowRankEdit:
    """Solve the edits of each group together, as training does, which has to differentiate it.

    Args:
        edits: b independent edits with keys.
        groups: (b,) index of the group that each belongs to, 0…n-1.
        ridge: λ as a share of the mean diagonal, above 0.

    Returns:
        The n edits.
    """
    inputs, outputs = {}, {}
    for name in edits.layers:
        keys, shifts = (join_groups(rows, groups) for rows in keys_and_shifts(edits, name))
        directions, weights = solve_by_keys([keys], [shifts], ridge)
        inputs[name], outputs[name] = directions.mT, weights
    return LowRankEdit(inputs, outputs)


def weighted_keys(layer_inputs: Tensor, batch: TokenBatch) -> Tensor:
    """Return what an edit's keys are of the inputs (b, l, d) of a layer at a batch of requests: zero on padding."""
    device = layer_inputs.device
    lengths = layer_inputs.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    says_target = (batch.labels != IGNORED).to(device)
    weights = batch.attention_mask.to(device) * torch.where(says_target, TARGET_WEIGHT, 1.0)
    return layer_inputs * (weights.sqrt().unsqueeze(-1) / lengths)


def keys_of(batch: TokenBatch, layer_inputs: Mapping[str, Tensor], groups: Tensor | None) -> dict[str, Tensor]:
    """Return the keys of each group of requests from the inputs (b, l, d_in) of the edited layers."""
    return {name: in_16_bit(join_groups(weighted_keys(x.float(), batch), groups)) for name, x in layer_inputs.items()}


def keys_and_shifts(edit: LowRankEdit, name: str) -> tuple[Tensor, Tensor]:
    """Return the keys X (n, l, d_in) of an edit at a layer and what it adds there, S = X ΔW (n, l, d_out), in fp32."""
    keys = edit.keys[name].to(edit.inputs[name].device, torch.float32)  # an editor may be elsewhere than a layer
    return keys, keys @ edit.inputs[name].float().mT @ edit.outputs[name].float()


def _two_factors(matrices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    if len(matrices) == 2:
        return matrices[0], matrices[1]
    (update,) = matrices
    narrow = min(update.shape[1:])
    identity = torch.eye(narrow, dtype=update.dtype, device=update.device).expand(len(update), -1, -1)
    return (update, identity) if update.shape[2] == narrow else (identity, update)
