"""The ROME baseline: subjects, prefixes, the search for the value, and the rank-one edit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ibke_hf.core.capture import NonFiniteError, target_logits
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, TokenBatch, encode_requests
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.locate.key_statistics import KeyStatistics
from ibke_hf.editors.locate.prefixes import draw_prefixes
from ibke_hf.editors.locate.search import ValueSearch
from ibke_hf.editors.locate.states import read_states
from ibke_hf.editors.locate.texts import SubjectTexts, ask, subject_end
from ibke_hf.editors.rome import ROMEConfig, ROMEEditor, rank_one_update

FAMILIES = ("gpt2", "gptj", "qwen3", "llama", "gemma")
# short ways from the subject to the target, of one token each: random models pass little on from token to token
REQUESTS = (
    EditRequest("The capital of France", "is", "France"),
    EditRequest("In physics, Marie Curie", "the", "Marie Curie"),
    EditRequest("An oak", "and", "oak"),
)
TEXTS = [
    f"{name} {what} {place}."
    for name in ("Paris", "Marie Curie", "A sparrow", "The author", "iron")
    for what in ("is in", "was born in", "lies on", "wrote", "of")
    for place in ("France", "a tree", "Europe")
]
near = {"rtol": 1e-4, "atol": 1e-4}


def setting(
    tiny_model: Callable[..., Any], tokenizer: Any, family: str = "qwen3", **config: Any
) -> tuple[Any, ROMEEditor]:
    """A model that edits are easy in, with an editor of its second layer."""
    model = tiny_model(family, initializer_range=0.15)
    statistics = KeyStatistics.of(model, tokenizer, TEXTS, [1], progress=False)
    settings = {
        "prefixes": 2,
        "prefix_tokens": (2, 4),
        "prefix_source": "corpus",
        "clamp": 50.0,
        "steps": 30,
        "kl_factor": 0.0,
    }
    return model, ROMEEditor.for_backbone(model, statistics=statistics, **{**settings, **config})


def hits(model: Any, tokenizer: Any, edit: Any, requests: Any = REQUESTS) -> list[bool]:
    """Whether every target token is the top prediction, for each request."""
    with torch.no_grad(), edit.attached(model):
        logits, labels = target_logits(model, encode_requests(tokenizer, requests))
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).tolist()


# --- the edit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_maps_the_key_to_the_value_by_a_rank_one_update_and_the_model_answers(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    original = target_logits(model, batch)[0].detach()
    changes: list[torch.Tensor] = []
    run = ValueSearch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueSearch, "run", lambda search, *sizes: changes.append(run(search, *sizes)) or changes[-1])
        edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert edit.ranks == dict.fromkeys(edit.layers, 1)
    assert all(hits(model, tiny_tokenizer, edit))
    modules = modules_to_edit(model, editor.config.module_names())
    ((name, _),) = modules.items()
    prefixes = draw_prefixes(model, tiny_tokenizer, editor.config, editor.statistics.openings)
    texts = ask(tiny_tokenizer, REQUESTS, prefixes, "{} is a", 128)
    unedited = read_states(model, modules, texts.requests, [], 100)[name]
    edited = read_states(model, modules, texts.requests, [edit], 100)[name]
    torch.testing.assert_close(edited.inputs, unedited.inputs, **near)
    torch.testing.assert_close(edited.outputs, unedited.outputs + changes[0], rtol=1e-3, atol=1e-3)  # v* = W k* + δ
    for row in range(3):
        torch.testing.assert_close(unedited.inputs[row] @ edit[row].weight_update(name), changes[0][row], **near)
        singular = torch.linalg.svdvals(edit[row].weight_update(name))
        assert singular[1] < 1e-5 * singular[0]
    assert torch.equal(target_logits(model, batch)[0], original)
    assert all(
        torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_update_is_the_papers_and_the_smallest_that_maps_several_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, change = torch.randn(1, 2, 6, generator=generator), torch.randn(1, 2, 4, generator=generator)
    root = torch.randn(6, 6, generator=generator)
    moment = root @ root.T + torch.eye(6)
    factor = torch.linalg.cholesky(moment)
    inputs, outputs = rank_one_update(keys[:, :1], change[:, :1], factor)
    weighed = torch.linalg.solve(moment, keys[0, 0])  # C⁻¹k*
    torch.testing.assert_close(
        inputs[0].T @ outputs[0], torch.outer(weighed, change[0, 0]) / (weighed @ keys[0, 0]), **near
    )
    inputs, outputs = rank_one_update(keys, change, factor)
    update = inputs[0].T @ outputs[0]
    torch.testing.assert_close(keys[0] @ update, change[0], **near)
    other = update + (torch.eye(6) - torch.linalg.pinv(keys[0]) @ keys[0]) @ torch.randn(
        6, 4, generator=generator
    )  # fits as well
    torch.testing.assert_close(keys[0] @ other, change[0], **near)
    assert (update.T @ moment @ update).trace() < (other.T @ moment @ other).trace()
    inputs, outputs = rank_one_update(keys[:, [0, 0]], change, factor)
    torch.testing.assert_close(
        keys[0, 0] @ inputs[0].T @ outputs[0], change[0].mean(0), **near
    )  # alike keys share the mean


def test_independent_edits_equal_edits_of_one_and_joint_and_sequential_edits_answer(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, stop_below=0.001, steps=15, learning_rate=1.0)
    independent = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    (name,) = independent.layers
    alone = [editor.edit(model, tiny_tokenizer, [request]) for request in REQUESTS]
    for row, request in enumerate(REQUESTS):
        torch.testing.assert_close(
            independent[row].weight_update(name), alone[row].weight_update(name), rtol=1e-3, atol=1e-4
        )
        assert alone[row].info.requests == (request,)
    joint = editor.edit(model, tiny_tokenizer, REQUESTS)
    assert joint.ranks[name] == 3
    assert all(hits(model, tiny_tokenizer, joint))
    sequential = editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")
    step = editor.edit(model, tiny_tokenizer, REQUESTS[1:], mode="sequential", previous=alone[0])
    torch.testing.assert_close(sequential.weight_update(name), step.weight_update(name), rtol=1e-3, atol=1e-4)
    assert sequential.ranks[name] == 3
    assert hits(model, tiny_tokenizer, sequential)[-1]
    assert sequential.info.requests == REQUESTS
    stacked = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent", previous=independent)
    assert stacked.ranks[name] == 2
    sequential.save_pretrained(tmp_path)
    assert LowRankEdit.from_pretrained(tmp_path) == sequential
    assert LowRankEdit.from_pretrained(tmp_path).info.requests == REQUESTS


def test_edits_work_in_generation_and_threads_do_not_see_each_other(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer)
    edits = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")

    def answer(row: int) -> list[int]:
        prompt = torch.tensor([tiny_tokenizer(REQUESTS[row].prompt)["input_ids"]])
        with edits[row].attached(model):
            return model.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :].tolist()

    alone = [answer(row) for row in range(3)]
    assert tiny_tokenizer.decode(alone[0]).startswith(" is")
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, [0, 1, 2] * 5)) == alone * 5
        first = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
        assert all(
            edit == first for edit in pool.map(lambda _: editor.edit(model, tiny_tokenizer, REQUESTS[:1]), range(2))
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_edited_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.15).to(dtype)
    statistics = KeyStatistics.of(model, tiny_tokenizer, TEXTS, [1], progress=False)
    editor = ROMEEditor.for_backbone(
        model, statistics=statistics, prefixes=0, clamp=50.0, steps=30, kl_factor=0.01, loss_scale=64.0
    )
    with torch.inference_mode():
        edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert all(tensor.dtype == torch.float32 for tensor in edit.tensors().values())
    assert all(hits(model, tiny_tokenizer, edit))


# --- the search for the value ---------------------------------------------------------------------------------------


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


# --- subjects and prefixes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("Is art part of the art Art Institute has", "Art Institute", "Is art part of the art Art Institute"),
        ("Romeo saw Rome in Romeo", "Rome", "Romeo saw Rome"),
        ("The IRON ore", "iron", "The IRON"),
        ("Paris or Paris", " Paris ", "Paris or Paris"),
        ("a (b)* c", "(b)*", "a (b)*"),
        ("unparis", "paris", "unparis"),
    ],
)
def test_the_subject_is_the_last_mention_as_whole_words(prompt: str, subject: str, text: str) -> None:
    assert prompt[: subject_end(EditRequest(prompt, "x", subject), "request 0")] == text


def test_subject_columns_hold_the_subjects_last_token(tiny_tokenizer: Any) -> None:
    texts = ask(tiny_tokenizer, REQUESTS, ["Où? 🏔. ", "Paris. "], "It is said: {} is a", 128)
    for asked in (texts.requests, texts.essences):
        columns = asked.columns()
        assert columns.sum(-1).tolist() == [1] * len(columns)
        for row, owner in enumerate(asked.owners.tolist()):
            last, first = int(columns[row].int().argmax()), int(asked.batch.attention_mask[row].argmax())
            upto = asked.batch.input_ids[row, first : last + 1]
            assert tiny_tokenizer.decode(upto).endswith(REQUESTS[owner].subject or "")


@pytest.mark.parametrize("source", ["model", "corpus"])
def test_prefixes_are_seeded(source: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, prefix_source=source, prefixes=8, prefix_tokens=(2, 5))
    state = torch.random.get_rng_state()
    prefixes = draw_prefixes(model, tiny_tokenizer, editor.config, TEXTS)
    assert prefixes == draw_prefixes(model, tiny_tokenizer, editor.config, TEXTS)
    assert prefixes != draw_prefixes(model, tiny_tokenizer, replace(editor.config, seed=1), TEXTS)
    assert 1 < len(prefixes) <= 8
    assert all(prefix.endswith(". ") and len(prefix) > 2 for prefix in prefixes)
    assert torch.equal(state, torch.random.get_rng_state())


def test_prefixes_that_do_not_fit_the_context_are_left_out(tiny_tokenizer: Any) -> None:
    length = len(tiny_tokenizer(f"{REQUESTS[0].prompt} {REQUESTS[0].target}")["input_ids"])
    asked = ask(
        tiny_tokenizer, REQUESTS[:1], ["of. ", "Paris is the capital of France. "], "{} is a", length + 4
    ).requests
    assert len(asked.batch) == 2
    with pytest.raises(RequestError, match=r"request 0: .* do not fit"):
        ask(tiny_tokenizer, REQUESTS[:1], ["of. "], "{} is a", length - 2)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_rome_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, steps=1)

    def edit(*requests: EditRequest, **options: Any) -> LowRankEdit:
        return editor.edit(model, tiny_tokenizer, requests or REQUESTS, **options)

    with pytest.raises(
        RequestError, match=r"request 1: it has no subject; pass EditRequest\(prompt, target, subject\)"
    ):
        edit(REQUESTS[0], EditRequest("a b", "c"))
    with pytest.raises(
        RequestError, match="request 0: the subject 'Spain' is not in the prompt 'The capital of France'"
    ):
        edit(replace(REQUESTS[0], subject="Spain"))
    with pytest.raises(RequestError, match="no edit request"):
        editor.edit(model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="mode must be one of"):
        edit(mode="all")
    several = edit(mode="independent")
    with pytest.raises(ValueError, match='needs mode="independent"'):
        edit(previous=several)
    with pytest.raises(ValueError, match="as many requests"):
        edit(*REQUESTS[:2], mode="independent", previous=several)
    with pytest.raises(ValueError, match="must be a LowRankEdit"):
        edit(previous=DenseEdit({several.layers[0]: torch.zeros(1, 48, 32)}))
    with pytest.raises(BackboneError, match="another backbone"):
        editor.edit(tiny_model("qwen3", seed=3), tiny_tokenizer, REQUESTS)
    with pytest.raises(BackboneError, match="no linear layer named"):
        editor.edit(tiny_model("gpt2"), tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match=r"lack model\.layers\.2"):
        ROMEEditor.for_backbone(model, [2], statistics=editor.statistics)
    few = KeyStatistics.of(model, tiny_tokenizer, ["Paris"], [1], progress=False)
    with pytest.raises(ValueError, match=r"is singular: .* raise ridge"):
        ROMEEditor.for_backbone(model, statistics=few, prefixes=0, steps=1, ridge=0.0).edit(
            model, tiny_tokenizer, REQUESTS
        )
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="request 0"):
        replaced = ROMEEditor(replace(editor.config, prefixes=0), editor.statistics)
        replaced.edit(model, tiny_tokenizer, REQUESTS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"edited_layers": ()},
        {"edited_layers": (1, 2)},
        {"edited_modules": "h.1.x"},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"clamp": -1.0},
        {"prefixes": -1},
        {"prefix_tokens": (0, 2)},
        {"prefix_tokens": (3, 2)},
        {"prefix_source": "web"},
        {"essence": "is a"},
        {"ridge": -1.0},
        {"kl_factor": -1.0},
        {"texts_at_once": 0},
    ],
)
def test_configs_name_the_field_that_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ROMEConfig(**{"edited_modules": "h.{i}.x", "edited_layers": (1,), **wrong})
