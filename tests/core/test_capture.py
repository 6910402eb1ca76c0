"""Gradient factors against autograd's own weight gradients, whatever the padding, batch, precision and thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from memory_edits import FAMILIES, REQUESTS
from torch import Tensor, nn

from ibke_hf.benchmark.tiny_models import tiny_model as tiny_family
from ibke_hf.core.capture import (
    GradientFactors,
    NonFiniteError,
    capture_factors,
    case_losses,
    evaluating,
    target_logits,
)
from ibke_hf.core.layers import BackboneError, find_ffn_output, is_transposed, layers_to_edit, modules_to_edit
from ibke_hf.core.tokens import IGNORED, TokenBatch, encode_requests

near = {"rtol": 1e-5, "atol": 1e-5}


def layers(model: Any, chosen: tuple[int, ...] = (1, 2)) -> dict[str, nn.Module]:
    return modules_to_edit(model, [find_ffn_output(model).format(i=i) for i in chosen])


def weight_gradients(model: Any, modules: dict[str, nn.Module], batch: TokenBatch) -> dict[str, Tensor]:
    """Autograd's gradient of one request's loss, (d_in, d_out)."""
    loss = case_losses(*target_logits(model, batch)).sum()
    gradients = torch.autograd.grad(loss, [module.weight for module in modules.values()])
    return {name: g if is_transposed(modules[name]) else g.T for name, g in zip(modules, gradients, strict=True)}


def product(factors: GradientFactors, row: int) -> Tensor:
    return factors.layer_inputs[row].T @ factors.output_gradients[row]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_product_of_the_factors_is_the_weight_gradient_of_each_request(
    family: str, side: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    modules = layers(model)
    factors = capture_factors(model, modules, encode_requests(tiny_tokenizer, REQUESTS, side=side))
    for row, request in enumerate(REQUESTS):
        expected = weight_gradients(model, modules, encode_requests(tiny_tokenizer, [request]))
        for name in modules:
            scale = expected[name].abs().max()
            torch.testing.assert_close(product(factors[name], row) / scale, expected[name] / scale, **near)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_square_weights_are_oriented_by_type(family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model(family, **({"n_inner": 32} if family == "gpt2" else {"intermediate_size": 32}))
    modules = layers(model)
    batch = encode_requests(tiny_tokenizer, REQUESTS[:1])
    factors = capture_factors(model, modules, batch)
    for name, expected in weight_gradients(model, modules, batch).items():
        torch.testing.assert_close(product(factors[name], 0), expected, **near)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_and_batch_change_no_factor(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    modules = layers(model)
    alone = capture_factors(model, modules, encode_requests(tiny_tokenizer, REQUESTS[2:]))
    for side in ("left", "right"):
        together = capture_factors(model, modules, encode_requests(tiny_tokenizer, REQUESTS, side=side))
        for name in modules:
            real = together[name].mask[2]
            assert not together[name].layer_inputs[2][~real].any()
            assert not together[name].output_gradients[2][~real].any()
            torch.testing.assert_close(together[name].layer_inputs[2][real], alone[name].layer_inputs[0], **near)
            torch.testing.assert_close(
                together[name].output_gradients[2][real], alone[name].output_gradients[0], **near
            )
            torch.testing.assert_close(together[name].output_norms[2:], alone[name].output_norms, **near)


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2").train()
    model.transformer.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    first, second = (capture_factors(model, layers(model), batch) for _ in range(2))
    assert all(torch.equal(first[name].output_gradients, second[name].output_gradients) for name in first), (
        "dropout was on"
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.transformer.drop.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_come_back_after_an_exception(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2").train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


def test_no_weight_below_or_above_needs_a_gradient(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    expected = capture_factors(model, layers(model), batch)
    model.requires_grad_(False)
    with torch.inference_mode():
        frozen = capture_factors(model, layers(model), batch)
    assert all(torch.equal(frozen[name].output_gradients, expected[name].output_gradients) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_backbones_give_finite_fp32_factors(
    family: str, dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.05).to(dtype)
    factors = capture_factors(model, layers(model), encode_requests(tiny_tokenizer, REQUESTS), loss_scale=64.0)
    for captured in factors.values():
        for tensor in (captured.layer_inputs, captured.output_gradients, captured.output_norms):
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
        assert captured.output_gradients.any()


def test_the_loss_scale_cancels(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    plain, scaled = (capture_factors(model, layers(model), batch, loss_scale=scale) for scale in (1.0, 1024.0))
    for name in plain:
        torch.testing.assert_close(plain[name].output_gradients, scaled[name].output_gradients, **near)


def test_a_loss_that_is_not_finite_names_its_request(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    tokens = set(batch.input_ids[1].tolist()) - {i for row in (0, 2) for i in batch.input_ids[row].tolist()}
    with torch.no_grad():
        model.transformer.wte.weight[min(tokens)] = float("nan")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))  # untied: other requests stay finite
    with pytest.raises(NonFiniteError, match=r"loss .*request 1"):
        capture_factors(model, layers(model), batch)


def test_a_factor_that_is_not_finite_names_its_layer(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj .*request 0"):
        capture_factors(model, layers(model), encode_requests(tiny_tokenizer, REQUESTS), loss_scale=1e38)


def test_nan_weights_are_an_error(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="request 0"):
        capture_factors(model, layers(model), encode_requests(tiny_tokenizer, REQUESTS))
    assert torch.is_grad_enabled()


def test_threads_that_share_a_model_record_their_own_requests(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    batches = [encode_requests(tiny_tokenizer, [request]) for request in REQUESTS[:2]]
    expected = [capture_factors(model, layers(model), batch) for batch in batches]

    def work(index: int) -> bool:
        return all(
            torch.equal(captured.output_gradients, expected[index][name].output_gradients)
            for _ in range(30)
            for name, captured in capture_factors(model, layers(model), batches[index]).items()
        )

    def read(_: int) -> bool:
        with torch.no_grad():
            return not any(model(batches[0].input_ids).logits.requires_grad for _ in range(60))

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(work, 0), pool.submit(work, 1), pool.submit(read, 0)]
        assert all(job.result() for job in jobs)


def test_the_vocabulary_projection_sees_the_target_columns_only(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    widths: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    logits, labels = target_logits(model, batch)
    handle.remove()
    targets = int((batch.labels != IGNORED).sum(-1).max())
    assert widths == [targets] == [labels.shape[1]] == [logits.shape[1]]
    full = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    torch.testing.assert_close(case_losses(logits, labels), case_losses(full, batch.labels), **near)


def test_case_losses_are_means_over_each_rows_targets(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    logits, labels = target_logits(tiny_model("gpt2"), batch)
    expected = [
        torch.nn.functional.cross_entropy(logits[row], labels[row], ignore_index=IGNORED) for row in range(len(batch))
    ]
    torch.testing.assert_close(case_losses(logits, labels), torch.stack(expected), **near)


def test_models_that_flatten_batch_and_tokens_are_read_too(tiny_tokenizer: Any) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=3,
        ffn_dim=48,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        init_std=0.2,
    )
    model = OPTForCausalLM(config).eval()
    template, chosen = layers_to_edit(model, [1])
    modules = modules_to_edit(model, [template.format(i=chosen[0])])
    factors = capture_factors(model, modules, encode_requests(tiny_tokenizer, REQUESTS))
    for name, expected in weight_gradients(model, modules, encode_requests(tiny_tokenizer, REQUESTS[1:2])).items():
        torch.testing.assert_close(product(factors[name], 1), expected, **near)


@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_models_that_read_more_tokens_than_they_are_given_are_refused(family: str, tiny_tokenizer: Any) -> None:
    model = tiny_family(family, len(tiny_tokenizer))
    template, chosen = layers_to_edit(model)
    modules = modules_to_edit(model, [template.format(i=i) for i in chosen])
    batch = encode_requests(tiny_tokenizer, REQUESTS[:1])
    with pytest.raises(BackboneError, match=rf"reads \d+ tokens where the requests have {batch.input_ids.numel()}: "):
        capture_factors(model, modules, batch)
