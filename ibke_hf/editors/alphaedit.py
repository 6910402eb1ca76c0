"""The AlphaEdit baseline: values spread over layers, in the null space of preserved keys.

Fang et al. 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", ICLR, arXiv 2410.02355.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import require_finite
from ..core.configuration_ibke import require_range
from ..core.edits import LowRankEdit
from ..core.layers import device_of
from ..core.ridge import precise
from .locate.config import LocateConfig
from .locate.editor import LocatingEditor
from .locate.key_statistics import KeyStatistics
from .locate.search import ValueSearch
from .locate.states import HIDDEN, last_block, read_states
from .locate.texts import SearchTexts

IN_NULL_SPACE = (
    1e-3  # relative distance from the null space below which a row of an earlier edit is one of AlphaEdit's keys
)


@dataclass(frozen=True)
class AlphaEditConfig(LocateConfig):
    """Hyper-parameters of :class:`AlphaEditEditor`; those of the search for the value are :class:`LocateConfig`'s.

    Args:
        null_threshold: Directions in which the corpus' keys have a second moment of at most this, relative to the mean
            over all directions, belong to the null space.
        regularisation: Weight of ‖ΔP‖² in the objective (Eq. 12), relative to the mean ‖k‖² of the corpus' keys.
    """

    clamp: float = 0.75
    null_threshold: float = 1.0
    regularisation: float = 0.01

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        super().__post_init__()
        require_range(self, "null_threshold", 0.0, 1e6)
        require_range(self, "regularisation", 1e-12, 1e6)


class AlphaEditEditor(LocatingEditor):
    """AlphaEdit: moves hidden states to values that say the targets, without a change for what the corpus' keys hold.

    P projects onto the null space of the second moment of the corpus' keys K_0. Per layer, with the keys K_1 of the
    requests, those of earlier edits K_p and the residual R, the update is ΔP = R K_1ᵀP (K_p K_pᵀP + K_1 K_1ᵀP + λI)⁻¹
    (Eq. 14). With projected keys S = P [K_p, K_1] as columns that is R times K_1's rows of (SᵀS + λI)⁻¹ Sᵀ, so the
    edit has the projected keys themselves as its input factors: it carries what the next edit has to protect. The
    change of the hidden states after the last edited layer is spread evenly over the layers, each after those below
    it.

    Keys of earlier edits are protected: the input factors of `previous` that lie in the null space, as all of an
    earlier AlphaEdit do.
    """

    config_class = AlphaEditConfig
    layers_by_default = 5

    def __init__(self, config: AlphaEditConfig, statistics: KeyStatistics) -> None:
        super().__init__(config, statistics)
        self._occupied: dict[str, Tensor] = {}

    def _edit(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        texts: SearchTexts,
        previous: Any,
        names: Sequence[str],
        *,
        joint: bool,
    ) -> LowRankEdit:
        block = last_block(model, self.config)
        carried = [] if previous is None else [previous]
        before = read_states(model, {HIDDEN: block}, texts.requests, carried, self.config.texts_at_once)[HIDDEN]
        search = ValueSearch(model, block, texts, self.config, carried, names)
        targets = before.outputs + search.run(before.norms, before.outputs.shape[1])
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for place, (name, module) in enumerate(modules.items()):
            now = [*carried, LowRankEdit(dict(inputs), dict(outputs))] if inputs else carried
            states = read_states(model, {name: module, HIDDEN: block}, texts.requests, now, self.config.texts_at_once)
            keys, residual = states[name].inputs, (targets - states[HIDDEN].outputs) / (len(modules) - place)
            axis = 0 if joint else 1
            inputs[name], outputs[name] = self._update(
                name, module, keys.unsqueeze(axis), residual.to(keys).unsqueeze(axis), previous
            )
            owners = [", ".join(names)] if joint else names
            require_finite(outputs[name].flatten(1).sum(-1), f"the update of {name}", owners)
        return joined(previous, inputs, outputs)

    def _update(
        self, name: str, module: nn.Module, keys: Tensor, residual: Tensor, previous: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of one layer's update: projected keys after those of `previous`, and what they map to."""
        occupied = self._occupied_by_corpus(name, module)
        projected = keys - (keys @ occupied) @ occupied.mT
        rows, counted = projected, projected
        if previous is not None and name in previous.inputs:
            earlier = previous.inputs[name].to(keys).expand(len(keys), -1, -1)
            outside = (earlier @ occupied).norm(dim=-1, keepdim=True)
            keeps = outside <= IN_NULL_SPACE * earlier.norm(dim=-1, keepdim=True)
            rows, counted = torch.cat((earlier, projected), 1), torch.cat((earlier * keeps, projected), 1)
        strength = self.config.regularisation * float(self.statistics.moments[name].diagonal().sum())
        return rows, null_space_update(counted, residual, strength)

    def _occupied_by_corpus(self, name: str, module: nn.Module) -> Tensor:
        """Orthonormal basis (d_in, r) of what a layer's keys span, so P = I - B Bᵀ; made once."""
        if name not in self._occupied:
            values, vectors = torch.linalg.eigh(precise(self.statistics.moments[name].to(device_of(module))))
            above = values > self.config.null_threshold * values.clamp(min=0).mean()
            if bool(above.all()):
                raise ValueError(
                    f"no direction of {name}'s keys is in the null space; raise null_threshold, "
                    f"found {self.config.null_threshold}"
                )
            self._occupied[name] = vectors[:, above].float()
        return self._occupied[name].to(device_of(module))


def null_space_update(keys: Tensor, residual: Tensor, strength: float) -> Tensor:
    """Return what projected keys are mapped to: the last m columns of (S Sᵀ + λI)⁻¹ times R (Eq. 14), keys S as rows.

    Args:
        keys: S (n, p + m, d_in), the m keys of the requests after p of earlier edits.
        residual: R (n, m, d_out).
        strength: λ > 0.

    Returns:
        û (n, p + m, d_out) with ΔW = Sᵀ û.
    """
    rows, new = keys.shape[1], residual.shape[1]
    exact = precise(keys)
    gram = exact @ exact.mT + strength * torch.eye(rows, dtype=exact.dtype, device=exact.device)
    chosen = torch.eye(rows, dtype=exact.dtype, device=exact.device)[:, rows - new :].expand(len(keys), -1, -1)
    return (torch.linalg.solve(gram, chosen) @ precise(residual)).to(residual)


def joined(previous: LowRankEdit | None, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> LowRankEdit:
    """Return an edit and an update that begins with the edit's rows as one edit, without storing the rows twice."""
    if previous is None:
        return LowRankEdit(dict(inputs), dict(outputs))
    number = len(next(iter(inputs.values())))
    all_inputs = {name: rows.expand(number, -1, -1) for name, rows in previous.inputs.items()}
    all_outputs = {name: rows.expand(number, -1, -1) for name, rows in previous.outputs.items()}
    for name, update in outputs.items():
        all_inputs[name], added = inputs[name], update
        if name in all_outputs:
            earlier = all_outputs[name].to(added)
            added = added + torch.nn.functional.pad(earlier, (0, 0, 0, added.shape[1] - earlier.shape[1]))
        all_outputs[name] = added
        if (
            all_inputs[name].shape[1] > all_inputs[name].shape[2]
        ):  # keeps Sᵀû, and SᵀS, which is all that later edits need
            q, all_inputs[name] = torch.linalg.qr(all_inputs[name])
            all_outputs[name] = q.mT @ added
    return LowRankEdit(all_inputs, all_outputs)
