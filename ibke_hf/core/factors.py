"""The factors ĥ and û of low-rank edits as tensors: cut to a lower rank, and joined by the edit they belong to."""

from __future__ import annotations

import torch
from torch import Tensor


def recompress(layer_inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite (n, r, d_in), (n, r, d_out) at rank min(d_in, d_out), ĥᵀû unchanged, by QR of the narrower side."""
    narrow, wide = (layer_inputs, outputs) if layer_inputs.shape[2] <= outputs.shape[2] else (outputs, layer_inputs)
    q, r = torch.linalg.qr(narrow.float())
    merged = q.mT @ wide.float()
    return (r, merged) if narrow is layer_inputs else (merged, r)


def truncated(layer_inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Project ĥᵀû onto its first `rank` right singular directions: new factors, and the share of the norm lost.

    The directions come of no gradient: the derivative of singular vectors is unbounded where two values are alike.
    """
    with torch.no_grad():
        r_in = torch.linalg.qr(layer_inputs.float().mT)[1]
        q_out, r_out = torch.linalg.qr(outputs.float().mT)
        singular, right = torch.linalg.svd(r_in @ r_out.mT, full_matrices=False)[1:]
        kept = min(rank, singular.shape[-1])
        directions = right[..., :kept, :] @ q_out.mT
        total = singular.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        error = float((singular[..., kept:].square().sum(-1) / total).sqrt().max())
    return (directions @ outputs.float().mT) @ layer_inputs.float(), directions, error


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
