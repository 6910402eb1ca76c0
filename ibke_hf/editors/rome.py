"""The ROME baseline: a rank-one edit of one layer.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import require_finite
from ..core.configuration_ibke import require_range
from ..core.edit_values import EditInfo
from ..core.edits import LowRankEdit
from ..core.layers import device_of
from ..core.ridge import precise
from .locate.config import LocateConfig
from .locate.editor import LocatingEditor
from .locate.key_statistics import KeyStatistics
from .locate.search import ValueSearch
from .locate.states import HIDDEN, last_block, read_states
from .locate.texts import SearchTexts

# relative size below which the Gram matrix of joint keys counts as singular: keys of one subject, for example
SAME_KEY = 1e-4


@dataclass(frozen=True)
class ROMEConfig(LocateConfig):
    """Hyper-parameters of :class:`ROMEEditor`; those of the search for the value are :class:`LocateConfig`'s.

    Args:
        ridge: Added to C's diagonal, relative to its mean: what a corpus that does not span all keys needs.
    """

    ridge: float = 1e-5

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        super().__post_init__()
        require_range(self, "ridge", 0.0, 1e6)
        if len(self.edited_layers) != 1:
            raise ValueError(f"edited_layers must be one layer, which is what ROME edits, found {self.edited_layers}")


class ROMEEditor(LocatingEditor):
    """Rank-One Model Editing: one layer is made to map the subject's key k* to the value v* that says the target.

    With the key averaged over random prefixes (Eq. 3) and v* = v + δ optimised (Eq. 4), the update is
    ΔW = δ (C⁻¹k*)ᵀ / (C⁻¹k*)ᵀk* (Eq. 2), C being the second moment of the keys over a corpus. The value v = W k* is
    averaged over the same prefixes as the key, as Eq. 2 has it (Gupta et al. 2024, "Rebuilding ROME", show that mixing
    averaged with bare keys breaks models).

    In joint mode the smallest update (weighed by C) maps all keys to their values, Eq. 2 for several; keys of one
    subject share the mean of their values.
    """

    config_class = ROMEConfig
    layers_by_default = 1

    def __init__(self, config: ROMEConfig, statistics: KeyStatistics) -> None:
        super().__init__(config, statistics)
        self._factor: Tensor | None = None

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
        ((name, module),) = modules.items()
        carried = [] if previous is None else [previous]
        read = {**modules, HIDDEN: last_block(model, self.config)}
        states = read_states(model, read, texts.requests, carried, self.config.texts_at_once)
        search = ValueSearch(model, module, texts, self.config, carried, names)
        change = search.run(states[HIDDEN].norms.to(states[name].outputs.device), states[name].outputs.shape[1])
        place = 0 if joint else 1
        factor = self._factor_of(name, module)
        inputs, outputs = rank_one_update(states[name].inputs.unsqueeze(place), change.unsqueeze(place), factor)
        finite = outputs.flatten(1).sum(-1) + inputs.flatten(1).sum(-1)
        require_finite(finite, f"the update of {name}", [", ".join(names)] if joint else names)
        edit = LowRankEdit({name: inputs}, {name: outputs}, EditInfo())
        return edit if previous is None else previous.compose(edit)

    def _factor_of(self, name: str, module: nn.Module) -> Tensor:
        """Cholesky factor (d_in, d_in) of C with its ridge, fp32, made once."""
        if self._factor is None:
            moment = precise(self.statistics.moments[name].to(device_of(module)))
            moment.diagonal().add_(self.config.ridge * moment.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(moment)
            if int(failed):
                raise ValueError(
                    f"the covariance of the keys of {name} is singular: {self.statistics.tokens} tokens for "
                    f"{len(moment)} "
                    "dimensions; measure the keys on more texts, or raise ridge"
                )
            self._factor = factor.float()
        return self._factor.to(device_of(module))


def rank_one_update(keys: Tensor, change: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the smallest update, weighed by C = L Lᵀ, that adds δ to what the layer maps the keys to.

    ΔW = (C⁻¹K)ᵀ (K C⁻¹Kᵀ)⁻¹ δ for keys K as rows, Meng et al. 2022, Eq. 2, for one key; keys alike get the mean of
    their δ.

    Args:
        keys: (n, m, d_in) for n independent updates of m keys each.
        change: δ (n, m, d_out).
        factor: L (d_in, d_in), lower triangular.

    Returns:
        ĥ (n, m, d_in) and û (n, m, d_out), with K ĥᵀ û = δ.
    """
    flat = keys.reshape(-1, keys.shape[-1])
    weighed = torch.cholesky_solve(flat.T, factor).T.reshape(keys.shape)
    weighed = weighed / weighed.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if keys.shape[1] == 1:
        return weighed, change / (weighed * keys).sum(-1, keepdim=True)
    gram = precise(keys @ weighed.mT)
    return weighed, (torch.linalg.pinv(gram, rtol=SAME_KEY) @ precise(change)).to(change)
