"""Ridge regressions over keys, in double precision: many rows of requests or few, whichever is the smaller system.

With keys X (l, d), shifts S (l, o) and the metric C (d, d; the identity where none is given) both forms are one
update:

    ΔW = C⁻¹Xᵀ (X C⁻¹Xᵀ + λI)⁻¹ S   (l × l, at the rank of the keys)   =   (XᵀX + λC)⁻¹ XᵀS   (d × d)

λ is a share of the mean of the diagonal of X C⁻¹Xᵀ over the keys, padding (rows of zeros) left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-30  # of λ, so that a layer whose keys are all zero has a solution, which is zero


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in fp64, on the CPU where its device has none."""
    return tensor.to(device="cpu" if tensor.device.type == "mps" else tensor.device, dtype=torch.float64)


def solve_update(
    keys: Sequence[Tensor], shifts: Sequence[Tensor], ridge: float, covariance: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return ΔW (n, d, o), or two matrices (n, d, r), (n, r, o) of less rank than d and o whose product it is.

    What all n rows share, as edits of length 1 do, is gone through once.

    Args:
        keys: X of each edit, (n or 1, l, d).
        shifts: S of each edit, (n or 1, l, o).
        ridge: λ as a share of the mean diagonal, above 0.
        covariance: C (d, d), positive definite; none: the identity.
    """
    tokens, width = sum(part.shape[1] for part in keys), keys[0].shape[2]
    if tokens < min(width, shifts[0].shape[2]):
        return solve_by_keys(keys, shifts, ridge, covariance)
    return (_by_width(keys, shifts, ridge, covariance),)


def solve_by_keys(
    keys: Sequence[Tensor], shifts: Sequence[Tensor], ridge: float, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return two matrices (n, d, l), (n, l, o) whose product is ΔW; arguments as of :func:`solve_update`."""
    x, s = joined_rows(keys), joined_rows(shifts)
    directions = precise(x) if covariance is None else _whitened(precise(x), covariance)
    gram = precise(x) @ directions.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    penalty = _penalty(ridge, diagonal.sum(-1), (diagonal > 0).sum(-1))
    system = gram + torch.diag_embed(penalty[:, None].expand_as(diagonal))
    weights = torch.cholesky_solve(precise(s), torch.linalg.cholesky(system))
    return directions.mT.to(x), weights.to(s)


def _by_width(keys: Sequence[Tensor], shifts: Sequence[Tensor], ridge: float, covariance: Tensor | None) -> Tensor:
    width = keys[0].shape[2]
    metric = torch.eye(width, dtype=torch.float64) if covariance is None else precise(covariance)
    metric = metric.to(precise(keys[0]).device)
    moment, cross, energy, tokens = (torch.zeros((), dtype=torch.float64, device=metric.device) for _ in range(4))
    for part, moved in zip(keys, shifts, strict=True):
        x, s = precise(part).to(metric.device), precise(moved).to(metric.device)
        squares = (x * (x if covariance is None else _whitened(x, covariance))).sum(-1)
        moment, cross = moment + x.mT @ x, cross + x.mT @ s
        energy, tokens = energy + squares.sum(-1), tokens + (squares > 0).sum(-1)
    system = moment + _penalty(ridge, energy, tokens)[:, None, None] * metric
    return torch.cholesky_solve(cross, torch.linalg.cholesky(system)).to(shifts[0])


def _penalty(ridge: float, energy: Tensor, tokens: Tensor) -> Tensor:
    return (ridge * energy / tokens.clamp(min=1)).clamp(min=SMALLEST)


def _whitened(x: Tensor, covariance: Tensor) -> Tensor:
    """Return x C⁻¹ for rows x (n, l, d)."""
    return torch.linalg.solve(precise(covariance).to(x.device), x.mT).mT


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Put the rows (n or 1, l, d) of several edits below each other, on the first one's device."""
    number = max(len(part) for part in parts)
    return torch.cat([part.to(parts[0].device).expand(number, -1, -1) for part in parts], 1)


def in_16_bit(keys: Tensor) -> Tensor:
    """Return keys in fp16, which is exact to 3 digits, or in bf16 where they are too large or too small for it."""
    if keys.dtype in (torch.float16, torch.bfloat16):
        return keys
    peak = float(keys.abs().max()) if keys.numel() else 1.0
    return keys.to(torch.float16 if 1e-2 <= peak <= 6e4 else torch.bfloat16)
