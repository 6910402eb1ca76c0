"""Evaluation against a naive reference written from PROTOCOL alone."""

from __future__ import annotations

import copy
import json
import random
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from naive import PLACES, RELATIONS, SHORT, Naive, OneAtATime, assert_same, make_hop, make_records, settings_of

from ibke_hf import EditCase, EditRecord, EditRequest
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import collides
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.evaluation import editing, judging, questions
from ibke_hf.evaluation.generation import generate_texts
from ibke_hf.evaluation.protocol import evaluate_records


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    return settings_of(tiny_model, tiny_tokenizer)


@pytest.mark.parametrize(
    ("family", "number", "most_requests", "options", "at_once"),
    [
        ("qwen3", 24, 1, {}, True),
        ("qwen3", 50, 3, {"batch_size": 19}, True),
        ("qwen3", 22, 3, {"sequential": 10}, True),
        ("qwen3", 8, 3, {"sequential": 4, "mode": "joint", "collision_scope": "group"}, True),
        ("qwen3", 8, 2, {"locality_match": "string", "batch_size": 1}, True),
        ("qwen3", 8, 2, {"sequential": 3}, False),
        ("gpt2", 10, 2, {"batch_size": 5}, True),
        ("gemma", 8, 1, {}, False),
    ],
)
def test_agrees_with_one_case_at_a_time(setting, family, number, most_requests, options, at_once):
    model, tokenizer, editor = setting(family)
    records = make_records(number, most_requests)
    evaluated = evaluate_records(
        editor if at_once else OneAtATime(editor), model, tokenizer, records, progress=False, **options
    )
    naive = Naive(editor, model, tokenizer, options.get("locality_match", "ids"))
    expected = naive.evaluate(
        records, options.get("sequential", 1), options.get("mode") == "joint", options.get("collision_scope", "set")
    )
    assert_same(evaluated.rows, expected)
    hops = sum(len(case.supporting) for record in records for case in record.generality)
    assert (
        0 < sum(row["edited_hops"] for row in evaluated.rows) < hops + (number < 20)
    )  # known and unknown hops both occur
    locality = sum(len(record.locality) for record in records)
    assert evaluated.skipped == {
        "locality case that collides with an edit": locality - sum(r["role"] == "locality" for r in expected)
    }
    assert any(row["before"] != row["after"] for row in evaluated.rows)
    assert evaluated.edit_seconds > 0


def test_edits_carried_at_once_are_bounded_without_changing_a_row(setting, monkeypatch):
    model, tokenizer, editor = setting()
    records = make_records(12, 2)
    expected = evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False)
    monkeypatch.setattr(editing, "CARRIED_BYTES", 1)
    assert_same(
        evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False).rows, list(expected.rows)
    )


def test_one_lot_of_questions_is_held_at_a_time(setting, monkeypatch):
    model, tokenizer, editor = setting()
    records, alive, most = make_records(30, 1), weakref.WeakValueDictionary(), []

    class Watched(questions.RecordQuestion):
        def __init__(self, *fields):
            super().__init__(*fields)
            alive[id(self)] = self
            most.append(len(alive))

    monkeypatch.setattr(questions, "RecordQuestion", Watched)
    evaluated = evaluate_records(editor, model, tokenizer, records, batch_size=3, generate=False, progress=False)
    sizes = [len(record.requests) + len(record.generality) + len(record.locality) for record in records]
    assert max(most) <= 2 * 3 * max(sizes) < len(evaluated.rows)  # the lot that is read while the last is still held


@pytest.mark.parametrize("room", [0, 20_000])
def test_unedited_logits_are_kept_within_their_bytes_without_changing_a_row(setting, monkeypatch, room):
    model, tokenizer, editor = setting()
    records = make_records(12, 2)
    expected = evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False)
    monkeypatch.setattr(judging, "LOGIT_BYTES", room)
    kept, predictions = [], judging.Judge.predictions

    def watched(self, *arguments):
        predicted = predictions(self, *arguments)
        kept.append(sum(p.logits.untyped_storage().nbytes() for p in predicted if p.logits is not None))
        return predicted

    monkeypatch.setattr(judging.Judge, "predictions", watched)
    evaluation = evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False)
    assert_same(evaluation.rows, list(expected.rows))
    assert max(kept) <= room and (max(kept) > 0) == (room > 0)


def test_dense_edits_are_made_and_copied_within_their_bytes_without_changing_a_row(setting, monkeypatch):
    model, tokenizer, _ = setting()
    editor = FineTuningEditor.for_backbone(model, steps=2)
    records = make_records(6, 1)
    expected = evaluate_records(editor, model, tokenizer, records, progress=False)
    one = editor.edit(model, tokenizer, records[0].requests[:1]).nbytes
    numbers, edit, select = [], FineTuningEditor.edit, DenseEdit.select

    def watched_edit(self, model, tokenizer, requests, **options):
        numbers.append(len(requests))
        return edit(self, model, tokenizer, requests, **options)

    def watched_select(self, rows):
        numbers.append(len(torch.as_tensor(rows).flatten()) / editing.WORKING_COPIES)  # copies that nothing is made of
        return select(self, rows)

    monkeypatch.setattr(FineTuningEditor, "edit", watched_edit)
    monkeypatch.setattr(DenseEdit, "select", watched_select)
    monkeypatch.setattr(judging, "EDIT_BYTES", 2 * editing.WORKING_COPIES * one)
    evaluated = evaluate_records(editor, model, tokenizer, records, progress=False)
    assert_same(evaluated.rows, list(expected.rows))
    assert max(numbers) == 2


# --- the procedure ------------------------------------------------------------------------------------------------


def test_model_is_bit_identical_and_in_its_mode_afterwards(setting, tiny_model):
    model, tokenizer, editor = tiny_model(), *setting()[1:]
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_records(editor, model, tokenizer, make_records(3, 2), sequential=2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_model_is_left_alone_by_an_editor_that_fails_on_the_way(setting):
    model, tokenizer, editor = setting()

    class Failing(OneAtATime):
        def edit(self, model, tokenizer, requests, **options):
            if options["previous"] is not None:
                raise NonFiniteError("the gradient at down_proj is not finite for request 0; check the weights")
            return super().edit(model, tokenizer, requests, **options)

    with pytest.raises(
        NonFiniteError, match=r"record 'r\d+' of made, generality case \d, supporting hop \d: the gradient at"
    ):
        evaluate_records(Failing(editor), model, tokenizer, make_records(10, 1), progress=False)
    assert not any(module._forward_hooks for module in model.modules())


def test_unedited_model_keeps_its_predictions(setting):
    model, tokenizer, _ = setting()
    evaluated = evaluate_records(None, model, tokenizer, make_records(6, 2), sequential=3, progress=False)
    assert evaluated.summary["locality"] == 100
    assert evaluated.summary["js_similarity"] == pytest.approx(100, abs=1e-3)
    assert evaluated.edit_seconds is None
    assert all(row["before"] == row["after"] and row["edited_hops"] == 0 for row in evaluated.rows)


def test_supporting_hops_and_generation_can_be_off(setting):
    model, tokenizer, editor = setting()
    evaluated = evaluate_records(
        editor, model, tokenizer, make_records(6, 1), supporting_hops=False, generate=False, progress=False
    )
    assert all(row["edited_hops"] == 0 and row["exact_match"] is None for row in evaluated.rows)
    assert evaluated.summary["exact_match"] is None


def test_yes_no_cases_count_the_top_prediction_only(setting):
    model, tokenizer, _ = setting()
    short = {tokenizer(f" {word}")["input_ids"][0]: word for word in SHORT[:-1]}
    naive, prompts = (
        Naive(None, model, tokenizer),
        [f"{place} {end}" for place in PLACES for end in "abcdefghijklmnopqrstuvwxyz"],
    )
    best = {prompt: naive.best(naive.logits_and_targets(model, prompt, "is")[0], 5)[0] for prompt in prompts}
    prompt, answer = next((prompt, short[i]) for prompt, ids in best.items() for i in ids[1:] if i in short)
    cases = tuple(EditCase(prompt, answer, top_k=k) for k in (1, 5))
    record = EditRecord("r", "made", "art", (EditRequest("Oslo lies in", "Rome"),), cases)
    rows = evaluate_records(None, model, tokenizer, [record], progress=False).rows
    assert [(row["score"], row["top1"]) for row in rows if row["role"] == "generality"] == [(0, 0), (1, 0)]


def test_equal_strings_of_other_ids_count_only_as_uniedit_compares_them(setting):
    model, tokenizer, editor = setting()
    records, locality = make_records(8, 1), {}
    for match in ("ids", "string"):
        rows = evaluate_records(
            editor, model, tokenizer, records, locality_match=match, generate=False, progress=False
        ).rows
        locality[match] = [row["score"] for row in rows if row["role"] == "locality"]
    assert all(a <= b for a, b in zip(locality["ids"], locality["string"], strict=True))
    assert locality["ids"] != locality["string"]  # byte fragments all decode to the replacement character


def test_answers_do_not_depend_on_the_batch_or_on_a_pad_token(setting):
    model, tokenizer, _ = setting()
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    asked = {i: (f"{place} {RELATIONS[i % 6]}" * (1 + i % 3), 1 + i % 4) for i, place in enumerate(PLACES)}
    texts = [
        generate_texts(model, t, asked, size, lambda model, _: nullcontext(model))
        for t in (tokenizer, unpadded)
        for size in (1, 5)
    ]
    assert all(text == texts[0] for text in texts)
    assert len(set(texts[0].values())) > 6
    near = {0: ("a" * 127, 4), 1: ("b" * 3, 4)}  # 127 of 128 positions: two more tokens fit
    assert len(generate_texts(model, tokenizer, near, 2, lambda model, _: nullcontext(model))) == 2


def test_rows_are_json_and_stream_in_order(setting):
    model, tokenizer, editor = setting()
    rows, skipped, records = [], [], make_records(9, 2)
    evaluated = evaluate_records(
        editor, model, tokenizer, records, batch_size=4, progress=False, on_row=rows.append, on_skip=skipped.append
    )
    assert json.loads(json.dumps(rows, allow_nan=False)) == list(evaluated.rows)
    assert list(dict.fromkeys(row["record"] for row in rows)) == [record.id for record in records]
    assert Counter(skip["reason"] for skip in skipped) == evaluated.skipped != {}
    judged = {(row["record"], row["case"]) for row in rows if row["role"] == "locality"}
    assert judged.isdisjoint((skip["record"], skip["case"]) for skip in skipped)
    assert set(rows[0]) == {
        "record",
        "domain",
        "dataset",
        "kind",
        "role",
        "list",
        "case",
        "criteria",
        "hops",
        "prompt",
        "target",
        "score",
        "top1",
        "first_token",
        "exact_match",
        "before",
        "after",
        "generated",
        "answered",
        "answer",
        "answer_before",
        "js_similarity",
        "edited_hops",
    }


def test_a_killed_run_goes_on_with_no_row_lost_or_doubled(setting):
    model, tokenizer, editor = setting()
    records, rows = make_records(8, 2), []
    whole = evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False)

    def write(row):
        if len(rows) == 7:
            raise KeyboardInterrupt
        rows.append(row)

    with pytest.raises(KeyboardInterrupt):
        evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False, on_row=write)
    rest = []
    resumed = evaluate_records(
        editor, model, tokenizer, records, sequential=3, progress=False, on_row=rest.append, finished=rows
    )
    assert_same([*rows, *rest], list(whole.rows))
    assert_same(resumed.rows, list(whole.rows))
    again = evaluate_records(
        editor, model, tokenizer, records, sequential=3, progress=False, on_row=pytest.fail, finished=resumed.rows
    )
    assert again.rows == resumed.rows
    assert again.edit_seconds is None


def test_incomplete_group_is_scored_and_said_so(setting, caplog):
    model, tokenizer, editor = setting()
    records = make_records(5, 1)
    evaluated = evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False)
    assert evaluated.incomplete_group == 2
    assert len({row["record"] for row in evaluated.rows}) == 5
    assert "2 of 3 requests" in caplog.text
    assert evaluate_records(None, model, tokenizer, records, sequential=5, progress=False).incomplete_group == 0


def test_one_at_a_time_editors_get_the_mode_of_the_group(setting):
    model, tokenizer, editor = setting()
    alone = OneAtATime(editor)
    evaluate_records(
        alone, model, tokenizer, make_records(4, 1), sequential=2, mode="joint", supporting_hops=False, progress=False
    )
    assert alone.modes == {"joint": 2}


def test_collisions_follow_the_rule_of_the_protocol():
    rng = random.Random(1)
    hops = [make_hop(rng, ["a", "b", "c"]) for _ in range(60)]
    for one in hops:
        for other in hops:
            if one.tail_is_item and other.tail_is_item:
                same = {one.head, one.tail} == {other.head, other.tail}
            else:
                mine, theirs = ((hop.head, hop.property, hop.tail, hop.tail_is_item) for hop in (one, other))
                same = mine == theirs
            assert same == collides(EditCase("a", "b", facts=(one,)), [other])
