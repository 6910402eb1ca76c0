"""The training objective, term by term (Eq. 29, 34-36): pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100


def sufficiency_for_generality(logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_SG (Eq. 34): cross-entropy, mean over a case's target positions, then over the cases; 0 without cases.

    Args:
        logits: (p, vocabulary) of the edited model at the p judged positions, case after case.
        labels: (cases, k), -100 where nothing is judged.
    """
    if not len(labels):
        return logits.sum()
    judged = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[judged], reduction="none")
    return _mean_over_cases(losses, judged)


def independence_for_locality(logits: Tensor, original_logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_IL (Eq. 35): KL[edited ‖ original] over the full vocabulary in fp32, averaged as ℓ_SG; 0 without cases.

    Args:
        logits: (p, vocabulary) of the edited model at the p judged positions, case after case.
        original_logits: The same of the unedited model, without gradient.
        labels: (cases, k), -100 where nothing is judged.
    """
    if not len(labels):
        return logits.sum()
    edited, original = logits.float().log_softmax(-1), original_logits.detach().float().log_softmax(-1)
    return _mean_over_cases((edited.exp() * (edited - original)).sum(-1), labels != IGNORED)


def itm(mean: Tensor, log_variance: Tensor) -> Tensor:
    """ℓ_ITM (Eq. 29) of one layer, summed over the requests and unnormalised: KL[N(μ, v²) ‖ N(0, I)].

    Args:
        mean: μ, (b, l_m, d_m).
        log_variance: log v², (b, l_m, d_m).
    """
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (-log_variance + log_variance.exp() + mean.square() - 1).sum()


def information_transfer(latents: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The ITM term of Eq. 36 before β: Σ over requests and layers, divided once by |E| n l_m d_m."""
    return torch.stack([itm(mean, log_variance) for mean, log_variance in latents]).sum() / sum(
        m.numel() for m, _ in latents
    )


def _mean_over_cases(losses: Tensor, judged: Tensor) -> Tensor:
    rows, number = judged.nonzero()[:, 0], len(judged)
    total = torch.zeros(number, dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)
    return (total / torch.bincount(rows, minlength=number).clamp(min=1)).mean()
