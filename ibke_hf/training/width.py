"""How wide an editor is made for a backbone, where nobody says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..editors.catalogue import editor_class
from ..editors.mend import MENDConfig

SHARE, LEAST, MOST = 1 / 8, 2_000_000, 64_000_000  # of the backbone's parameters, and bounds in parameters
NARROWEST, WIDEST, STEP = 64, 1024, 16  # d_m


def fit_width(kind: str, backbone: Any, layers: Sequence[int] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an editor's config with d_m, or MEND's hidden_dim, chosen by the backbone's size.

    The editor gets about an eighth of the backbone's parameters, at least 2 million and at most 64 million. What is
    given stays; an MLP block of the second stage that is not given is twice as wide as d_m.

    Args:
        kind: Kind of editor; SERAC has no such width.
        backbone: The backbone.
        layers: Edited layers; None for the editor's own choice.
        fields: Fields of the editor's config, ``edited_modules`` among them.
    """
    if kind == "serac":
        return dict(fields)
    budget = round(min(max(backbone.num_parameters() * SHARE, LEAST), MOST))
    if kind == "mend":
        config = editor_class(kind).for_backbone(backbone, layers, **{**fields, "hidden_dim": 1}).config
        hidden = MENDConfig.hidden_dim_for(budget, config.input_dims, config.output_dims)
        return {"hidden_dim": hidden, **fields}
    if "latent_dim" in fields:
        return _with_mlp(fields, fields["latent_dim"])
    widths = range(NARROWEST, WIDEST + 1, STEP)
    low, high = 0, len(widths) - 1  # parameters grow with the width
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _size(backbone, layers, fields, widths[middle]) <= budget else (low, middle - 1)
    return _with_mlp(fields, widths[low])


def _with_mlp(fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {"second_stage_mlp": 2 * width, **fields, "latent_dim": width}


def _size(backbone: Any, layers: Sequence[int] | None, fields: Mapping[str, Any], width: int) -> int:
    with torch.device("meta"):
        editor = editor_class("ibke").for_backbone(backbone, layers, **_with_mlp(fields, width))
    return sum(parameter.numel() for parameter in editor.parameters())
