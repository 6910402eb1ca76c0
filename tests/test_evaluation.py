"""Evaluation against a naive reference written from PROTOCOL alone, and the formulas against numbers done by hand."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from ibke_hf import EditCase, EditRecord, EditRequest, IBKEEditor
from ibke_hf.capture import NonFiniteError
from ibke_hf.evaluation import editing, scores
from ibke_hf.evaluation.generation import generate_texts
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.records import Hop, collides
from ibke_hf.tokens import RequestError, encode_requests

PLACES = ["Paris", "Rome", "Oslo", "Berlin", "Madrid", "Vienna", "Lisbon", "London", "Warsaw", "England", "Poland", "France"]
THINGS = ["a bird", "a tree", "a metal", "the author", "physics", "chemistry", "the book", "a city", "the river", "a language"]
SHORT = ["is", "of", "and", "the", "a", "in", "c", "P", "E", "is the"]  # one token of the tiny tokenizer, all but the last
RELATIONS = ["lies in", "was born in", "worked in", "is written by", "is the capital of", "is a kind of"]
YES_NO = " The answer is (Yes/No):"


# --- records ------------------------------------------------------------------------------------------------------


def make_hop(rng: random.Random, names: list[str]) -> Hop:
    head, relation = rng.choice(names), rng.randrange(len(RELATIONS))
    tail = rng.choice(names) if rng.random() < 0.4 else rng.choice(SHORT)
    item = rng.random() < 0.7
    return Hop(f"{head} {RELATIONS[relation]}", tail, head, f"P{relation}", tail if item else f"string:{tail}", item)


def make_records(number: int, most_requests: int, seed: int = 0) -> list[EditRecord]:
    """Records with every kind of case: some locality cases collide, some hops restate an edit, which the model then knows."""
    rng, records = random.Random(seed), []
    for index in range(number):
        names = [f"{rng.choice(PLACES)}{rng.randrange(40)}" for _ in range(5)] + rng.sample(PLACES + THINGS, 3)
        edits = [make_hop(rng, names) for _ in range(rng.randint(1, most_requests))]
        generality, locality = [], []
        for _ in range(rng.randint(1, 3)):
            supporting = tuple(rng.choice([make_hop(rng, names), edits[0]]) for _ in range(rng.choice([0, 0, 1, 2, 3])))
            double = rng.random() < 0.3
            generality.append(EditCase(
                prompt=rng.choice(["", "It is said that "]) + rng.choice([edits[-1], make_hop(rng, names)]).prompt + YES_NO * double,
                target="Yes" if double else edits[-1].target, criteria=("Multi-Hop",) if supporting else ("Rephrase",),
                hops=1 + len(supporting), top_k=1 if double else 5, aliases=(rng.choice(PLACES),), supporting=supporting,
                name=rng.choice(["gen_a", "gen_b"]),
            ))  # fmt: skip
        for _ in range(rng.randint(0, 3)):
            own = rng.choice(edits)
            same = rng.choice([own, replace(own, property="P9"), replace(own, head=own.tail, tail=own.head)])  # collides for items
            facts = tuple(make_hop(rng, names) if rng.random() < 0.8 else same for _ in range(rng.randint(1, 2)))
            locality.append(EditCase(facts[-1].prompt, facts[-1].target, ("1-N Forgotten",), len(facts), rng.choice([1, 5]),
                                     facts=facts, name="loc"))  # fmt: skip
        records.append(EditRecord(
            f"r{index}", "made", rng.choice(["art", "biology"]), tuple(hop.request() for hop in edits), tuple(generality),
            tuple(locality), tuple(edits), kind="unknown",
        ))  # fmt: skip
    return records


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    """Model, tokenizer and calibrated editor of a family; the edits are large, so that predictions move."""
    made = {}

    def build(family="qwen3"):
        if family not in made:
            model = tiny_model(family)
            torch.manual_seed(0)
            editor = IBKEEditor.for_backbone(model, latent_dim=16, latent_length=3, initial_edit_ratio=0.5)
            requests = [request for record in make_records(40, 1, seed=7) for request in record.requests]
            editor.calibrate(model, [encode_requests(tiny_tokenizer, requests)])
            made[family] = (model, editor)
        model, editor = made[family]
        return model, tiny_tokenizer, editor

    return build


class OneAtATime:
    """The same editor, for which every edit is made alone."""

    supports_independent = False

    def __init__(self, editor):
        self.editor, self.modes = editor, Counter()

    def edit(self, *given, mode, previous):
        self.modes[mode] += 1
        return self.editor.edit(*given, mode=mode, previous=previous)


# --- the naive reference ------------------------------------------------------------------------------------------


class Naive:
    """PROTOCOL one case at a time: dense weights, full sorts, no padding, no batch."""

    def __init__(self, editor, model, tokenizer, match="ids"):
        self.editor, self.model, self.tokenizer, self.match = editor, model, tokenizer, match

    def logits_and_targets(self, model, prompt, target):
        ids = self.tokenizer(prompt + (target if target.startswith(" ") else " " + target))["input_ids"]
        start = len(self.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].float()
        return logits[start - 1 :], ids[start:]

    def best(self, logits, k):
        return [torch.sort(row, descending=True, stable=True).indices[:k].tolist() for row in logits]

    def within(self, model, prompt, target, k):
        logits, targets = self.logits_and_targets(model, prompt, target)
        return [token in best for token, best in zip(targets, self.best(logits, k), strict=True)]

    def edited(self, model, *requests):
        """Copy the model and add the ΔW of each request, all of them read on the model as given."""
        changed = copy.deepcopy(model)
        for request in requests:
            edit = self.editor.edit(model, self.tokenizer, [request])
            for name in edit.inputs:
                layer, update = changed.get_submodule(name), edit.inputs[name][0].T @ edit.outputs[name][0]
                with torch.no_grad():
                    layer.weight += update if isinstance(layer, Conv1D) else update.T
        return changed

    def answers(self, model, prompt, names, new_tokens):
        ids = self.tokenizer(prompt)["input_ids"]
        made = []
        for _ in range(new_tokens):
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == model.generation_config.eos_token_id:
                break
        text = self.tokenizer.decode(made, skip_special_tokens=True).strip()
        return any(text == name or (text.startswith(name) and not text[len(name)].isalnum()) for name in names)

    def evaluate(self, records, n, joint=False, scope="set"):
        groups, group = [], []
        for record in records:
            group.append(record)
            if sum(len(r.requests) for r in group) >= n:
                groups.append(group)
                group = []
        groups += [group] if group else []
        return [row for g in groups for row in self.run_group(g, records if scope == "set" else g, joint)]

    def run_group(self, group, scope, joint):
        requests = [request for record in group for request in record.requests]
        model = self.edited(self.model, *requests) if joint else self.model
        for request in [] if joint else requests:
            model = self.edited(model, request)
        rows = []
        for record in group:
            for request in record.requests:
                logits, targets = self.logits_and_targets(model, request.prompt, request.target)
                row = self.row(record, "reliability", request, self.within(model, request.prompt, request.target, 1), logits, targets)
                rows.append(row | {"exact_match": self.answers(model, request.prompt, [request.target], len(targets) + 3)})
            rows += [self.generality(model, record, case) for case in record.generality]
            rows += [self.locality(model, record, case) for case in record.locality if not self.dropped(case, scope)]
        return rows

    def generality(self, model, record, case):
        edited_hops = 0
        for hop in case.supporting:
            if not all(self.within(model, hop.prompt, hop.target, 5)):
                model, edited_hops = self.edited(model, EditRequest(hop.prompt, hop.target)), edited_hops + 1
        logits, targets = self.logits_and_targets(model, case.prompt, case.target)
        row = self.row(record, "generality", case, self.within(model, case.prompt, case.target, case.top_k), logits, targets)
        matched = self.answers(model, case.prompt, [case.target, *case.aliases], len(targets) + 3)
        return row | {"exact_match": matched, "edited_hops": edited_hops}

    def dropped(self, case, records):
        def fact(hop):
            return {hop.head, hop.tail} if hop.tail_is_item else (hop.head, hop.property, hop.tail)

        return any(fact(hop) == fact(edit) for hop in case.facts for record in records for edit in record.edits)

    def locality(self, model, record, case):
        original, _ = self.logits_and_targets(self.model, case.prompt, case.target)
        logits, _ = self.logits_and_targets(model, case.prompt, case.target)
        before, best = [row[0] for row in self.best(original, 1)], self.best(logits, case.top_k)
        if self.match == "string":
            hits = [self.tokenizer.decode([b]) in [self.tokenizer.decode([i]) for i in k] for b, k in zip(before, best, strict=True)]
        else:
            hits = [b in k for b, k in zip(before, best, strict=True)]
        row = self.row(record, "locality", case, hits, logits, before)
        p, q = original.double().softmax(-1), logits.double().softmax(-1)
        halves = [(a * (a / ((p + q) / 2)).log2()).sum(-1) / 2 for a in (p, q)]
        return row | {"js_similarity": float((1 - halves[0] - halves[1]).mean())}

    def row(self, record, role, case, hits, logits, wanted):
        top = [row[0] for row in self.best(logits, 1)]
        first = [a == b for a, b in zip(top, wanted, strict=True)]
        if self.match == "string" and role == "locality":
            first = [self.tokenizer.decode([a]) == self.tokenizer.decode([b]) for a, b in zip(top, wanted, strict=True)]
        return {"record": record.id, "role": role, "prompt": case.prompt, "score": sum(hits) / len(hits), "top1": sum(first) / len(first),
                "first_token": float(first[0]), "after": self.tokenizer.decode(top), "exact_match": None, "js_similarity": None,
                "edited_hops": 0}  # fmt: skip


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for mine, theirs in zip(rows, expected, strict=True):
        exact = {key: value for key, value in theirs.items() if key != "js_similarity"}
        assert {key: mine[key] for key in exact} == exact
        assert mine["js_similarity"] == (None if theirs["js_similarity"] is None else pytest.approx(theirs["js_similarity"], abs=5e-5))


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
    found = evaluate_records(editor if at_once else OneAtATime(editor), model, tokenizer, records, progress=False, **options)
    naive = Naive(editor, model, tokenizer, options.get("locality_match", "ids"))
    expected = naive.evaluate(records, options.get("sequential", 1), options.get("mode") == "joint", options.get("collision_scope", "set"))
    assert_same(found.rows, expected)
    hops = sum(len(case.supporting) for record in records for case in record.generality)
    assert 0 < sum(row["edited_hops"] for row in found.rows) < hops + (number < 20)  # known and unknown hops both occur
    locality = sum(len(record.locality) for record in records)
    assert found.skipped == {"locality case that collides with an edit": locality - sum(r["role"] == "locality" for r in expected)}
    assert any(row["before"] != row["after"] for row in found.rows)
    assert found.edit_seconds > 0


def test_edits_carried_at_once_are_bounded_without_changing_a_row(setting, monkeypatch):
    model, tokenizer, editor = setting()
    records = make_records(12, 2)
    expected = evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False)
    monkeypatch.setattr(editing, "CARRIED_BYTES", 1)
    assert_same(evaluate_records(editor, model, tokenizer, records, sequential=6, progress=False).rows, list(expected.rows))


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
        def edit(self, model, tokenizer, requests, **given):
            if given["previous"] is not None:
                raise NonFiniteError("the gradient at down_proj is not finite for request 0; check the weights")
            return super().edit(model, tokenizer, requests, **given)

    with pytest.raises(NonFiniteError, match=r"record 'r\d+' of made, generality case \d, supporting hop \d: the gradient at"):
        evaluate_records(Failing(editor), model, tokenizer, make_records(10, 1), progress=False)
    assert not any(module._forward_hooks for module in model.modules())


def test_unedited_model_keeps_its_predictions(setting):
    model, tokenizer, _ = setting()
    found = evaluate_records(None, model, tokenizer, make_records(6, 2), sequential=3, progress=False)
    assert found.summary["locality"] == 100
    assert found.summary["js_similarity"] == pytest.approx(100, abs=1e-3)
    assert found.edit_seconds is None
    assert all(row["before"] == row["after"] and row["edited_hops"] == 0 for row in found.rows)


def test_supporting_hops_and_generation_can_be_off(setting):
    model, tokenizer, editor = setting()
    found = evaluate_records(editor, model, tokenizer, make_records(6, 1), supporting_hops=False, generate=False, progress=False)
    assert all(row["edited_hops"] == 0 and row["exact_match"] is None for row in found.rows)
    assert found.summary["exact_match"] is None


def test_yes_no_cases_count_the_top_prediction_only(setting):
    model, tokenizer, _ = setting()
    short = {tokenizer(f" {word}")["input_ids"][0]: word for word in SHORT[:-1]}
    naive, prompts = Naive(None, model, tokenizer), [f"{place} {end}" for place in PLACES for end in "abcdefghijklmnopqrstuvwxyz"]
    best = {prompt: naive.best(naive.logits_and_targets(model, prompt, "is")[0], 5)[0] for prompt in prompts}
    prompt, answer = next((prompt, short[i]) for prompt, ids in best.items() for i in ids[1:] if i in short)
    cases = tuple(EditCase(prompt, answer, top_k=k) for k in (1, 5))
    record = EditRecord("r", "made", "art", (EditRequest("Oslo lies in", "Rome"),), cases)
    rows = evaluate_records(None, model, tokenizer, [record], progress=False).rows
    assert [(row["score"], row["top1"]) for row in rows if row["role"] == "generality"] == [(0, 0), (1, 0)]


def test_equal_strings_of_other_ids_count_only_as_uniedit_compares_them(setting):
    model, tokenizer, editor = setting()
    records, found = make_records(8, 1), {}
    for match in ("ids", "string"):
        rows = evaluate_records(editor, model, tokenizer, records, locality_match=match, generate=False, progress=False).rows
        found[match] = [row["score"] for row in rows if row["role"] == "locality"]
    assert all(a <= b for a, b in zip(found["ids"], found["string"], strict=True))
    assert found["ids"] != found["string"]  # byte fragments all decode to the replacement character


def test_answers_do_not_depend_on_the_batch_or_on_a_pad_token(setting):
    model, tokenizer, _ = setting()
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    asked = {i: (f"{place} {RELATIONS[i % 6]}" * (1 + i % 3), 1 + i % 4) for i, place in enumerate(PLACES)}
    texts = [generate_texts(model, t, asked, size, lambda model, _: nullcontext(model)) for t in (tokenizer, unpadded) for size in (1, 5)]
    assert all(text == texts[0] for text in texts)
    assert len(set(texts[0].values())) > 6
    near = {0: ("a" * 127, 4), 1: ("b" * 3, 4)}  # 127 of 128 positions: two more tokens fit
    assert len(generate_texts(model, tokenizer, near, 2, lambda model, _: nullcontext(model))) == 2


def test_rows_are_json_and_stream_in_order(setting):
    model, tokenizer, editor = setting()
    rows, skipped, records = [], [], make_records(9, 2)
    found = evaluate_records(editor, model, tokenizer, records, batch_size=4, progress=False, on_row=rows.append, on_skip=skipped.append)
    assert json.loads(json.dumps(rows, allow_nan=False)) == list(found.rows)
    assert list(dict.fromkeys(row["record"] for row in rows)) == [record.id for record in records]
    assert Counter(skip["reason"] for skip in skipped) == found.skipped != {}
    judged = {(row["record"], row["case"]) for row in rows if row["role"] == "locality"}
    assert judged.isdisjoint((skip["record"], skip["case"]) for skip in skipped)
    assert set(rows[0]) == {
        "record", "domain", "dataset", "kind", "role", "list", "case", "criteria", "hops", "prompt", "target", "score", "top1",
        "first_token", "exact_match", "before", "after", "js_similarity", "edited_hops",
    }  # fmt: skip


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
    resumed = evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False, on_row=rest.append, finished=rows)
    assert_same([*rows, *rest], list(whole.rows))
    assert_same(resumed.rows, list(whole.rows))
    again = evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False, on_row=pytest.fail, finished=resumed.rows)
    assert again.rows == resumed.rows
    assert again.edit_seconds is None


def test_incomplete_group_is_scored_and_said_so(setting, caplog):
    model, tokenizer, editor = setting()
    records = make_records(5, 1)
    found = evaluate_records(editor, model, tokenizer, records, sequential=3, progress=False)
    assert found.incomplete_group == 2
    assert len({row["record"] for row in found.rows}) == 5
    assert "2 of 3 requests" in caplog.text
    assert evaluate_records(None, model, tokenizer, records, sequential=5, progress=False).incomplete_group == 0


def test_one_at_a_time_editors_get_the_mode_of_the_group(setting):
    model, tokenizer, editor = setting()
    alone = OneAtATime(editor)
    evaluate_records(alone, model, tokenizer, make_records(4, 1), sequential=2, mode="joint", supporting_hops=False, progress=False)
    assert alone.modes == {"joint": 2}


def test_errors_name_record_and_case(setting):
    model, tokenizer, editor = setting()
    good = make_records(2, 1)
    empty = replace(good[1], generality=(EditCase("Rome lies in", "Oslo"), EditCase("Rome lies in", " ")))
    with pytest.raises(RequestError, match="record 'r1' of made, generality case 1: the target is empty"):
        evaluate_records(editor, model, tokenizer, [good[0], empty], progress=False, on_row=pytest.fail)
    long = replace(good[1], locality=(EditCase("Rome lies in" * 40, "Oslo"),))
    with pytest.raises(RequestError, match=r"record 'r1' of made, locality case 0: .* context of 128"):
        evaluate_records(editor, model, tokenizer, [long], progress=False)
    hop = replace(good[1], generality=(EditCase("Rome lies in", "Oslo", supporting=(Hop("", "Oslo", "Rome", "P1", "Oslo"),)),))
    with pytest.raises(RequestError, match="record 'r1' of made, generality case 0, supporting hop 0: the prompt is empty"):
        evaluate_records(editor, model, tokenizer, [hop], progress=False)
    with pytest.raises(ValueError, match="record 'r0' of 'made' was given more than once"):
        evaluate_records(editor, model, tokenizer, [good[0], good[0]], progress=False)


@pytest.mark.parametrize(
    "option", [{"sequential": 0}, {"batch_size": 0}, {"mode": "independent"}, {"collision_scope": "all"}, {"locality_match": "text"}]
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


@pytest.mark.parametrize(
    ("text", "matches"),
    [(" Paris", True), ("Paris.", True), ("Paris, France", True), ("Parisian", False), ("Paris2", False), ("The Paris", False),
     (" New York City", True), ("new york", False), ("", False), ("Par", False)],
)  # fmt: skip
def test_exact_match(text, matches):
    assert scores.exact_match(text, [" Paris", "", "New York"]) == matches


def test_f1_and_average():
    assert scores.f1(60, 30) == 40
    assert scores.f1(0, 0) == 0
    assert scores.f1(None, 50) is scores.f1(50, None) is None
    assert scores.average(90, None, 30) == 60
    assert scores.average(None, None, None) is None


def a_row(role, score, top1=0.0, name="a", criteria=(), hops=1, domain="art", record="r", **other):
    return {"record": record, "dataset": "made", "domain": domain, "role": role, "list": name, "criteria": list(criteria), "hops": hops,
            "score": score, "top1": top1, "first_token": top1, "exact_match": None, "js_similarity": None} | other  # fmt: skip


def test_summary_by_hand():
    rows = [
        a_row("reliability", 1.0), a_row("reliability", 0.5, record="s"), a_row("reliability", 0.0, record="s"),
        a_row("generality", 1.0, 1.0, criteria=["Rephrase"], exact_match=True),
        a_row("generality", 0.0, 0.0, criteria=["Multi-Hop"], hops=2, exact_match=False),
        a_row("generality", 0.5, 0.5, criteria=["Multi-Hop", "Rephrase"], hops=3, exact_match=False),
        a_row("generality", 0.25, 0.0, name="b", record="s", domain="food", exact_match=True),
        a_row("locality", 0.5, 0.25, name="loc", js_similarity=0.9), a_row("locality", 1.0, 0.75, name="loc", js_similarity=0.7),
    ]  # fmt: skip
    found = scores.summarise(rows)
    assert found["reliability"] == 50
    assert found["generality"] == pytest.approx((50 + 25) / 2)  # three cases of list a, one of list b
    assert found["locality"] == 75
    assert found["f1"] == 50
    assert found["avg"] == pytest.approx((50 + 37.5 + 75) / 3)
    assert found["generality_top1"] == found["first_token"] == 25
    assert found["locality_top1"] == 50
    assert found["exact_match"] == pytest.approx((100 / 3 + 100) / 2)
    assert found["js_similarity"] == pytest.approx(80)
    assert (found["records"], found["cases"]) == (2, {"reliability": 3, "generality": 4, "locality": 2})
    assert found["by_criterion"] == {
        "generality": {"Multi-Hop": {"score": 25, "top1": 25, "exact_match": 0, "cases": 2},
                       "Rephrase": {"score": 75, "top1": 75, "exact_match": 50, "cases": 2}},
        "locality": {},
    }  # fmt: skip
    assert {hops: cell["cases"] for hops, cell in found["by_hops"]["generality"].items()} == {"1": 2, "2": 1, "3": 1}
    assert found["by_hops"]["generality"]["3"]["score"] == 50
    assert found["by_domain"]["food"]["generality"] == 25
    assert found["by_domain"]["food"]["reliability"] is None
    assert found["by_domain"]["art"]["generality"] == 50


def test_summary_of_nothing_is_none_and_json():
    found = scores.summarise([])
    assert found["reliability"] is found["generality"] is found["f1"] is found["avg"] is None
    assert found["records"] == 0
    only = scores.summarise([a_row("reliability", 1.0), a_row("generality", 0.5)])
    assert (only["locality"], only["f1"], only["avg"]) == (None, None, 75)
    json.dumps([found, only], allow_nan=False)
