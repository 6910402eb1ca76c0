"""Dense edits: the ΔW of editors that have no low-rank form of it, such as fine-tuning, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.adapter_files import AdapterError, read_info, read_weights, save_tensors
from ..core.edit_values import EditInfo, common_length, joined_info
from ..core.edits import WeightEdit

WEIGHTS = "dense_edit.safetensors"


@dataclass(frozen=True, eq=False)
class DenseEdit(WeightEdit):
    """n independent dense edits of the same layers (n = 1 for a joint or sequential edit).

    It takes n·d_in·d_out values per layer, where a low-rank edit takes n·r·(d_in + d_out).

    Attributes:
        updates: ΔW by module name, each (n, d_in, d_out), fp32; y + x ΔW whatever the orientation of the weight.
        info: Requests, editor and backbone.
    """

    updates: Mapping[str, Tensor]
    info: EditInfo = field(default_factory=EditInfo)

    def __post_init__(self) -> None:
        """Refuse updates that do not belong together."""
        if not self.updates:
            raise ValueError("an edit needs the update of at least one layer, found none")
        for name, update in self.updates.items():
            if update.ndim != 3:
                raise ValueError(f"the update of {name!r} must be (n, d_in, d_out), found {tuple(update.shape)}")
        lengths = {name: len(update) for name, update in self.updates.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every layer must hold the same number of independent edits, found {lengths}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited layers."""
        return tuple(self.updates)

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        """Return ΔW (n, d_in, d_out) of a layer."""
        return (self.updates[name],)

    def _map(self, change: Callable[[Tensor], Tensor]) -> DenseEdit:
        return replace(self, updates={name: change(update) for name, update in self.updates.items()})

    def compose(self, *others: WeightEdit) -> DenseEdit:
        """Return the edit that does all of them, dense or low-rank: the sum of their updates.

        A single edit composes with n independent ones by joining each of them.

        Raises:
            ValueError: Unless all lengths are equal or 1.
        """
        edits = (self, *others)
        number = common_length(edits)
        updates = {}
        for name in dict.fromkeys(name for edit in edits for name in edit.layers):
            parts = [edit.weight_updates(name) for edit in edits if name in edit.layers]
            total = parts[0].expand(number, -1, -1).clone()
            for part in parts[1:]:
                total += part.to(total.device)
            updates[name] = total
        return DenseEdit(updates, joined_info([(edit.info, len(edit)) for edit in edits], number))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save all n edits as one safetensors file and ``edit.json``, each written to a temporary name and renamed."""
        save_tensors(self.updates, folder, WEIGHTS, self.info, kind="dense")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments: Any) -> DenseEdit:
        """Load a saved dense edit from a folder or the Hub.

        Args:
            name_or_path: Folder or Hub id.
            hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

        Raises:
            AdapterError: If a file is missing, damaged, or holds something else than dense updates.
        """
        weights = read_weights(name_or_path, WEIGHTS, hub_arguments)
        info, _ = read_info(name_or_path, hub_arguments)
        try:
            return cls(weights, info)
        except ValueError as error:
            raise AdapterError(f"{name_or_path}/{WEIGHTS}: not a dense edit ({error}); save the edit again") from error
