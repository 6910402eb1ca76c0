"""The hypernetwork: gates, latents, attention, ablations, and where training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_editors import REQUESTS, SMALL, make_editor
from torch import nn

from ibke_hf.core.factors import join_groups
from ibke_hf.core.hypernetworks import AdaptedFactors, CrossAttention
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.tokens import encode_requests


@pytest.fixture
def captured(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> tuple[IBKEEditor, Any]:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    return editor, editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))


def test_gates_can_be_overridden(captured: tuple[IBKEEditor, Any]) -> None:
    editor, factors = captured
    plain = editor(factors)
    gates = [adapted.gates for adapted in plain]
    assert gates[0].shape == factors[0].mask.shape
    for same, adapted in zip(editor(factors, gates=gates), plain, strict=True):
        assert torch.equal(same.layer_inputs, adapted.layer_inputs)
    closed = editor(factors, gates=[torch.full_like(gates[0], -1e4), None, *[None] * (len(gates) - 2)])
    assert not closed[0].layer_inputs.any()
    assert torch.equal(closed[1].layer_inputs, plain[1].layer_inputs)


def test_padding_stays_zero_after_the_residual(captured: tuple[IBKEEditor, Any]) -> None:
    editor, factors = captured
    for network in editor.hypernetworks:
        nn.init.ones_(network.residual.bias)
    for captured_layer, adapted in zip(factors, editor(factors), strict=True):
        assert not adapted.layer_inputs[~captured_layer.mask].any()
        assert not adapted.output_gradients[~captured_layer.mask].any()


def test_every_request_draws_its_own_latent_in_training_only(captured: tuple[IBKEEditor, Any]) -> None:
    editor, factors = captured
    adapted = editor(factors)[0]
    assert torch.equal(adapted.latent, adapted.mean)
    drawn = editor(factors, sample=True)[0]
    noise = (drawn.latent - drawn.mean) / (0.5 * drawn.log_variance).exp()
    assert noise.shape == (3, 3, 16)
    assert (noise[0] - noise[1]).abs().max() > 0.1


def test_ablations(captured: tuple[IBKEEditor, Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    _, factors = captured
    model = tiny_model("qwen3")
    without_bottleneck = make_editor(model, tiny_tokenizer, use_information_bottleneck=False)
    adapted = without_bottleneck(factors, sample=True)[0]
    assert adapted.log_variance is None
    assert torch.equal(adapted.latent, adapted.mean)
    assert not any("log_variance" in name for name, _ in without_bottleneck.named_parameters())
    without_gate = make_editor(model, tiny_tokenizer, use_scale_factor=False)
    nn.init.zeros_(without_gate.hypernetworks[0].residual.weight)
    adapted = without_gate(factors)[0]
    assert adapted.gates is None
    x = without_gate.standardise(0, factors[0])
    torch.testing.assert_close(torch.cat((adapted.layer_inputs, adapted.output_gradients), -1), x)
    for option in (
        {"attention_scale": False},
        {"second_stage_heads": 4},
        {"second_stage_skip": True},
        {"second_stage_mlp": 8},
    ):
        for adapted in make_editor(model, tiny_tokenizer, **option)(factors):
            assert torch.isfinite(adapted.layer_inputs).all()


@pytest.mark.parametrize("limits", [(-10.0, 10.0), (-0.5, 0.25)])
def test_log_variance_stays_in_its_range(
    limits: tuple[float, float], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """v² = exp(log v²) must neither overflow nor vanish, whatever the projections say."""
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer, log_variance_range=limits)
    factors = editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    projection = editor.hypernetworks[0].log_variance.value
    for bias, expected in ((-300.0, limits[0]), (300.0, limits[1])):
        nn.init.constant_(projection.bias, bias)
        drawn = editor(factors, sample=True)[0]
        assert torch.equal(drawn.log_variance, torch.full_like(drawn.log_variance, expected))
        assert torch.isfinite(drawn.latent).all()


@pytest.mark.parametrize(("heads", "scaled"), [(1, True), (4, True), (4, False)])
def test_attention_equals_one_head_after_another(heads: int, scaled: bool) -> None:
    """Each head attends by its own columns, its scores divided by the square root of its own width (Eq. 28)."""
    torch.manual_seed(0)
    attention = CrossAttention(6, 5, 8, scale=scaled, heads=heads)
    queries, keys = 3 * torch.randn(2, 3, 6), 3 * torch.randn(2, 4, 5)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    q, k, v = attention.query(queries), attention.key(keys), attention.value(keys)
    width = 8 // heads
    expected = []
    for columns in range(0, 8, width):
        part = slice(columns, columns + width)
        scores = q[..., part] @ k[..., part].mT / (width**0.5 if scaled else 1.0)
        expected.append(scores.masked_fill(~mask[:, None, :], -torch.inf).softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(queries, keys, mask), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)


def test_the_second_stages_mlp_adds_to_its_input(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """An MLP that says nothing changes nothing: a deep second stage starts as a shallow one."""
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer, second_stage_mlp=8)
    factors = editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    for network in editor.hypernetworks:
        nn.init.zeros_(network.mlp[-1].weight)
        nn.init.zeros_(network.mlp[-1].bias)
    silent = editor(factors)
    for network in editor.hypernetworks:
        network.mlp = None
    for with_mlp, without in zip(silent, editor(factors), strict=True):
        assert torch.equal(with_mlp.layer_inputs, without.layer_inputs)
        assert torch.equal(with_mlp.gates, without.gates)
        assert without.gates.std() > 0


def test_training_starts_from_a_gated_step_along_the_standardised_factors(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2")
    editor = IBKEEditor.for_backbone(model, **SMALL)
    factors = editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    for index, adapted in enumerate(editor(factors)):
        expected = torch.sigmoid(adapted.gates).unsqueeze(-1) * editor.standardise(index, factors[index])
        torch.testing.assert_close(torch.cat((adapted.layer_inputs, adapted.output_gradients), -1), expected)


def test_groups_join_the_rows_of_their_requests() -> None:
    rows = torch.randn(5, 2, 3)
    joined = join_groups(rows, torch.tensor([1, 0, 1, 2, 1]))
    assert joined.shape == (3, 6, 3)
    assert torch.equal(joined[1], rows[[0, 2, 4]].flatten(0, 1))
    assert torch.equal(joined[0], torch.cat((rows[1], torch.zeros(4, 3))))
    assert torch.equal(join_groups(rows, None), rows.reshape(1, 10, 3))
    assert torch.equal(join_groups(rows, torch.arange(5)), rows)


def test_an_edit_is_differentiable_in_the_editors_weights(captured: tuple[IBKEEditor, Any]) -> None:
    editor, factors = captured
    adapted: tuple[AdaptedFactors, ...] = editor(factors)
    edit = editor.as_edit(adapted, torch.tensor([0, 0, 1]))
    sum(edit.weight_updates(name).square().sum() for name in edit.layers).backward()
    assert all(
        parameter.grad is not None for name, parameter in editor.named_parameters() if "log_variance" not in name
    )


def test_edits_compute_no_variance(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    for network in editor.hypernetworks:
        network.log_variance.register_forward_hook(lambda *_: pytest.fail("v² is computed"))
    for mode in ("joint", "sequential", "independent"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode=mode)
