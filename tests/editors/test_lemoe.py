"""LEMoE: experts inserted beside an FFN, found by the keys that their edits leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_edits import (
    FAMILIES,
    REQUESTS,
    edited,
    in_two_threads,
    require_a_row_for_each,
    require_answers_and_no_trace,
    require_common_refusals,
)
from torch import Tensor

from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.capture import NonFiniteError, case_losses, target_logits
from ibke_hf.core.layers import BackboneError
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import IGNORED, encode_requests
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.lemoe import LEMoEConfig, LEMoEEdit, LEMoEEditor, anchors, clustered, unit

FAST = {"learning_rate": 0.1, "steps": 70}  # tiny models with random weights are hard to move
OTHERS = (EditRequest("A sparrow is", "tree"), EditRequest("Berlin and Madrid are cities in", "Europe"))


def answers(model: Any, tokenizer: Any, requests: Any = REQUESTS, side: str = "left") -> tuple[Tensor, Tensor]:
    """Logits at the target positions, and whether each is led by the target."""
    batch = encode_requests(tokenizer, requests, side=side)  # type: ignore[arg-type]
    with torch.no_grad():
        logits, labels = target_logits(model, batch)
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    return logits, logits.argmax(-1) == labels


@pytest.fixture(scope="module", params=FAMILIES)
def joint(request: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    """A model of each family, what it was before, and its joint edit."""
    model = tiny_model(request.param)
    return edited(
        model, tiny_tokenizer, lambda: LEMoEEditor.for_backbone(model, **FAST).edit(model, tiny_tokenizer, REQUESTS)
    )


def test_edits_succeed_and_leave_no_trace(joint: SimpleNamespace, tiny_tokenizer: Any) -> None:
    require_answers_and_no_trace(joint, tiny_tokenizer)
    assert joint.edit.experts == 1


def test_inputs_that_are_routed_nowhere_are_bit_identical(joint: SimpleNamespace, tiny_tokenizer: Any) -> None:
    model, edit = joint.model, replace(joint.edit, settings={**joint.edit.settings, "threshold": 0.99})
    mixed = encode_requests(tiny_tokenizer, [OTHERS[0], REQUESTS[1], OTHERS[1]])
    with torch.no_grad():
        before = model(mixed.input_ids, attention_mask=mixed.attention_mask).logits
        with edit.attached(model):
            after = model(mixed.input_ids, attention_mask=mixed.attention_mask).logits
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(("mode", "number", "experts"), [("sequential", 1, 3), ("independent", 3, 1)])
def test_edits_succeed_in_every_mode(
    mode: Any, number: int, experts: int, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    edit = LEMoEEditor.for_backbone(model, **FAST).edit(model, tiny_tokenizer, REQUESTS, mode=mode)
    assert (len(edit), edit.experts) == (number, experts)
    with edit.attached(model):
        assert answers(model, tiny_tokenizer)[1].all()


def test_routing_in_use_is_routing_in_training(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = LEMoEEditor.for_backbone(model, steps=2)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")
    module = {name: module for name, (module, _) in edit.hooks(model).items()}
    for k, request in enumerate(REQUESTS):
        batch = encode_requests(tiny_tokenizer, [request])
        with edit.attached(model):  # the values are those of the unedited model: no expert lies below
            values, _ = editor._values(model, module, batch, ["request 0"])
        judged = batch.labels != IGNORED
        assert torch.equal(edit.gates(values)[judged], torch.eye(3)[[k] * int(judged.sum())])
    shared = replace(edit, settings={**edit.settings, "top_k": 2, "threshold": 1e-3})
    gates = shared.gates(values)[judged]
    torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates)))
    assert ((gates > 0).sum(-1) <= 2).all()


def test_experts_before_are_frozen_and_the_newest_wins(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    quick = LEMoEEditor.for_backbone(model, steps=5)
    straight = quick.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")
    first = quick.edit(model, tiny_tokenizer, REQUESTS[:2], mode="sequential")
    second = quick.edit(model, tiny_tokenizer, REQUESTS[2:], previous=first)
    for name in straight.memory:
        torch.testing.assert_close(second.memory[name], straight.memory[name], rtol=0, atol=2e-5)
        assert torch.equal(second.memory[name][:, :2, : first.memory[name].shape[2]], first.memory[name])
    editor, changed = LEMoEEditor.for_backbone(model, **FAST), replace(REQUESTS[0], target="Oslo")
    again = editor.edit(model, tiny_tokenizer, [REQUESTS[0], REQUESTS[2], changed], mode="sequential")
    with again.attached(model):
        assert answers(model, tiny_tokenizer, [changed, REQUESTS[2]])[1].all()
    independent = quick.edit(model, tiny_tokenizer, REQUESTS[:2], mode="independent", previous=straight)
    assert (len(independent), independent.experts) == (2, 4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_change_no_edit(family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model(family)
    editor = LEMoEEditor.for_backbone(model, steps=5)
    together = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        row_edit = together[row]
        for name, tensor in alone.memory.items():
            expected = row_edit.memory[name][:, :, : tensor.shape[2]] if name == "keys" else row_edit.memory[name]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-5)
    with together.attached(model):
        left, _ = answers(model, tiny_tokenizer)
        right, _ = answers(model, tiny_tokenizer, side="right")
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    with together.attached(model, rows=torch.tensor([1, 1, 0])):
        swapped, _ = answers(model, tiny_tokenizer, [REQUESTS[1], OTHERS[0], REQUESTS[0]])
    with together[1].attached(model):
        one, _ = answers(model, tiny_tokenizer, REQUESTS[1:2])
    torch.testing.assert_close(swapped[: len(one)], one, rtol=1e-4, atol=1e-4)
    require_a_row_for_each(model, tiny_tokenizer, together)


def test_requests_are_clustered_in_joint_mode(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(3, 16, generator=generator))
    owners = [0, 1, 0, 2, 2, 1, 0]
    points = unit(centres[owners] + 0.1 * torch.randn(7, 16, generator=generator))
    assert clustered(points, 3) == [[0, 2, 6], [1, 5], [3, 4]]
    assert sorted(k for cluster in clustered(points, 7) for k in cluster) == list(range(7))
    assert clustered(points[:1].expand(4, -1), 3) == [[0, 1, 2, 3]]
    model = tiny_model("qwen3")
    edit = LEMoEEditor.for_backbone(model, edits_per_expert=2, **FAST).edit(
        model, tiny_tokenizer, (*REQUESTS, *OTHERS)
    )
    assert 2 <= edit.experts <= 3
    with edit.attached(model):
        assert answers(model, tiny_tokenizer, (*REQUESTS, *OTHERS))[1].all()


def test_experts_share_a_token_by_a_softmax_over_similarity_and_temperature() -> None:
    keys = torch.eye(4)[:3].reshape(1, 3, 1, 4)
    weights = {"down": (1, 3, 4, 2), "down_bias": (1, 3, 2), "up": (1, 3, 2, 4), "up_bias": (1, 3, 4)}
    memory = {"keys": keys, **{name: torch.zeros(shape) for name, shape in weights.items()}}
    settings = {"layer": "h", "top_k": 2, "threshold": 0.3, "temperature": 0.2}
    values = unit(torch.tensor([[[3.0, 2.0, 1.0, 0.0], [4.0, 1.0, 0.0, 0.0], [0.1, 0.0, 0.0, 4.0]]]))
    gates = LEMoEEdit(memory, settings).gates(values)
    shares = (values[0, 0, :2] / 0.2).softmax(-1)
    torch.testing.assert_close(gates[0, 0], torch.tensor([*shares.tolist(), 0.0]), rtol=0, atol=1e-3)  # the two best
    assert gates[0, 1].tolist() == [1.0, 0.0, 0.0]  # the others are below the threshold
    assert gates[0, 2].tolist() == [0.0, 0.0, 0.0]


def test_a_request_that_is_answered_well_enough_moves_its_expert_no_more(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Past the floor a louder answer is only louder elsewhere: an expert that starts below it stays zero."""
    model = tiny_model("qwen3")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.no_grad():
        losses = case_losses(*target_logits(model, batch))
    floor = float(losses.sort().values[:2].mean())  # one request is below it, two are above
    edit = LEMoEEditor.for_backbone(model, steps=3, loss_floor=floor).edit(
        model, tiny_tokenizer, REQUESTS, mode="independent"
    )
    moved = edit.memory["up"].flatten(1).abs().sum(-1) > 0
    assert moved.tolist() == (losses > floor).tolist()
    assert 0 < int(moved.sum()) < len(REQUESTS)


def test_anchors_are_the_judged_values() -> None:
    values, labels = torch.arange(12.0).view(2, 3, 2), torch.tensor([[IGNORED, 5, 6], [IGNORED, IGNORED, 7]])
    assert anchors(values, labels).tolist() == [[[2, 3], [4, 5]], [[10, 11], [0, 0]]]


def test_an_edit_is_a_value_that_saves_and_loads(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    edit = LEMoEEditor.for_backbone(model, steps=3).edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    edit.save_pretrained(tmp_path)
    loaded = LEMoEEdit.from_pretrained(tmp_path)
    assert loaded == edit
    assert loaded.info.requests == REQUESTS
    with edit.attached(model):
        mine, _ = answers(model, tiny_tokenizer)
    with loaded.attached(model):
        assert torch.equal(answers(model, tiny_tokenizer)[0], mine)
    assert edit.nbytes == sum(tensor.nbytes for tensor in edit.memory.values())
    assert edit.select([2, 0])[1] == edit[0]
    assert edit.to(torch.bfloat16).nbytes * 2 == edit.nbytes
    with pytest.raises(BackboneError, match="no linear layer named"), edit.attached(tiny_model("gpt2")):
        pass
    with (
        pytest.raises(BackboneError, match="made for another backbone"),
        edit.attached(tiny_model("llama", intermediate_size=40)),
    ):
        pass
    (tmp_path / "edit.json").write_text((tmp_path / "edit.json").read_text().replace('"lemoe"', '"other"'))
    with pytest.raises(AdapterError, match="of kind 'other'"):
        LEMoEEdit.from_pretrained(tmp_path)


def test_generation_and_threads(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = LEMoEEditor.for_backbone(model, **FAST)
    edits = editor.edit(model, tiny_tokenizer, [REQUESTS[0], replace(REQUESTS[0], target="Oslo")], mode="independent")
    ids = torch.tensor([tiny_tokenizer(REQUESTS[0].prompt)["input_ids"]])

    def generated(edit: LEMoEEdit, **options: Any) -> str:
        with edit.attached(model):
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options
            )
        return str(tiny_tokenizer.decode(tokens[0, ids.shape[1] :]))

    alone = [generated(edit) for edit in edits]
    assert alone[0].startswith(" Rome"), alone
    assert alone[1].startswith(" Oslo"), alone
    assert [generated(edit, use_cache=False) for edit in edits] == alone
    assert in_two_threads(lambda k, _: {generated(edits[k]) for _ in range(3)}) == [{alone[0]}, {alone[1]}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_edited_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.1).to(dtype)
    with torch.inference_mode():
        edit = LEMoEEditor.for_backbone(model, loss_scale=128.0, **FAST).edit(model, tiny_tokenizer, REQUESTS[:1])
    assert all(tensor.dtype == torch.float32 for tensor in edit.memory.values())
    with edit.attached(model):
        logits, hits = answers(model, tiny_tokenizer, REQUESTS[:1])
    assert logits.dtype == dtype
    assert hits.all()


def test_the_edited_model_can_be_differentiated(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    with torch.inference_mode():
        edit = LEMoEEditor.for_backbone(model, steps=2).edit(model, tiny_tokenizer, REQUESTS)
    with edit.attached(model):
        case_losses(*target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = LEMoEEditor.for_backbone(model, steps=1)
    with pytest.raises(BackboneError, match="beside one layer"):
        LEMoEEditor.for_backbone(model, [1, 2])
    with pytest.raises(BackboneError, match="no linear layer named"):
        LEMoEEditor(LEMoEConfig("h.1.x", 8)).edit(model, tiny_tokenizer, REQUESTS)
    for name, value in {
        "edited_module": "",
        "steps": 0,
        "learning_rate": -1.0,
        "top_k": 0,
        "routing_threshold": 0.0,
        "temperature": 0.0,
        "expert_width": 0,
        "edits_per_expert": 0,
        "loss_scale": 0.0,
        "loss_floor": -1.0,
    }.items():
        with pytest.raises(ValueError, match=name):
            LEMoEConfig(**{"edited_module": "h.1.x", "expert_width": 8, name: value})
    tuned = FineTuningEditor.for_backbone(model, steps=1).edit(model, tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match=r"must be an edit of LEMoE.*DenseEdit"):
        editor.edit(model, tiny_tokenizer, REQUESTS, previous=tuned)  # type: ignore[arg-type]
    rows = require_common_refusals(editor, model, tiny_tokenizer)
    wider = LEMoEEditor.for_backbone(model, steps=1, expert_width=12)
    with pytest.raises(ValueError, match="use the same editor"):
        wider.edit(model, tiny_tokenizer, REQUESTS, mode="independent", previous=rows)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="request 0"):
        editor.edit(model, tiny_tokenizer, REQUESTS)
