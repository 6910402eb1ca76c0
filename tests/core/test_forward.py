"""Each text of a batch is answered as if it were alone, and hooks see the columns of the caller's batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibke_hf import IBKEEditor
from ibke_hf.benchmark.tiny_models import tiny_model as toy
from ibke_hf.core import forward
from ibke_hf.core.attachment import hooked
from ibke_hf.core.capture import capture_factors, case_losses
from ibke_hf.core.forward import last_states, padding_of, target_logits
from ibke_hf.core.layers import BackboneError, layers_to_edit, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import TokenBatch, encode_requests
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.t_patcher import TPatcherEditor

VOCABULARY = 320  # of the tiny tokenizer
REQUESTS = (
    EditRequest("An oak is", "metal"),
    EditRequest("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditRequest("The capital of France is", "Rome"),
)
# recurrent; no attention mask at all; positions, or windows, counted from the first column; padding not masked
READ_PADDING = ("rwkv", "xlstm", "bart", "whisper", "deepseek_v4", "xlm")
near = {"rtol": 1e-4, "atol": 1e-4}


def edited(model: Any) -> dict[str, nn.Module]:
    template = {"xlstm": "backbone.blocks.{i}.ffn.proj_down"}.get(model.config.model_type)
    template, chosen = layers_to_edit(model, [1, 2], template)
    return modules_to_edit(model, [template.format(i=i) for i in chosen])


@pytest.mark.parametrize("family", READ_PADDING)
def test_a_model_that_reads_padding_answers_and_gives_factors_as_for_single_texts(
    family: str, tiny_tokenizer: Any
) -> None:
    model = toy(family, VOCABULARY)
    assert padding_of(model) == "right"
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    losses = case_losses(*target_logits(model, batch))
    factors = capture_factors(model, edited(model), batch)
    with torch.no_grad():
        ends = target_logits(model, batch)[0][:, -1]
    for row, request in enumerate(REQUESTS):
        single = encode_requests(tiny_tokenizer, [request])
        logits, labels = target_logits(model, single)
        torch.testing.assert_close(losses[row : row + 1], case_losses(logits, labels), **near)
        torch.testing.assert_close(ends[row], logits[0, -1], **near)  # of the caller's last column
        for name, alone in capture_factors(model, edited(model), single).items():
            real = factors[name].mask[row]
            assert int(real.sum()) == single.input_ids.shape[1]
            torch.testing.assert_close(factors[name].layer_inputs[row][real], alone.layer_inputs[0], **near)
            torch.testing.assert_close(factors[name].output_gradients[row][real], alone.output_gradients[0], **near)


@pytest.mark.parametrize("family", READ_PADDING)
def test_each_row_carries_its_own_edit_on_a_model_that_reads_padding(family: str, tiny_tokenizer: Any) -> None:
    model = toy(family, VOCABULARY)
    editor = FineTuningEditor.for_backbone(model, [1, 2], next(iter(edited(model))).replace(".1.", ".{i}."), steps=2)
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    edits = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    with torch.no_grad(), edits.attached(model):
        together = case_losses(*target_logits(model, batch))
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        for name in alone.layers:
            torch.testing.assert_close(edits[row].updates[name], alone.updates[name], rtol=1e-2, atol=1e-4)
        with torch.no_grad(), edits[row].attached(model):
            loss = case_losses(*target_logits(model, encode_requests(tiny_tokenizer, [request])))
        torch.testing.assert_close(together[row : row + 1], loss, **near)


def test_hooks_see_the_columns_of_the_caller(tiny_tokenizer: Any) -> None:
    model = toy("rwkv", VOCABULARY)
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    embeddings: list[Tensor] = []

    def keep(_: Tensor, output: Tensor) -> Tensor:
        embeddings.append(output)
        return output

    with torch.no_grad(), hooked({"": model.get_input_embeddings()}, {"": keep}):
        target_logits(model, batch)
        assert len(embeddings) == 1, "the trial of the padding was seen by an open block"
        expected = model.get_input_embeddings().weight[batch.input_ids]
    assert torch.equal(embeddings[0], expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
def test_ordinary_models_are_not_tried(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_tried", lambda model: pytest.fail("an ordinary model was tried"))
    model = tiny_model(family)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))
    assert len(calls) == 1


def test_a_model_is_tried_once(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("mamba", VOCABULARY)
    assert padding_of(model) == "left"  # it masks what its convolution and its state read
    monkeypatch.setattr(forward, "_tried", lambda model: pytest.fail("it was tried twice"))
    target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))


def test_padding_on_the_right_stays_where_it_is(tiny_tokenizer: Any) -> None:
    model = toy("rwkv", VOCABULARY)
    sides = [
        case_losses(*target_logits(model, encode_requests(tiny_tokenizer, REQUESTS, side=s)))
        for s in ("left", "right")
    ]
    torch.testing.assert_close(*sides, **near)


class Mean(nn.Module):
    """A model that is not causal and reads padding: no side serves it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        states = self.embedding(input_ids)
        return SimpleNamespace(logits=self.head(states + states.mean(1, keepdim=True)))


def test_a_model_that_reads_padding_on_both_sides_is_refused_with_a_cure(tiny_tokenizer: Any) -> None:
    model = Mean().eval()
    assert padding_of(model) == "none"
    with pytest.raises(BackboneError, match=r"Mean: a text in a batch .*batch_size=1"):
        target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))
    logits, _ = target_logits(model, encode_requests(tiny_tokenizer, REQUESTS[:1]))
    assert torch.isfinite(logits).all()


def test_states_of_a_model_without_a_head_are_of_single_texts(tiny_tokenizer: Any) -> None:
    model = toy("rwkv", VOCABULARY).rwkv
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.no_grad():
        states = last_states(model, batch)
        for row, request in enumerate(REQUESTS):
            alone = last_states(model, encode_requests(tiny_tokenizer, [request]))
            torch.testing.assert_close(states[row][batch.attention_mask[row].bool()], alone[0], **near)


def test_a_layer_that_is_changed_in_place_keeps_what_was_recorded(tiny_tokenizer: Any) -> None:
    model = toy("falcon", VOCABULARY)
    modules = edited(model)
    batch = encode_requests(tiny_tokenizer, REQUESTS[:1])
    factors = capture_factors(model, modules, batch)
    loss = case_losses(*target_logits(model, batch)).sum()
    gradients = torch.autograd.grad(loss, [module.weight for module in modules.values()])
    for (name, module), gradient in zip(modules.items(), gradients, strict=True):
        product = factors[name].layer_inputs[0].T @ factors[name].output_gradients[0]
        torch.testing.assert_close(product, gradient.T, rtol=1e-3, atol=1e-5)
        output = factors[name].layer_inputs[0] @ module.weight.T
        torch.testing.assert_close(factors[name].output_norms[0], output.norm(), rtol=1e-4, atol=1e-4)
    editor = IBKEEditor.for_backbone(model, latent_dim=8)
    editor.calibrate(model, [batch])
    assert len(editor.edit(model, tiny_tokenizer, REQUESTS)) == 1


@pytest.mark.parametrize("family", ["rwkv", "mixtral"])  # an FFN, and an attention called by keywords
def test_layers_that_return_a_tuple_take_patches(family: str, tiny_tokenizer: Any) -> None:
    model = toy(family, VOCABULARY)
    editor = TPatcherEditor.for_backbone(model, steps=30)
    batch = encode_requests(tiny_tokenizer, REQUESTS[:1])
    with torch.no_grad():
        before = case_losses(*target_logits(model, batch))
        with editor.edit(model, tiny_tokenizer, REQUESTS[:1]).attached(model):
            assert case_losses(*target_logits(model, batch)) < before - 0.5
        assert torch.equal(case_losses(*target_logits(model, batch)), before)


@pytest.mark.parametrize("grad", [True, False])
def test_the_graph_starts_inside_of_no_grad_and_the_mode_comes_back(
    grad: bool, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from ibke_hf.core.capture import graph_starting_at

    model = tiny_model("qwen3").requires_grad_(False)
    modules = edited(model)
    shift = torch.zeros(32, requires_grad=True)
    top = dict(list(modules.items())[-1:])
    batch: TokenBatch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.set_grad_enabled(grad):
        with torch.no_grad(), graph_starting_at(modules), hooked(top, dict.fromkeys(top, lambda x, y: y + shift)):
            loss = case_losses(*target_logits(model, batch)).sum()
            assert torch.is_grad_enabled(), "the hook's grad mode ended with the hook"
        assert torch.is_grad_enabled() == grad
    assert torch.autograd.grad(loss, shift)[0].any()
