"""The search for the value that says the target, against a naive computation of its objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from located_edits import REQUESTS, setting
from torch.nn import functional

from ibke_hf.core.layers import modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import TokenBatch
from ibke_hf.editors.locate.search import ValueSearch
from ibke_hf.editors.locate.states import read_states
from ibke_hf.editors.locate.texts import SubjectTexts, ask

near = {"rtol": 1e-4, "atol": 1e-4}


def naive_objective(
    model: Any, tokenizer: Any, request: EditRequest, change: torch.Tensor, prefixes: list[str], module: Any
) -> torch.Tensor:
    """Eq. 4 one text at a time, δ added by a hook of its own."""

    def logits(ids: list[int], place: int, change: torch.Tensor) -> torch.Tensor:
        def add(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, place] += change
            return output

        handle = module.register_forward_hook(add)
        try:
            return model(torch.tensor([ids])).logits[0]
        finally:
            handle.remove()

    def subject_place(text: str, end: int) -> int:
        return len(tokenizer(text[:end])["input_ids"]) - 1

    losses = []
    for prefix in ("", *prefixes):
        prompt = prefix + request.prompt
        ids, start = tokenizer(f"{prompt} {request.target}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        place = subject_place(prompt, prompt.index(request.subject) + len(request.subject))
        losses.append(
            functional.cross_entropy(logits(ids[:-1], place, change)[start - 1 :], torch.tensor(ids[start:]))
        )
    text = f"{request.subject} is a"
    ids, place = tokenizer(text)["input_ids"], subject_place(text, len(request.subject))
    after, before = (logits(ids, place, d)[-1].log_softmax(-1) for d in (change, torch.zeros_like(change)))
    return torch.stack(losses).mean() + 0.5 * (after.exp() * (after - before)).sum()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_the_objective_and_its_gradient_equal_a_naive_computation(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, family)
    config = replace(editor.config, kl_factor=0.5, texts_at_once=4)
    prefixes = ["Paris is. ", "of the river in. "]
    texts = ask(tiny_tokenizer, REQUESTS, prefixes, config.essence, 128)
    ((_, module),) = modules_to_edit(model, config.module_names()).items()
    search = ValueSearch(model, module, texts, config, [], ["a", "b", "c"])
    change = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    search.objective(torch.zeros_like(change))
    losses, gradients = search.objective(change)
    for row, request in enumerate(REQUESTS):
        leaf = change[row].clone().requires_grad_(True)
        expected = naive_objective(model, tiny_tokenizer, request, leaf, prefixes, module)
        torch.testing.assert_close(losses[row], expected.detach(), **near)
        torch.testing.assert_close(gradients[row], torch.autograd.grad(expected, leaf)[0], **near)
    searched = torch.tensor([False, True, True])
    some_losses, some_gradients = search.objective(change, searched)
    torch.testing.assert_close(some_losses, losses * searched, **near)
    torch.testing.assert_close(some_gradients, gradients * searched.unsqueeze(1), **near)


def test_requests_that_are_done_are_asked_no_more(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer)
    modules = modules_to_edit(model, editor.config.module_names())
    texts = ask(tiny_tokenizer, REQUESTS, [], "{} is a", 128)
    state = read_states(model, modules, texts.requests, [], 9)[next(iter(modules))]
    search = ValueSearch(model, *modules.values(), texts, editor.config, [], ["a", "b", "c"])
    losses, _ = search.objective(torch.zeros(3, 32))
    search.config = replace(
        editor.config, stop_below=float(losses.sort().values[1]) + 1e-3
    )  # two of three are done from the start
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda *arguments: rows.append(len(arguments[2]["input_ids"])), with_kwargs=True
    )
    changes = search.run(state.norms, 32)
    handle.remove()
    assert rows[0] == 3
    assert set(rows[1:]) == {1}
    assert changes.any(-1).tolist() == (losses == losses.max()).tolist()


def test_the_change_stays_within_its_limit_and_zero_steps_of_a_done_request(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, clamp=0.5, steps=5)
    modules = modules_to_edit(model, editor.config.module_names())
    texts = ask(tiny_tokenizer, REQUESTS, [], "{} is a", 128)
    state = read_states(model, modules, texts.requests, [], 9)[next(iter(modules))]
    names = ["a", "b", "c"]
    change = ValueSearch(model, *modules.values(), texts, editor.config, [], names).run(state.norms, 32)
    assert (change.norm(dim=-1) <= 0.5 * state.norms * 1.0001).all()
    assert (change.norm(dim=-1) > 0.4 * state.norms).all()
    done = ValueSearch(model, *modules.values(), texts, replace(editor.config, stop_below=100.0), [], names).run(
        state.norms, 32
    )
    assert not done.any()


def test_weight_decay_holds_the_value_back(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a slope a, the objective a·δ + w (‖δ‖ / ‖h‖)² is least at δ = -a ‖h‖² / 2w; without decay nowhere."""
    model, editor = setting(tiny_model, tiny_tokenizer)
    modules = modules_to_edit(model, editor.config.module_names())
    texts = ask(tiny_tokenizer, REQUESTS[:1], (), "{} is a", 128)
    slope, norms = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0])
    monkeypatch.setattr(
        ValueSearch,
        "objective",
        lambda _, change, searched=None: (1000 + (change * slope).sum(-1), slope),  # never low enough to stop
    )
    for decay in (20.0, 80.0):
        config = replace(editor.config, weight_decay=decay, learning_rate=0.05, steps=300)
        change = ValueSearch(model, *modules.values(), texts, config, [], ["a"]).run(norms, 32)
        torch.testing.assert_close(change, -slope * norms**2 / (2 * decay), rtol=0.02, atol=0.02)


def test_the_key_is_weighed_by_the_covariance_of_the_corpus(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """ΔW's direction is C⁻¹k*, not k*: what the corpus' keys hold much of takes little of the change (Eq. 2)."""
    model, editor = setting(tiny_model, tiny_tokenizer, prefixes=0, steps=2, ridge=1e-2)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    modules = modules_to_edit(model, editor.config.module_names())
    ((name, _),) = modules.items()
    keys = read_states(model, modules, ask(tiny_tokenizer, REQUESTS, (), "{} is a", 128).requests, [], 9)[name].inputs
    moment = editor.statistics.moments[name].double()
    ridge = 1e-2 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    weighed = torch.linalg.solve(moment + ridge, keys.double().T).T.float()
    direction = edit.inputs[name].squeeze(1)
    assert functional.cosine_similarity(direction, weighed).min() > 0.999
    assert functional.cosine_similarity(direction, keys).max() < 0.9


def test_padding_side_and_batch_change_nothing(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, "gpt2")
    modules = modules_to_edit(model, editor.config.module_names())
    asked = ask(tiny_tokenizer, REQUESTS, ["Paris is a. "], "{} is a", 128).requests
    wider = TokenBatch(
        *(
            functional.pad(t, (7, 0), value=v)
            for t, v in ((asked.batch.input_ids, 5), (asked.batch.attention_mask, 0), (asked.batch.labels, -100))
        )
    )
    (name,) = modules
    expected = read_states(model, modules, asked, [], 100)[name]
    for other, size in ((SubjectTexts(wider, asked.subjects, asked.owners, 3), 100), (asked, 1), (asked, 4)):
        states = read_states(model, modules, other, [], size)[name]
        torch.testing.assert_close(states.inputs, expected.inputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.outputs, expected.outputs, rtol=1e-5, atol=1e-5)
    for row in range(3):
        torch.testing.assert_close(
            read_states(model, modules, asked.only(row), [], 9)[name].inputs[0],
            expected.inputs[row],
            rtol=1e-5,
            atol=1e-5,
        )


def test_what_is_read_is_the_mean_over_the_texts_of_a_request(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Also of the norm, which steps and limits are relative to: that of a mean of unlike states would be smaller."""
    model, editor = setting(tiny_model, tiny_tokenizer)
    modules = modules_to_edit(model, editor.config.module_names())
    (name,) = modules
    texts = ask(tiny_tokenizer, REQUESTS, ["Paris is a. ", "Marie Curie wrote. "], "{} is a", 128).requests
    state = read_states(model, modules, texts, [], 100)[name]
    alone = [
        read_states(model, modules, SubjectTexts(texts.batch[row], texts.subjects[row], texts.owners[:1], 1), [], 1)[
            name
        ]
        for row in (slice(row, row + 1) for row in range(len(texts.owners)))
    ]
    for request in range(len(REQUESTS)):
        its = [single for single, owner in zip(alone, texts.owners.tolist(), strict=True) if owner == request]
        assert len(its) == 3
        torch.testing.assert_close(state.outputs[request], torch.cat([one.outputs for one in its]).mean(0), **near)
        norms = torch.cat([one.outputs.norm(dim=-1) for one in its])
        torch.testing.assert_close(state.norms[request], norms.mean(), **near)
        assert state.norms[request] > 1.001 * state.outputs[request].norm()
