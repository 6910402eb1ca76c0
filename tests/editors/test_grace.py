"""GRACE: the codebook's rules, exact deferral outside of every ball, and what every editor promises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
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

from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.capture import NonFiniteError, case_losses, target_logits
from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import IGNORED, encode_requests
from ibke_hf.editors.grace import Codebooks, GRACEConfig, GRACEEdit, GRACEEditor

OTHERS = (EditRequest("Oslo lies on the river", "Thames"), EditRequest("iron works in physics; Berlin", "is"))
near = {"rtol": 1e-5, "atol": 1e-5}


def inputs_of(model: Any, name: str, ids: Any) -> Any:
    """Input of a layer for token ids (b, l)."""
    seen = []
    handle = modules_to_edit(model, [name])[name].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module", params=FAMILIES)
def joint(request: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    """A model of each family, what it was before, and its joint edit."""
    model = tiny_model(request.param)
    with torch.inference_mode():
        make = partial(GRACEEditor.for_backbone(model).edit, model, tiny_tokenizer, REQUESTS)
        return edited(model, tiny_tokenizer, make, [*REQUESTS, *OTHERS])


@pytest.fixture(scope="module")
def independent(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    """A model, its editor and its independent edits; nobody changes them."""
    model = tiny_model("qwen3")
    editor = GRACEEditor.for_backbone(model)
    return SimpleNamespace(
        model=model, editor=editor, edit=editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    )


def test_the_model_answers_and_is_untouched(joint: SimpleNamespace, tiny_tokenizer: Any) -> None:
    require_answers_and_no_trace(joint, tiny_tokenizer)


def test_prompts_outside_every_ball_are_bit_identical(joint: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model, memory = joint.model, joint.edit.memory
    edit = GRACEEdit(
        {**memory, "radii": torch.where(memory["radii"] > 0, 0.1 * memory["radii"], -1.0)}, joint.edit.settings
    )
    ids = encode_requests(tiny_tokenizer, OTHERS).input_ids[1:]
    queries = inputs_of(model, edit.settings["module"], ids)
    assert (torch.cdist(queries, edit.memory["keys"]) > edit.memory["radii"]).all()
    inside = encode_requests(tiny_tokenizer, REQUESTS[:1])
    with torch.no_grad():
        before, before_inside = model(ids).logits, target_logits(model, inside)[0]
        with edit.attached(model):
            assert torch.equal(model(ids).logits, before)
            assert not torch.equal(target_logits(model, inside)[0], before_inside)


def test_lookup_equals_a_naive_one() -> None:
    from ibke_hf.editors.grace.codebook import _lookup

    generator = torch.Generator().manual_seed(0)
    for number in (1, 3):
        keys, values = torch.randn(number, 4, 6, generator=generator), torch.randn(number, 4, 5, generator=generator)
        radii = torch.tensor([2.5, 3.0, 2.0, -1.0]).repeat(number, 1)
        x, y = torch.randn(3, 7, 6, generator=generator), torch.randn(3, 7, 5, generator=generator)
        outputs, seen = _lookup(keys, values, radii)(x, y), 0
        for b in range(3):
            book = b if number > 1 else 0
            for token in range(7):
                distances = [float((x[b, token] - key).norm()) for key in keys[book, :3]]
                best = min(range(3), key=distances.__getitem__)
                inside = distances[best] < radii[book, best]
                seen += inside
                assert torch.equal(outputs[b, token], values[book, best] if inside else y[b, token])
        assert 0 < seen < 21


def test_the_rules_of_the_codebook() -> None:
    books = Codebooks.blank("h.0.x", 1, (2, 3), torch.device("cpu"))
    books.reserve(5)
    rome, oslo = torch.tensor([7, 8]), torch.tensor([9])
    radii = books.memory["radii"][0]
    assert books.file(0, torch.tensor([10.0, 0.0]), rome, 0.1) == (0, True)  # the first one
    assert books.file(0, torch.tensor([0.0, 10.0]), rome, 0.1) == (1, True)  # far away: added
    assert books.file(0, torch.tensor([10.0, 1.5]), rome, 0.1) == (0, False)  # near, same target: expanded
    assert radii[0] == pytest.approx(1.5, rel=0.02)
    assert radii[0] > 1.5
    assert books.file(0, torch.tensor([10.0, 0.5]), rome, 0.1) == (0, False)  # a ball does not shrink
    assert radii[0] > 1.5
    assert books.file(0, torch.tensor([0.0, 11.0]), oslo, 0.1) == (2, True)  # near, another target: split half-way
    assert radii[1:3].tolist() == pytest.approx([0.5, 0.5])
    assert books.file(0, torch.tensor([0.0, 10.01]), oslo, 0.1) == (
        1,
        True,
    )  # the same key, another target: the later wins
    assert books.memory["targets"][0, 1].tolist() == [9, IGNORED]
    books.trim()
    assert books.edit().entries == [3]
    assert books.memory["keys"].shape == (1, 3, 2)


def test_one_value_for_the_last_prompt_token_or_more_for_mistakes(
    independent: SimpleNamespace, tiny_tokenizer: Any
) -> None:
    model, more = independent.model, independent.edit
    editor = GRACEEditor.for_backbone(model, key_tokens="prompt", steps=1)
    prompt_only = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert prompt_only.entries == [1, 1, 1]
    for row, request in enumerate(REQUESTS):
        ids = torch.tensor([tiny_tokenizer(request.prompt)["input_ids"]])
        torch.testing.assert_close(
            prompt_only.memory["keys"][row, 0], inputs_of(model, prompt_only.settings["module"], ids)[0, -1], **near
        )
    assert len(more) == 3
    assert max(more.entries) > 1
    torch.testing.assert_close(more.memory["keys"][:, 0], prompt_only.memory["keys"][:, 0])


def test_a_value_whose_request_is_done_is_left_alone(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Adam's momentum would move it on: jointly, it ends where it ends when it is edited alone."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        losses = case_losses(*target_logits(model, encode_requests(tiny_tokenizer, REQUESTS)))
    easy, hard = (REQUESTS[int(losses.argmin())], REQUESTS[int(losses.argmax())])
    stop = float(losses.min()) * 0.9
    editor = GRACEEditor.for_backbone(model, steps=40, key_tokens="prompt", stop_loss=stop, learning_rate=0.1)
    alone = editor.edit(model, tiny_tokenizer, [easy])
    joint = editor.edit(model, tiny_tokenizer, [easy, hard])
    torch.testing.assert_close(joint.memory["values"][:, :1], alone.memory["values"], rtol=1e-3, atol=1e-4)


def test_generation_with_a_cache_finds_the_same_entries(independent: SimpleNamespace, tiny_tokenizer: Any) -> None:
    require_generation(independent.model, tiny_tokenizer, independent.edit)
    require_a_row_for_each(independent.model, tiny_tokenizer, independent.edit)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_company_and_padding_do_not_change_an_edit(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    editor = GRACEEditor.for_backbone(model, steps=8)
    together = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        entries = alone.entries[0]
        assert together.entries[row] == entries
        for name in ("keys", "values", "radii"):
            scale = max(1.0, float(alone.memory[name].abs().max()))
            torch.testing.assert_close(
                together.memory[name][row, :entries] / scale, alone.memory[name][0] / scale, rtol=0, atol=1e-5
            )
    require_the_same_from_either_side(model, tiny_tokenizer, together)


def test_sequential_edits_go_on_from_the_codebook_before(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    editor = GRACEEditor.for_backbone(model)
    sequential = editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")
    assert hits(model, tiny_tokenizer, sequential) == [True] * 3
    first = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    assert editor.edit(model, tiny_tokenizer, REQUESTS[1:], mode="sequential", previous=first) == sequential
    changed = EditRequest(REQUESTS[0].prompt, "Oslo")
    later = editor.edit(model, tiny_tokenizer, [changed], previous=sequential)
    assert hits(model, tiny_tokenizer, later, [changed, *REQUESTS]) == [True, False, True, True]
    assert hits(model, tiny_tokenizer, sequential) == [True] * 3  # values do not change
    spread = editor.edit(model, tiny_tokenizer, [changed, changed, changed], mode="independent", previous=sequential)
    assert len(spread) == 3
    assert spread[1] == spread[2]
    again = editor.edit(model, tiny_tokenizer, [REQUESTS[0]], previous=sequential)
    assert again == sequential  # the same prompt and target: nothing to write


def test_saved_codebooks_come_back_bit_for_bit(
    independent: SimpleNamespace, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, edit = independent.model, independent.edit
    require_it_comes_back(edit, tmp_path, model, tiny_tokenizer)
    half = edit.to(torch.bfloat16)
    assert half.memory["targets"].dtype == torch.long
    assert half.nbytes < edit.nbytes
    with pytest.raises(BackboneError, match="maps 64 to 32"), edit.attached(tiny_model("qwen3", intermediate_size=64)):
        pass
    (tmp_path / "edit.json").write_text((tmp_path / "edit.json").read_text().replace('"module"', '"modul"'))
    with pytest.raises(AdapterError, match="not a grace edit"):
        GRACEEdit.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="codebook has keys"):
        GRACEEdit({**edit.memory, "radii": edit.memory["radii"].unsqueeze(-1)}, edit.settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_edited_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.1).to(dtype)
    edit = GRACEEditor.for_backbone(model, loss_scale=64.0).edit(model, tiny_tokenizer, REQUESTS)
    assert all(edit.memory[name].dtype == torch.float32 for name in ("keys", "values", "radii"))
    assert hits(model, tiny_tokenizer, edit) == [True] * 3


def test_two_threads_do_not_see_each_others_codebook(independent: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model, requests = independent.model, [EditRequest(REQUESTS[0].prompt, target) for target in ("Rome", "Oslo")]
    edits = [independent.edit[0], independent.editor.edit(model, tiny_tokenizer, requests[1:])]

    def ask(index: int, together: threading.Barrier) -> list[bool]:
        batch = encode_requests(tiny_tokenizer, [requests[index]])
        with torch.no_grad(), edits[index].attached(model):
            together.wait()
            return [
                bool((logits.argmax(-1) == labels).all())
                for logits, labels in (target_logits(model, batch) for _ in range(5))
            ]

    assert in_two_threads(ask) == [[True] * 5, [True] * 5]


def test_refusals(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = GRACEEditor.for_backbone(model, layers=[1], steps=2)
    assert editor.config.module == "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match="one layer"):
        GRACEEditor.for_backbone(model, layers=[1, 2])
    with pytest.raises(BackboneError, match="no linear layer named"):
        GRACEEditor(GRACEConfig("h.{i}.x", 1)).edit(model, tiny_tokenizer, REQUESTS)
    independent = require_common_refusals(editor, model, tiny_tokenizer)
    with pytest.raises(
        ValueError, match=r"beside model\.layers\.2\.mlp\.down_proj, previous is one of model\.layers\.1"
    ):
        GRACEEditor.for_backbone(model, layers=[2]).edit(
            model, tiny_tokenizer, REQUESTS, mode="independent", previous=independent
        )
    for wrong in (
        {"steps": 0},
        {"learning_rate": -1.0},
        {"initial_radius": 0.0},
        {"key_tokens": "all"},
        {"edited_layer": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GRACEConfig(**{"edited_modules": "h.{i}.x", "edited_layer": 1, **wrong})  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"output of model\.layers\.1\.mlp\.down_proj is not finite for request 0"
    ):
        editor.edit(model, tiny_tokenizer, REQUESTS)
