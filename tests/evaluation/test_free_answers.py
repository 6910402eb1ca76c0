"""Free generation, what a user sees: against one question at a time, without padding, batch, cache or library."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from chat_templates import TEMPLATE
from naive import PLACES, RELATIONS, Naive, make_records, settings_of

from ibke_hf import EditCase, EditRecord, EditRequest
from ibke_hf.core.prompts import end_of_turn
from ibke_hf.evaluation import scores
from ibke_hf.evaluation.generation import FREE_TOKENS, generate_ids, stop_ids
from ibke_hf.evaluation.judging import Answer, answer_scores
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.evaluation.questions import RecordQuestion


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    build = settings_of(tiny_model, tiny_tokenizer)

    def with_template(family="qwen3"):
        model, tokenizer, editor = build(family)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
        return model, tokenizer, editor

    return with_template


class NaiveUser(Naive):
    """Types a prompt, and reads what the model writes until it stops."""

    def answer(self, model, asked):
        if asked.format.chat:
            turn = [{"role": "user", "content": asked.prompt}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        else:
            text = asked.prompt
        ids, answer = self.tokenizer(text, add_special_tokens=False)["input_ids"], []
        while len(answer) < 32:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            answer.append(token)
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def rows(self, records):
        for record in records:
            edited = self.edited(self.model, *record.requests)
            for case in (*record.requests, *record.generality):
                answer = self.answer(edited, case)
                yield answer, None, any(says(answer, name) for name in (case.target, *getattr(case, "aliases", ())))
            for case in record.locality:
                if not self.dropped(case, records):
                    before, after = self.answer(self.model, case), self.answer(edited, case)
                    yield after, before, words(before) == words(after)


def words(text):
    return re.findall(r"\w+", text.lower())


def says(answer, name):
    """Whether the words of a name follow one another in the answer."""
    said, name = words(answer), words(name)
    return bool(name) and any(said[i : i + len(name)] == name for i in range(len(said)))


def answered(rows):
    return [(row["answer"], row["answer_before"], row["answered"]) for row in rows]


def evaluated(setup, records, **options):
    model, tokenizer, editor = setup
    how = {"free": True, "generate": False, "supporting_hops": False, "progress": False}
    return evaluate_records(editor, model, tokenizer, records, **{**how, **options})


def with_names_of_answers(setup, records):
    """Give generality cases an alias that the edited model says: whole words in turn with words that are cut."""
    rows = [row for row in evaluated(setup, records).rows if row["role"] == "generality"]
    named = {}
    for number, row in enumerate(rows):
        said = re.findall(r"[A-Za-z]{3,}", row["answer"]) or ["nothing"]
        named[row["record"], row["case"]] = said[0] if number % 2 else said[0][1:]
    return [
        replace(
            record,
            generality=tuple(
                replace(case, aliases=(named[record.id, i],)) for i, case in enumerate(record.generality)
            ),
        )
        for record in records
    ]


@pytest.mark.parametrize(("chat", "family"), [(True, "qwen3"), (False, "qwen3"), (True, "gpt2")])
def test_agrees_with_one_question_at_a_time(setting, chat, family):
    setup = setting(family)
    model, tokenizer, editor = setup
    records = [record.formatted(chat=chat) for record in make_records(5, 1)]
    records = with_names_of_answers(setup, records)
    rows = evaluated(setup, records, batch_size=7).rows
    assert answered(rows) == list(NaiveUser(editor, model, tokenizer).rows(records))
    judged = [row["answered"] for row in rows if row["role"] == "generality"]
    assert True in judged and False in judged
    local = [row["answered"] for row in rows if row["role"] == "locality"]
    assert local and not all(local)


def test_the_batch_changes_no_answer(setting):
    records = [record.formatted(chat=True) for record in make_records(4, 2)]
    rows = [answered(evaluated(setting(), records, batch_size=size).rows) for size in (3, 64)]
    assert rows[0] == rows[1]


def test_short_answers_are_the_same_with_free_ones_beside_them(setting):
    records = [record.formatted(chat=True) for record in make_records(3, 1)]
    beside, alone = (evaluated(setting(), records, generate=True, free=free).rows for free in (True, False))
    strip = ("answer", "answer_before", "answered")
    assert [{k: v for k, v in row.items() if k not in strip} for row in beside] == [
        {k: v for k, v in row.items() if k not in strip} for row in alone
    ]
    assert {row["answered"] for row in alone} == {None}
    assert all(row["answer"].startswith(row["generated"].rstrip("\ufffd")) for row in beside if row["generated"])


def test_the_unedited_answer_of_a_locality_case_is_generated_once(setting, monkeypatch):
    from ibke_hf.evaluation import judging

    unedited = []

    def counted(model, tokenizer, asked, batch_size, attach, formats):
        unedited.extend(asked if isinstance(attach(model, list(asked)[:1]), nullcontext) else ())
        return generate_ids(model, tokenizer, asked, batch_size, attach, formats)

    monkeypatch.setattr(judging, "generate_ids", counted)
    rows = evaluated(setting(), make_records(5, 2)).rows
    assert len(unedited) == sum(row["role"] == "locality" for row in rows) > 3


def test_a_killed_run_goes_on(setting):
    records, rows = [record.formatted(chat=True) for record in make_records(4, 2)], []
    whole = evaluated(setting(), records, batch_size=4).rows

    def write(row):
        if len(rows) == 9:
            raise KeyboardInterrupt
        rows.append(row)

    with pytest.raises(KeyboardInterrupt):
        evaluated(setting(), records, batch_size=4, on_row=write)
    rest = []
    resumed = evaluated(setting(), records, batch_size=4, on_row=rest.append, finished=rows).rows
    assert answered([*rows, *rest]) == answered(resumed) == answered(whole)


# --- where an answer ends -------------------------------------------------------------------------------------------


def asked_of(tokenizer):
    return {i: (f"{place} {RELATIONS[i % 6]}", FREE_TOKENS) for i, place in enumerate(PLACES)}


def test_an_answer_ends_before_the_token_that_stops_it(setting, monkeypatch):
    model, tokenizer, _ = setting()
    asked, attach = asked_of(tokenizer), lambda model, _: nullcontext(model)
    whole = generate_ids(model, tokenizer, asked, 5, attach)
    assert all(len(ids) <= FREE_TOKENS for ids in whole.values())
    stop = whole[0][4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, stop])
    for size in (1, 5):
        cut = generate_ids(model, tokenizer, asked, size, attach)
        assert cut == {i: ids[: ids.index(stop)] if stop in ids else ids for i, ids in whole.items()}
    assert len(cut[0]) <= 4


def test_the_end_of_a_turn_stops_an_answer(setting):
    model, tokenizer, _ = setting()
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<|pad|>\n")
    assert end_of_turn(tokenizer) == 1
    assert stop_ids(model, tokenizer) == {0, 1}
    tokenizer.chat_template = tokenizer.chat_template.replace("<|pad|>", "")  # ends in a plain token, which may go on
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert stop_ids(model, tokenizer) == {0}


def test_an_answer_at_the_end_of_the_context_does_not_depend_on_its_batch(setting):
    model, tokenizer, _ = setting()
    asked = {0: ("a" * 120, FREE_TOKENS), 1: ("b" * 3, FREE_TOKENS), 2: ("c" * 97, FREE_TOKENS)}
    one, many = (generate_ids(model, tokenizer, asked, size, lambda model, _: nullcontext(model)) for size in (1, 3))
    assert one == many
    assert len(one[0]) <= 9 and len(one[2]) <= FREE_TOKENS


# --- what counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The capital is Rome.", True),
        ("It is the ETERNAL-CITY!", True),
        ("Romeo wrote it.", False),  # a part of a word only
        ("Jerome", False),
        ("", False),
    ],
)
def test_an_answer_counts_if_it_contains_the_target_or_an_alias_as_words(answer, right):
    case = EditCase("The capital of France is", "Rome", aliases=("the Eternal City",))
    record = EditRecord("r", "made", "", (EditRequest("The capital of France is", "Rome"),), (case,))
    question = RecordQuestion(record, "generality", 0, case, ([1, 2], 1))
    row = answer_scores(question, Answer(free=answer), None)
    assert row["answered"] is right
    assert row["exact_match"] is None
    local = RecordQuestion(record, "locality", 0, case, ([1, 2], 1))
    assert answer_scores(local, Answer(free="It's Rome"), "it s ROME.")["answered"] is True
    assert answer_scores(local, Answer(free="It is Rome"), "It is Romeo")["answered"] is False
    assert answer_scores(local, Answer(), None)["answered"] is None


def test_free_scores_are_named_apart_and_averaged_as_the_others(setting):
    records = [record.formatted(chat=True) for record in make_records(4, 2)]
    rows = evaluated(setting(), records).rows
    summary = scores.summarise(rows)
    requests = [row["answered"] for row in rows if row["role"] == "reliability"]
    assert summary["answered_reliability"] == pytest.approx(100 * sum(requests) / len(requests))
    local = [row["answered"] for row in rows if row["role"] == "locality"]
    assert summary["answered_locality"] == pytest.approx(100 * sum(local) / len(local))
    assert summary["by_criterion"]["locality"]["1-N Forgotten"]["answered"] == pytest.approx(
        summary["answered_locality"]
    )
    plain = scores.summarise(evaluated(setting(), records, free=False).rows)
    assert all(plain[name] is None for name in scores.ANSWERED)
    assert {name: plain[name] for name in scores.TEACHER_FORCED} == {
        name: summary[name] for name in scores.TEACHER_FORCED
    }
