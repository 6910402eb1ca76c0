"""T-Patcher: its losses, its neurons as widened weights, silence where it was not trained to fire."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_edits import (
    FAMILIES,
    REQUESTS,
    edited,
    hits,
    in_two_threads,
    require_a_row_for_each,
    require_answers_and_no_trace,
    require_common_refusals,
    require_generation,
    require_it_comes_back,
    require_the_same_from_either_side,
)
from torch import nn

from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.capture import NonFiniteError, target_logits
from ibke_hf.core.layers import BackboneError
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import IGNORED, encode_requests
from ibke_hf.editors.t_patcher import TPatcherConfig, TPatcherEdit, TPatcherEditor, patched_ffn, sampled_texts
from ibke_hf.editors.t_patcher.training import NewPatches, top_mean_exp

FAST = {"steps": 100, "learning_rate": 0.2}  # tiny models with random weights are hard to move
MEMORY = (
    "Oslo lies on the river Thames",
    "iron works in physics; Berlin is a bird",
    "A sparrow is a bird, Vienna a city",
)


def make(model: Any, **config: Any) -> TPatcherEditor:
    return TPatcherEditor.for_backbone(model, **{"memory": MEMORY, **FAST, **config})


@pytest.fixture(scope="module", params=FAMILIES)
def joint(request: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    """A model of each family, what it was before, and its joint edit."""
    model = tiny_model(request.param)
    with torch.inference_mode():
        return edited(model, tiny_tokenizer, lambda: make(model, steps=200).edit(model, tiny_tokenizer, REQUESTS))


@pytest.fixture(scope="module")
def independent(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    """A model, its editor and its independent edits; nobody changes them."""
    model = tiny_model("qwen3")
    editor = make(model)
    return SimpleNamespace(
        model=model, editor=editor, edit=editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    )


def test_the_model_answers_and_is_untouched(joint: SimpleNamespace, tiny_tokenizer: Any) -> None:
    require_answers_and_no_trace(joint, tiny_tokenizer)


def test_patches_are_silent_on_what_they_were_not_trained_to_fire_on(
    joint: SimpleNamespace, tiny_tokenizer: Any
) -> None:
    memory = joint.edit.memory
    activations = (memory["keys"] * memory["queries"]).sum(-1) + memory["biases"]
    assert (activations > 0).all()
    across = memory["queries"][0] @ memory["keys"][0].T + memory["biases"][0]
    assert (across.fill_diagonal_(-1) <= 0).all()  # each fires on its own mistake alone
    for text in MEMORY:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            before = joint.model(ids).logits
            with joint.edit.attached(joint.model):
                assert torch.equal(joint.model(ids).logits, before)


def test_patches_are_neurons(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """On an FFN with ReLU, the edited model is the model with more neurons in its last FFN."""
    model = tiny_model("gpt2", activation_function="relu")
    edit = make(model, steps=20).edit(model, tiny_tokenizer, REQUESTS)
    wider = copy.deepcopy(model)
    mlp, memory = wider.transformer.h[3].mlp, edit.memory
    mlp.c_fc.weight = nn.Parameter(torch.cat([mlp.c_fc.weight, memory["keys"][0].T], 1))
    mlp.c_fc.bias = nn.Parameter(torch.cat([mlp.c_fc.bias, memory["biases"][0]]))
    mlp.c_fc.nf = mlp.c_fc.weight.shape[1]
    mlp.c_proj.weight = nn.Parameter(torch.cat([mlp.c_proj.weight, memory["values"][0]]))
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.no_grad(), edit.attached(model):
        attached = target_logits(model, batch)[0]
    with torch.no_grad():
        torch.testing.assert_close(attached, target_logits(wider, batch)[0], rtol=1e-4, atol=1e-4)


def test_a_patch_is_to_be_silent_on_everything_that_its_row_holds_but_its_own_query() -> None:
    """A token of 16 bit is read again with an error: what is its own query to rounding asks no silence of it."""
    generator = torch.Generator().manual_seed(0)
    memory, queries = torch.randn(2, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    real = torch.tensor([[False, True, True], [True, True, True]])
    mistakes = torch.stack([1.005 * queries[0, 2], queries[1, 1]])  # the first is read a little differently
    earlier = torch.stack([mistakes[1], torch.zeros(4)]).unsqueeze(1)  # a patch of row 0, none of row 1
    config: Any = SimpleNamespace()
    rows = torch.arange(2)
    patches = NewPatches(config, rows, rows, torch.ones(2).long(), mistakes, torch.zeros(2, 3), memory.mean(0))
    others, allowed = patches.silent_on(memory, queries, real, earlier)
    torch.testing.assert_close(others, torch.cat([memory, *queries, *earlier]))
    both, first, second, patch = [True, True], [False, True, False], [True, False, True], [True, False]
    assert allowed[0].tolist() == [*both, *first, False, False, False, *patch]
    assert allowed[1].tolist() == [*both, False, False, False, *second, False, False]


def test_a_request_that_is_answered_is_trained_on_until_its_patches_are_silent(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    near = tuple(f"{request.prompt} of" for request in REQUESTS)

    def loudest(**config: Any) -> float:
        editor = make(model, memory=near, stop_loss=100.0, **config)  # any answer will do
        patches = editor.edit(model, tiny_tokenizer, REQUESTS[:1]).memory
        queries = editor._memories[model]
        same_query = torch.cdist(queries, patches["queries"][0]) <= 0.02 * patches["queries"][0].norm(dim=-1)
        heard = queries @ patches["keys"][0].T + patches["biases"][0]
        return float(heard.masked_fill(same_query, -torch.inf).max())

    assert loudest(steps=1, learning_rate=0.0) > 0
    assert loudest(steps=300) <= 0


def test_losses_equal_naive_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    mistakes, outputs = torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)
    memory = torch.randn(7, 5, generator=generator)
    centre = memory.mean(0)
    config: Any = SimpleNamespace(
        activation_weight=2.0, memory_weight=5.0, activation_threshold=-3.0, activation_margin=-2.0, memory_top_k=3
    )
    zeros = torch.zeros(2, dtype=torch.long)
    patches = NewPatches(config, torch.arange(2), zeros, torch.arange(2), mistakes, outputs, centre)
    keys, biases, values = patches.parts()
    torch.testing.assert_close((keys * mistakes).sum(-1) + biases, torch.ones(2))
    torch.testing.assert_close(keys @ centre + biases, torch.zeros(2))
    assert not values.any()
    with torch.no_grad():
        for change in patches.changes:
            change.normal_(generator=generator)
    allowed = torch.ones(2, 7, dtype=torch.bool)
    allowed[1, 2:] = False
    losses, loudest = (part.detach() for part in patches.losses(memory, allowed))
    keys, biases, _ = (part.detach() for part in patches.parts())
    for p in range(2):
        activation = float(mistakes[p] @ keys[p] + biases[p])
        heard = [float(memory[i] @ keys[p] + biases[p]) for i in range(7) if allowed[p, i]]
        first = sorted((math.exp(h + 3.0) for h in heard), reverse=True)[:3]
        second = sorted((math.exp(h - activation + 2.0) for h in heard), reverse=True)[:3]
        expected = 2.0 * math.exp(-activation) + 5.0 * (sum(first) / len(first) + sum(second) / len(second))
        assert float(losses[p]) == pytest.approx(expected, rel=1e-4)
        assert float(loudest[p]) == pytest.approx(max(heard), rel=1e-4)
    assert top_mean_exp(torch.full((1, 4), -torch.inf), 2).tolist() == [0.0]


def test_only_mistakes_get_a_patch(independent: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model, editor, edit = independent.model, independent.editor, independent.edit
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.no_grad():
        logits, labels = target_logits(model, batch)
    wrong = ((logits.argmax(-1) != labels) & (labels != IGNORED)).sum(-1).tolist()
    assert edit.patches == wrong
    assert hits(model, tiny_tokenizer, edit) == [True] * 3
    again = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent", previous=edit)
    assert again == edit
    ids = torch.tensor([tiny_tokenizer(REQUESTS[0].prompt)["input_ids"]])
    with torch.no_grad():
        known = tiny_tokenizer.decode(model(ids).logits[0, -1].argmax())
    if known.startswith(" ") and known.strip():
        assert editor.edit(model, tiny_tokenizer, [EditRequest(REQUESTS[0].prompt, known)]).patches == [0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_company_and_padding_do_not_change_an_edit(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    editor = make(model, steps=8)
    together = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        count = alone.patches[0]
        assert together.patches[row] == count
        for name, tensor in alone.memory.items():
            scale = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(
                together.memory[name][row, :count] / scale, tensor[0] / scale, rtol=0, atol=1e-5
            )
    require_the_same_from_either_side(model, tiny_tokenizer, together)


def test_generation_and_beams(independent: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model, edit = independent.model, independent.edit
    prompts = require_generation(model, tiny_tokenizer, edit)
    require_a_row_for_each(model, tiny_tokenizer, edit)
    with pytest.raises(ValueError, match="batch of 2 rows"), edit.attached(model):
        model(prompts["input_ids"][:2])


def test_two_threads_do_not_see_each_others_patches(independent: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model = independent.model

    def ask(row: int, together: threading.Barrier) -> list[torch.Tensor]:
        batch = encode_requests(tiny_tokenizer, REQUESTS[:2])
        with torch.no_grad(), independent.edit[row].attached(model):
            together.wait()
            return [target_logits(model, batch)[0] for _ in range(5)]

    answers = in_two_threads(ask)
    for row in range(2):
        with torch.no_grad(), independent.edit[row].attached(model):
            alone = target_logits(model, encode_requests(tiny_tokenizer, REQUESTS[:2]))[0]
        assert all(torch.equal(logits, alone) for logits in answers[row])
    assert not torch.equal(answers[0][0], answers[1][0])


def test_sequential_edits_go_on_from_the_patches_before(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    editor = make(model, steps=60)
    requests, another = REQUESTS[::2], EditRequest("Berlin is", "a tree")
    sequential = editor.edit(model, tiny_tokenizer, requests, mode="sequential")
    first = editor.edit(model, tiny_tokenizer, requests[:1])
    assert editor.edit(model, tiny_tokenizer, requests[1:], previous=first) == sequential
    spread = editor.edit(model, tiny_tokenizer, [another, another], mode="independent", previous=sequential)
    assert spread.patches[0] == spread.patches[1] > sequential.patches[0]
    assert torch.equal(spread.memory["keys"][0, : sequential.patches[0]], sequential.memory["keys"][0])
    assert hits(model, tiny_tokenizer, spread[0], [*requests, another]) == [True] * 3


def test_without_a_memory_the_model_writes_one(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    texts = sampled_texts(model)
    assert texts == sampled_texts(model)
    assert (len(texts), {len(text) for text in texts}) == (64, {32})
    editor = make(model, memory=(), memory_size=300, steps=2)
    editor.edit(model, tiny_tokenizer, REQUESTS)
    (memory,) = editor._memories.values()
    assert memory.shape == (300, 32)


def test_saved_patches_come_back_bit_for_bit(
    independent: SimpleNamespace, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, edit = independent.model, independent.edit
    require_it_comes_back(edit, tmp_path, model, tiny_tokenizer)
    assert edit.to(torch.bfloat16).nbytes * 2 == edit.nbytes
    with (
        pytest.raises(BackboneError, match="made for another backbone"),
        edit.attached(tiny_model("qwen3", hidden_size=64)),
    ):
        pass
    (tmp_path / "edit.json").write_text((tmp_path / "edit.json").read_text().replace('"relu"', '"tanh"'))
    with pytest.raises(AdapterError, match="not a t_patcher edit"):
        TPatcherEdit.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="patches have keys"):
        TPatcherEdit({**edit.memory, "biases": edit.memory["biases"].unsqueeze(-1)}, edit.settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_edited_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.1).to(dtype)
    edit = make(model, steps=60, loss_scale=64.0).edit(model, tiny_tokenizer, REQUESTS)
    assert all(tensor.dtype == torch.float32 for tensor in edit.memory.values())
    assert hits(model, tiny_tokenizer, edit) == [True] * 3


def test_refusals(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make(model, steps=2)
    assert editor.config.module == "model.layers.3.mlp.down_proj"
    with pytest.raises(ValueError, match="one layer"):
        make(model, layers=[1, 2])
    with pytest.raises(BackboneError, match="no linear layer named"):
        TPatcherEditor(TPatcherConfig("h.{i}.x", 1)).edit(model, tiny_tokenizer, REQUESTS)
    with pytest.raises(BackboneError, match="needs an FFN that is a module of its own"):
        patched_ffn(BareBlocks(), "layers.0.fc2")
    independent = require_common_refusals(editor, model, tiny_tokenizer)
    with pytest.raises(ValueError, match="T-Patcher goes on from patches of"):
        make(model, activation="gelu").edit(model, tiny_tokenizer, REQUESTS, mode="independent", previous=independent)
    for wrong in (
        {"steps": 0},
        {"learning_rate": -1.0},
        {"memory": "text"},
        {"memory": (" ",)},
        {"activation": "tanh"},
        {"edited_layer": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TPatcherConfig(**{"edited_modules": "h.{i}.x", "edited_layer": 1, **wrong})  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"output of model\.layers\.3\.mlp is not finite for request 0"):
        editor.edit(model, tiny_tokenizer, REQUESTS)


class BareBlocks(nn.Module):
    """A decoder whose block holds its FFN's projections itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(2, 3), "fc2": nn.Linear(3, 2)})])
