"""SERAC: a memory of requests, a classifier of their scope, and a counterfactual model that answers what is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_edits import FAMILIES, REQUESTS, in_two_threads, require_a_row_for_each
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.capture import target_logits
from ibke_hf.core.edits import Edit
from ibke_hf.core.layers import BackboneError
from ibke_hf.core.records import EditCase, EditRecord, EditRequest
from ibke_hf.core.tokens import IGNORED, RequestError, encode_requests, pad_and_label
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.serac import SERACConfig, SERACEdit, SERACEditor, memory_of
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.training.serac import entries_of

OTHERS = (EditRequest("A sparrow is", "tree"), EditRequest("Berlin and Madrid are cities in", "Europe"))
near = {"rtol": 1e-4, "atol": 1e-4}


class Exact(SERACEditor):
    """Decides by the tokens themselves: a position is in scope of a request whose prompt its prefix begins with."""

    def scopes(self, embedded: Any, requests: Any, cases: Any) -> Tensor:
        rows = []
        for case, column in (cases.labels != IGNORED).nonzero().tolist():
            prefix = cases.input_ids[case, : column + 1][cases.attention_mask[case, : column + 1].bool()].tolist()
            rows.append(
                [
                    10.0 if prefix[: self.starts[tuple(ids)]] == ids[: self.starts[tuple(ids)]] else -10.0
                    for ids in requests
                ]
            )
        return torch.tensor(rows)


def exact(model: Any, tokenizer: Any, *more: EditRequest, **config: Any) -> Any:
    torch.manual_seed(0)
    editor = Exact.for_backbone(model, **config).eval()
    every = [*REQUESTS, *OTHERS, replace(REQUESTS[0], target="Oslo"), *more]
    editor.starts = {}
    for request in every:
        batch = encode_requests(tokenizer, [request])
        ids = [*batch.input_ids[0].tolist(), int(batch.labels[0, -1])]
        editor.starts[tuple(ids)] = len(ids) - int((batch.labels != IGNORED).sum())
    return editor


def answers(model: Any, tokenizer: Any, requests: Any = REQUESTS, side: str = "left") -> Tensor:
    batch = encode_requests(tokenizer, requests, side=side)  # type: ignore[arg-type]
    with torch.no_grad():
        logits, labels = target_logits(model, batch)
    return logits[labels != IGNORED]


def counterfactual(editor: Any, tokenizer: Any, request: EditRequest, asked: EditRequest) -> Tensor:
    """Logits of the counterfactual model at the target of `asked` after `request`, one row, no padding."""
    both = [encode_requests(tokenizer, [r]) for r in (request, asked)]
    first = [*both[0].input_ids[0].tolist(), int(both[0].labels[0, -1]), editor.config.separator]
    ids, number = [*first, *both[1].input_ids[0].tolist()], int((both[1].labels != IGNORED).sum())
    with torch.no_grad():
        return editor.counterfactual(torch.tensor([ids])).logits[0, -number:]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_scope_the_counterfactual_model_answers_out_of_scope_not_a_bit_changes(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = exact(model, tiny_tokenizer)
    asked = [OTHERS[0], REQUESTS[1], OTHERS[1]]
    batch = encode_requests(tiny_tokenizer, asked)
    with torch.no_grad():
        before = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
        for mode in ("joint", "sequential"):
            edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode=mode)
            assert isinstance(edit, Edit)
            with edit.attached(model):
                after = model(
                    batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
                ).logits
            assert torch.equal(before[[0, 2]], after[[0, 2]])
            expected = counterfactual(editor, tiny_tokenizer, REQUESTS[1], REQUESTS[1])
            torch.testing.assert_close(after[1, -len(expected) :], expected, **near)
            first = int((batch.labels[1] != IGNORED).nonzero()[0])
            assert torch.equal(
                before[1, :first], after[1, :first]
            )  # before the prompt is complete nothing is in scope
        with edit.attached(model):
            assert torch.equal(model(batch.input_ids[:1]).logits, model(batch.input_ids[:1]).logits)
            untouched = model(
                batch.input_ids[:1], attention_mask=batch.attention_mask[:1], position_ids=batch.position_ids[:1]
            )
        assert torch.equal(
            untouched.logits,
            model(
                batch.input_ids[:1], attention_mask=batch.attention_mask[:1], position_ids=batch.position_ids[:1]
            ).logits,
        )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("form", ["embedding", "cross"])
def test_batches_and_padding_change_no_answer(form: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    torch.manual_seed(0)
    editor = SERACEditor.for_backbone(model, scope_form=form, threshold=0.0).eval()
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    with edit.attached(model):
        left, right = answers(model, tiny_tokenizer), answers(model, tiny_tokenizer, side="right")
    torch.testing.assert_close(left, right, **near)
    alone = []
    for request in REQUESTS:
        with editor.edit(model, tiny_tokenizer, [request]).attached(model):
            alone.append(answers(model, tiny_tokenizer, [request]))
    torch.testing.assert_close(left, torch.cat(alone), **near)
    with edit.attached(model, rows=torch.tensor([1, 2, 1])):
        chosen = answers(model, tiny_tokenizer, [REQUESTS[1], REQUESTS[2], OTHERS[0]])
    torch.testing.assert_close(chosen[: len(alone[1]) + len(alone[2])], torch.cat(alone[1:]), **near)
    require_a_row_for_each(model, tiny_tokenizer, edit)


@pytest.mark.parametrize("form", ["embedding", "cross"])
def test_scopes_are_causal_and_of_pairs(form: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    editor = SERACEditor.for_backbone(tiny_model("gpt2"), scope_form=form).eval()
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    requests = [ids for ids, _ in entries_of(batch)]
    with torch.no_grad():
        scores = editor.scopes(editor.embed_requests(requests), requests, batch)
        position = 0
        for row in range(len(REQUESTS)):
            ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            for end in range(len(ids) - int((batch.labels[row] != IGNORED).sum()) + 1, len(ids) + 1):
                prefix = replace(
                    batch[row : row + 1],
                    input_ids=torch.tensor([ids[:end]]),
                    attention_mask=torch.ones(1, end).long(),
                    labels=torch.tensor([[IGNORED] * (end - 1) + [0]]),
                )
                one = editor.scopes(editor.embed_requests(requests[1:2]), requests[1:2], prefix)
                torch.testing.assert_close(scores[position, 1:2], one[0], **near)
                position += 1
        assert position == len(scores)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_the_decision_of_the_prompt(
    beams: int, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    editor = exact(model, tiny_tokenizer, counterfactual=tiny_model("qwen3", seed=3))
    edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    asked = [REQUESTS[1].prompt, OTHERS[0].prompt]
    prompts = [tiny_tokenizer(prompt)["input_ids"] for prompt in asked]
    batch = pad_and_label([([*ids, 0], len(ids)) for ids in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 1, "eos_token_id": None}
    with torch.no_grad():
        unedited = model.generate(batch.input_ids[1:][:, batch.attention_mask[1] > 0], **options)[0, -6:]
        with edit.attached(model):
            tokens = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)[:, -6:]
        assert tokens[1].tolist() == unedited.tolist()
        first = [*encode_one(tiny_tokenizer, REQUESTS[1]), editor.config.separator, *prompts[0]]
        expected = editor.counterfactual.generate(torch.tensor([first]), **options)[0, -6:]
    assert tokens[0].tolist() == expected.tolist()


def encode_one(tokenizer: Any, request: EditRequest) -> list[int]:
    return tokenizer(f"{request.prompt} {request.target}")["input_ids"]


def test_two_threads_never_see_each_others_memory(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    editor = exact(model, tiny_tokenizer, counterfactual=model)
    edits = [editor.edit(model, tiny_tokenizer, [replace(REQUESTS[0], target=target)]) for target in ("Rome", "Oslo")]
    ids = torch.tensor([tiny_tokenizer(REQUESTS[0].prompt)["input_ids"]])

    def generated(edit: Any) -> str:
        with torch.no_grad(), edit.attached(model):
            return str(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1).tolist())

    alone = [generated(edit) for edit in edits]
    assert alone[0] != alone[1]
    assert in_two_threads(lambda k, _: {generated(edits[k]) for _ in range(3)}) == [{alone[0]}, {alone[1]}]


def test_the_newest_request_of_a_prompt_counts(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = exact(model, tiny_tokenizer)
    first = editor.edit(model, tiny_tokenizer, REQUESTS)
    again = replace(REQUESTS[0], target="Oslo")
    second = editor.edit(model, tiny_tokenizer, [again], mode="sequential", previous=first)
    assert [len(row) for row in second.entries()] == [3]
    assert second.info.requests == (*REQUESTS, again)  # of all that it contains
    with second.attached(model):
        logits = answers(model, tiny_tokenizer, [again])
    torch.testing.assert_close(logits, counterfactual(editor, tiny_tokenizer, again, again), **near)
    rows = editor.edit(model, tiny_tokenizer, OTHERS, mode="independent", previous=second)
    assert [len(row) for row in rows.entries()] == [4, 4]


def test_of_two_requests_that_fit_equally_well_the_newer_answers(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    shorter = EditRequest("The capital of France", "in")  # in scope of it is also what goes on from it
    editor = exact(model, tiny_tokenizer, shorter)
    for pair in ((shorter, REQUESTS[0]), (REQUESTS[0], shorter)):
        edit = editor.edit(model, tiny_tokenizer, pair)
        with edit.attached(model):
            logits = answers(model, tiny_tokenizer, REQUESTS[:1])
        torch.testing.assert_close(logits, counterfactual(editor, tiny_tokenizer, pair[1], REQUESTS[0]), **near)


def test_a_generation_is_decided_at_the_end_of_the_prompt_whichever_logits_are_asked_for(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    editor = exact(model, tiny_tokenizer)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    prompt = tiny_tokenizer(REQUESTS[0].prompt, return_tensors="pt").input_ids
    with torch.no_grad(), edit.attached(model):
        cache = model(prompt, use_cache=True, logits_to_keep=torch.tensor([0])).past_key_values
        after = model(torch.tensor([[5]]), past_key_values=cache).logits
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        before = model(torch.tensor([[5]]), past_key_values=cache).logits
    assert not torch.equal(after, before)


def test_memories_save_and_load_and_editors_too(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    torch.manual_seed(0)
    editor = SERACEditor.for_backbone(model, scope=model, counterfactual=model, threshold=0.0).eval()
    assert torch.equal(editor.counterfactual.lm_head.weight, model.lm_head.weight)
    assert torch.equal(editor.scope.h[0].mlp.c_proj.weight, model.transformer.h[0].mlp.c_proj.weight)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    edit.save_pretrained(tmp_path / "edit")
    editor.save_pretrained(tmp_path / "editor")
    loaded_editor = AutoModel.from_pretrained(tmp_path / "editor").eval()
    assert type(loaded_editor) is SERACEditor
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "editor"), SERACConfig)
    assert {n: t.shape for n, t in loaded_editor.state_dict().items()} == {
        n: t.shape for n, t in editor.state_dict().items()
    }
    loaded = SERACEdit.from_pretrained(tmp_path / "edit", editor=loaded_editor)
    assert loaded == edit
    with edit.attached(model):
        mine = answers(model, tiny_tokenizer)
    with loaded.attached(model):
        assert torch.equal(answers(model, tiny_tokenizer), mine)
    assert edit.nbytes == sum(tensor.nbytes for tensor in edit.memory.values())
    assert edit.to(torch.bfloat16) == edit
    assert edit.select([2, 0])[1] == edit[0]
    with (
        pytest.raises(ValueError, match="loaded without the editor"),
        SERACEdit.from_pretrained(tmp_path / "edit").attached(model),
    ):
        pass
    (tmp_path / "edit" / "edit.json").write_text(
        (tmp_path / "edit" / "edit.json").read_text().replace('"serac"', '"other"')
    )
    with pytest.raises(AdapterError, match="of kind 'other'"):
        SERACEdit.from_pretrained(tmp_path / "edit")


def test_evaluation_takes_it(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = exact(model, tiny_tokenizer, scope=model, counterfactual=model)
    local = EditCase(OTHERS[0].prompt, OTHERS[0].target, name="loc")
    records = [EditRecord(f"r{k}", "made", "art", (request,), (), (local,)) for k, request in enumerate(REQUESTS)]
    summary = evaluate_records(editor, model, tiny_tokenizer, records, progress=False).summary
    assert summary["locality"] == 100.0


def test_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = exact(model, tiny_tokenizer)
    with pytest.raises(RequestError, match="request 1: the target is empty"):
        editor.edit(model, tiny_tokenizer, [REQUESTS[0], EditRequest("a", " ")])
    with pytest.raises(RequestError, match="no edit request"):
        editor.edit(model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="mode must be one of"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="all")
    with pytest.raises(ValueError, match="edits no layer"):
        SERACEditor.for_backbone(model, [1])
    with pytest.raises(BackboneError, match="predicts 300 tokens"):
        SERACEditor.for_backbone(model, scope=tiny_model("gpt2", vocab_size=300))
    with pytest.raises(BackboneError, match="320 tokens; the given model has 300"):
        editor.edit(tiny_model("gpt2", vocab_size=300), tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match="names no scope_model"):
        SERACEditor(SERACConfig())
    for name, value in {"scope_form": "none", "threshold": 1.5, "embedding_dim": 0, "separator": -1}.items():
        with pytest.raises(Exception, match=name):
            SERACConfig(**{name: value})
    tuned = FineTuningEditor.for_backbone(model, steps=1).edit(model, tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match=r"must be a memory of SERAC.*DenseEdit"):
        editor.edit(model, tiny_tokenizer, REQUESTS, previous=tuned)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match=r"3 independent edits, here it must hold 1"):
        editor.edit(
            model,
            tiny_tokenizer,
            REQUESTS[:1],
            previous=editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent"),
        )
    ids = torch.tensor([[5, 6, 7]])
    with edit.attached(model), torch.no_grad():
        with pytest.raises(ValueError, match="needs token ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(ValueError, match="without labels"):
            model(ids, labels=ids)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with edit.attached(model), pytest.raises(ValueError, match="around the whole generation"):
            model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="needs ids"):
        SERACEdit({"ids": memory_of([[([1, 2], 1)]])["ids"]})
