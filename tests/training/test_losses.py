"""Each loss term against an independent formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from ibke_hf.core.tokens import IGNORED
from ibke_hf.training.objective import (
    independence_for_locality,
    information_transfer,
    itm,
    sufficiency_for_generality,
)

near = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def cases() -> tuple[Tensor, Tensor, Tensor]:
    """Edited logits, original logits and labels of three cases with one, two and four target tokens."""
    generator = torch.Generator().manual_seed(0)
    edited, original = (3 * torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (3, 5), generator=generator)
    for row, number in enumerate((1, 2, 4)):
        labels[row, : 5 - number] = IGNORED
    return edited, original, labels


def test_itm_is_the_divergence_from_the_standard_normal() -> None:
    mean, log_variance = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(itm(mean, log_variance), expected, **near)
    assert float(itm(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))) == 0.0


def test_information_transfer_divides_once_by_requests_layers_and_latent_size() -> None:
    latents = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4)) for _ in range(5)]
    expected = sum(itm(mean, log_variance) for mean, log_variance in latents) / (2 * 5 * 3 * 4)
    torch.testing.assert_close(information_transfer(latents, 2), expected, **near)
    torch.testing.assert_close(information_transfer(latents, 1), 2 * expected, **near)  # the second is a hop


def test_generality_is_a_mean_of_case_means(cases: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, labels = cases
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(logits[row], labels[row], ignore_index=IGNORED) for row in range(3)]
    ).mean()
    torch.testing.assert_close(sufficiency_for_generality(logits[labels != IGNORED], labels), expected, **near)


def test_locality_is_the_divergence_of_edited_from_original(cases: tuple[Tensor, Tensor, Tensor]) -> None:
    edited, original, labels = cases
    divergence = kl_divergence(Categorical(logits=edited), Categorical(logits=original))
    expected = torch.stack([divergence[row][labels[row] != IGNORED].mean() for row in range(3)]).mean()
    edited, original = edited[labels != IGNORED], original[labels != IGNORED]
    torch.testing.assert_close(independence_for_locality(edited, original, labels), expected, **near)
    reverse = independence_for_locality(original, edited, labels)
    assert not torch.isclose(reverse, expected)
    assert float(independence_for_locality(edited, edited, labels)) == 0.0


def test_gradients_flow_to_the_edited_side_only(cases: tuple[Tensor, Tensor, Tensor]) -> None:
    labels = cases[2]
    edited, original = (logits[labels != IGNORED].requires_grad_(True) for logits in cases[:2])
    (sufficiency_for_generality(edited, labels) + independence_for_locality(edited, original, labels)).backward()
    assert original.grad is None
    assert edited.grad is not None
    assert edited.grad.abs().sum(-1).gt(0).all()


def test_16_bit_logits_are_judged_in_fp32(cases: tuple[Tensor, Tensor, Tensor]) -> None:
    labels = cases[2]
    edited, original = (logits[labels != IGNORED].to(torch.bfloat16) for logits in cases[:2])
    for got, expected in (
        (sufficiency_for_generality(edited, labels), sufficiency_for_generality(edited.float(), labels)),
        (
            independence_for_locality(edited, original, labels),
            independence_for_locality(edited.float(), original.float(), labels),
        ),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_no_cases_give_zero() -> None:
    none, labels = torch.zeros(0, 11, requires_grad=True), torch.zeros(0, 5, dtype=torch.long)
    assert float(sufficiency_for_generality(none, labels).detach()) == 0.0
    assert float(independence_for_locality(none, none, labels).detach()) == 0.0
