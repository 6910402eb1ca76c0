"""Evaluation against a naive reference written from PROTOCOL alone, and the formulas against numbers done by hand."""

from __future__ import annotations

import copy
import json
import math
import random
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from naive import PLACES, RELATIONS, SHORT, Naive, assert_same, make_hop, make_records, settings_of

from ibke_hf import EditCase, EditRecord, EditRequest
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import Hop, collides
from ibke_hf.core.tokens import RequestError
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.evaluation import editing, judging, questions, scores
from ibke_hf.evaluation.generation import generate_texts
from ibke_hf.evaluation.protocol import evaluate_records


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    return settings_of(tiny_model, tiny_tokenizer)


class OneAtATime:
    """The same editor, for which every edit is made alone."""

    supports_independent = False

    def __init__(self, editor):
        self.editor, self.modes = editor, Counter()

    def edit(self, *arguments, mode, previous):
        self.modes[mode] += 1
        return self.editor.edit(*arguments, mode=mode, previous=previous)


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


def test_a_strict_evaluation_ends_at_what_is_unusable_and_names_record_and_case(setting):
    model, tokenizer, editor = setting()
    good = make_records(2, 1)
    empty = replace(good[1], generality=(EditCase("Rome lies in", "Oslo"), EditCase("Rome lies in", " ")))
    with pytest.raises(RequestError, match="record 'r1' of made, generality case 1: the target is empty"):
        evaluate_records(editor, model, tokenizer, [good[0], empty], progress=False, strict=True, on_row=pytest.fail)
    long = replace(good[1], locality=(EditCase("Rome lies in" * 40, "Oslo"),))
    with pytest.raises(RequestError, match=r"record 'r1' of made, locality case 0: .* context of 128"):
        evaluate_records(editor, model, tokenizer, [long], progress=False, strict=True)
    hop = replace(
        good[1], generality=(EditCase("Rome lies in", "Oslo", supporting=(Hop("", "Oslo", "Rome", "P1", "Oslo"),)),)
    )
    with pytest.raises(
        RequestError, match="record 'r1' of made, generality case 0, supporting hop 0: the prompt is empty"
    ):
        evaluate_records(editor, model, tokenizer, [hop], progress=False, strict=True)
    with pytest.raises(ValueError, match="record 'r0' of 'made' was given more than once"):
        evaluate_records(editor, model, tokenizer, [good[0], good[0]], progress=False)


def test_what_is_unusable_is_left_out_named_and_counted(setting):
    model, tokenizer, editor = setting()
    good = make_records(3, 1)
    long = replace(good[0], requests=(EditRequest("Rome lies in" * 40, "Oslo"),))
    case = EditCase("Rome lies in" * 40, "Oslo", name="loc")
    unasked = replace(good[1], generality=(case, *good[1].generality), locality=(*good[1].locality, case))
    dropped = []
    evaluated = evaluate_records(
        editor, model, tokenizer, [long, unasked, good[2]], progress=False, on_skip=dropped.append, batch_size=1
    )
    unusable = [(one["record"], one["role"], one["case"]) for one in dropped if "detail" in one]
    assert unusable == [
        ("r0", "reliability", 0),
        ("r1", "generality", 0),
        ("r1", "locality", len(good[1].locality)),
    ]
    assert "record 'r0' of made, request 0: " in dropped[0]["detail"] and "context of 128" in dropped[0]["detail"]
    assert evaluated.skipped["record with an unusable request"] == 1
    assert evaluated.skipped["unusable case"] == 2
    alone = evaluate_records(editor, model, tokenizer, [good[1], good[2]], progress=False, batch_size=1)
    shifted = [
        {**row, "case": row["case"] + (row["record"] == "r1" and row["role"] == "generality")} for row in alone.rows
    ]
    assert list(evaluated.rows) == shifted  # the places of the other cases stay
    with pytest.raises(RequestError, match="no record can be used; the first: record 'r0' of made, request 0: "):
        evaluate_records(editor, model, tokenizer, [long], progress=False)


def test_requests_that_the_editor_cannot_edit_are_left_out(setting):
    model, tokenizer, editor = setting()

    class Choosy(OneAtATime):
        @staticmethod
        def check_request(request, name):
            if "Rome" in request.prompt:
                raise RequestError(f"{name}: not about Rome")

    records = make_records(12, 1)
    records[4] = replace(records[4], requests=(EditRequest("Rome lies in", "Oslo"),))
    evaluated = evaluate_records(Choosy(editor), model, tokenizer, records, progress=False, generate=False)
    assert evaluated.skipped["record with an unusable request"] >= 1
    assert "r4" not in {row["record"] for row in evaluated.rows}
    with pytest.raises(RequestError, match="not about Rome"):
        evaluate_records(Choosy(editor), model, tokenizer, records, progress=False, strict=True)


@pytest.mark.parametrize(
    "option",
    [
        {"sequential": 0},
        {"batch_size": 0},
        {"mode": "independent"},
        {"collision_scope": "all"},
        {"locality_match": "text"},
    ],
)
def test_options_out_of_range_are_named(setting, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        evaluate_records(*reversed(setting()), make_records(1, 1), progress=False, **option)


def test_errors_of_a_batch_name_the_record_whose_request_failed(setting):
    model, tokenizer, _ = setting()

    class Failing:
        def edit(self, *_, **__):
            raise NonFiniteError("the loss of the edit request is not finite for request 2; check the backbone")

    with pytest.raises(NonFiniteError, match=r"^record 'r2' of made, request 0: the loss"):
        evaluate_records(Failing(), model, tokenizer, make_records(4, 1), progress=False)


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


# --- the formulas -------------------------------------------------------------------------------------------------


def test_ranks_break_ties_by_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert [int(scores.token_ranks(logits, torch.tensor([i]))) for i in range(5)] == [4, 0, 1, 3, 2]
    assert scores.top_ids(logits, 4).tolist() == [[1, 2, 4, 3]]
    assert scores.top_ids(logits, 9).tolist() == [[1, 2, 4, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ranks_agree_with_a_stable_sort(dtype):
    torch.manual_seed(0)
    logits = torch.randn(40, 300).to(dtype).round(decimals=1)
    order = logits.float().sort(descending=True, stable=True).indices
    for rank in (0, 1, 4, 5, 299):
        assert torch.equal(scores.token_ranks(logits, order[:, rank]), torch.full((40,), rank))
    assert torch.equal(scores.top_ids(logits, 7), order[:, :7])


def test_nan_logits_score_nothing():
    logits = torch.full((2, 6), math.nan)
    logits[1, 3] = 0.5
    assert (scores.token_ranks(logits, torch.tensor([2, 3])) >= 5).all()
    assert scores.js_similarity(logits, torch.zeros(2, 6)).tolist() == [0, 0]


def test_js_similarity_by_hand():
    one = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).log()
    two = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).log()
    half = 1 - (0.75 * math.log2(1 / 0.75) + 0.25 * 2 - 0.5)  # H(3/4, 1/4) - (H(1) + H(1/2, 1/2)) / 2
    assert scores.js_similarity(one, two).tolist() == pytest.approx([1, 0, half], abs=1e-6)
    same = torch.randn(5, 50)
    assert scores.js_similarity(same, same).tolist() == [1] * 5


def test_f1_and_average():
    assert scores.f1(60, 30) == 40
    assert scores.f1(0, 0) == 0
    assert scores.f1(None, 50) is scores.f1(50, None) is None
    assert scores.average(90, None, 30) == 60
    assert scores.average(None, None, None) is None


def a_row(role, score, top1=0.0, name="a", criteria=(), hops=1, domain="art", record="r", **other):
    return {
        "record": record,
        "dataset": "made",
        "domain": domain,
        "role": role,
        "list": name,
        "criteria": list(criteria),
        "hops": hops,
        "score": score,
        "top1": top1,
        "first_token": top1,
        "exact_match": None,
        "js_similarity": None,
    } | other


def test_summary_by_hand():
    rows = [
        a_row("reliability", 1.0),
        a_row("reliability", 0.5, record="s"),
        a_row("reliability", 0.0, record="s"),
        a_row("generality", 1.0, 1.0, criteria=["Rephrase"], exact_match=True),
        a_row("generality", 0.0, 0.0, criteria=["Multi-Hop"], hops=2, exact_match=False),
        a_row("generality", 0.5, 0.5, criteria=["Multi-Hop", "Rephrase"], hops=3, exact_match=False),
        a_row("generality", 0.25, 0.0, name="b", record="s", domain="food", exact_match=True),
        a_row("locality", 0.5, 0.25, name="loc", js_similarity=0.9),
        a_row("locality", 1.0, 0.75, name="loc", js_similarity=0.7),
    ]
    summary = scores.summarise(rows)
    assert summary["reliability"] == 50
    assert summary["generality"] == pytest.approx((50 + 25) / 2)  # three cases of list a, one of list b
    assert summary["locality"] == 75
    assert summary["f1"] == 50
    assert summary["avg"] == pytest.approx((50 + 37.5 + 75) / 3)
    assert summary["generality_top1"] == summary["first_token"] == 25
    assert summary["locality_top1"] == 50
    assert summary["exact_match"] == pytest.approx((100 / 3 + 100) / 2)
    assert summary["js_similarity"] == pytest.approx(80)
    assert (summary["records"], summary["cases"]) == (2, {"reliability": 3, "generality": 4, "locality": 2})
    assert summary["by_criterion"] == {
        "generality": {
            "Multi-Hop": {"score": 25, "top1": 25, "exact_match": 0, "cases": 2},
            "Rephrase": {"score": 75, "top1": 75, "exact_match": 50, "cases": 2},
        },
        "locality": {},
    }
    assert {hops: cell["cases"] for hops, cell in summary["by_hops"]["generality"].items()} == {"1": 2, "2": 1, "3": 1}
    assert summary["by_hops"]["generality"]["3"]["score"] == 50
    assert summary["by_domain"]["food"]["generality"] == 25
    assert summary["by_domain"]["food"]["reliability"] is None
    assert summary["by_domain"]["art"]["generality"] == 50


def test_summary_of_nothing_is_none_and_json():
    summary = scores.summarise([])
    assert summary["reliability"] is summary["generality"] is summary["f1"] is summary["avg"] is None
    assert summary["records"] == 0
    only = scores.summarise([a_row("reliability", 1.0), a_row("generality", 0.5)])
    assert (only["locality"], only["f1"], only["avg"]) == (None, None, 75)
    json.dumps([summary, only], allow_nan=False)
