"""Mean and standard deviation of gradient factors, measured in one pass and frozen (SPEC §2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorStatistics(nn.Module):
    """Mean and standard deviation per feature of h ⊕ u at one layer: saved buffers, frozen after calibration."""

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("count", torch.zeros(()))

    def reset(self) -> None:
        """Return to what an uncalibrated editor has: mean 0, standard deviation 1, no token."""
        self.mean.zero_()
        self.std.fill_(1.0)
        self.count.zero_()

    def measure(self, moments: Moments) -> None:
        """Take the statistics over from the moments of the calibration set."""
        self.mean.copy_(moments.mean)
        self.std.copy_(moments.variance.sqrt())
        self.count.fill_(moments.count)


class Moments:
    """Running mean and variance per feature, in fp64; memory does not grow with the number of rows.

    Batches are joined by the update of Chan, Golub and LeVeque (1983), which does not cancel as Σx² - (Σx)² would for
    features whose mean is large beside their spread, such as the massive activations of a residual stream.

    Attributes:
        count: Rows seen so far.
        mean: (width,).
    """

    def __init__(self, width: int) -> None:
        self.count, self.mean = 0, torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)  # sum of squared distances from the mean

    @property
    def variance(self) -> Tensor:
        """Variance of the rows seen so far (divided by their number), (width,)."""
        return self._squares / max(self.count, 1)

    def add(self, rows: Tensor) -> None:
        """Take rows (tokens, width) in."""
        if not len(rows):
            return
        batch = rows.detach().to("cpu", torch.float64)  # accelerators without fp64 exist
        number, mean = len(batch), batch.mean(0)
        total, shift = self.count + number, mean - self.mean
        self._squares += (batch - mean).square().sum(0) + shift.square() * (self.count * number / total)
        self.mean += shift * (number / total)
        self.count = total
