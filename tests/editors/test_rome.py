"""The ROME baseline: the rank-one edit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from located_edits import REQUESTS, TEXTS, hits, setting
from memory_edits import FAMILIES

from ibke_hf.core.capture import NonFiniteError, target_logits
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, encode_requests
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.locate.key_statistics import KeyStatistics
from ibke_hf.editors.locate.prefixes import draw_prefixes
from ibke_hf.editors.locate.search import ValueSearch
from ibke_hf.editors.locate.states import read_states
from ibke_hf.editors.locate.texts import ask
from ibke_hf.editors.rome import ROMEConfig, ROMEEditor, rank_one_update

near = {"rtol": 1e-4, "atol": 1e-4}


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


# --- refusals -------------------------------------------------------------------------------------------------------


def test_rome_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, steps=1)

    def edit(*requests: EditRequest, **options: Any) -> LowRankEdit:
        return editor.edit(model, tiny_tokenizer, requests or REQUESTS, **options)

    with pytest.raises(
        RequestError,
        match=r"request 1: it has no subject; pass EditRequest\(prompt, target, subject\), to `ibke edit` --subject",
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
