"""Which requests share an expert of LEMoE, and the keys that they leave behind as anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.tokens import (
    IGNORED,
)
from .mixture import unit

LLOYD_STEPS = 10


def anchors(values: Tensor, labels: Tensor) -> Tensor:
    """Return the values that predict target tokens: (b, l, d), (b, l) -> (b, a, d), zero where a row has fewer."""
    judged = (labels != IGNORED).to(values.device)
    most = int(judged.sum(-1).max())
    first = judged.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    kept = judged.gather(-1, first).unsqueeze(-1)
    return values.gather(1, first.unsqueeze(-1).expand(-1, -1, values.shape[-1])) * kept


def clustered(points: Tensor, number: int) -> list[list[int]]:
    """Cluster unit vectors (m, d) by k-means on the sphere, from centres as far apart as can be; nothing is random.

    Returns:
        The points of each cluster in their order, clusters in the order of their first points; none is empty.
    """
    centres = points[:1]
    for _ in range(min(number, len(points)) - 1):
        farthest = (points @ centres.T).amax(-1).argmin()
        centres = torch.cat((centres, points[farthest : farthest + 1]))
    owners = (points @ centres.T).argmax(-1)
    for _ in range(LLOYD_STEPS):
        sums = torch.zeros_like(centres).index_add(0, owners, points)
        centres = torch.where(sums.norm(dim=-1, keepdim=True) > 0, unit(sums), centres)
        owners = (points @ centres.T).argmax(-1)
    clusters: dict[int, list[int]] = {}
    for point, owner in enumerate(owners.tolist()):
        clusters.setdefault(owner, []).append(point)
    return list(clusters.values())
