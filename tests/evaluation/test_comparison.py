"""Questions, marks and scale factors: what the page shows agrees with the model and the editor asked directly."""

from __future__ import annotations

import pytest
import torch
from small_workbench import FORM, small_workbench

from ibke_hf.analysis.scale_factors import scale_factors, token_texts
from ibke_hf.app.forms import Form
from ibke_hf.atlas.examples import NEIGHBOURS, RELATIONS, example_records
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, encode_requests
from ibke_hf.data.uniedit import YES_NO
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.evaluation import comparison
from ibke_hf.evaluation.comparison import (
    PageQuestion,
    compare_answers,
    is_right,
    questions_of,
    require_askable,
)
from ibke_hf.evaluation.inspection import answer, top_predictions

REQUEST = EditRequest("The capital of France is", "Rome")


@pytest.fixture(scope="module")
def bench(tiny_model, tiny_tokenizer):
    return small_workbench(tiny_model, tiny_tokenizer)


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_read_a_line_each():
    parsed = questions_of(
        REQUEST,
        "Which city? -> Roma | Rome\n\n  Its capital is ",
        "a -> b -> c\nopen → \nbare",
        "stays\nstays too → 3",
    )
    assert parsed == (
        PageQuestion("request", "The capital of France is", ("Rome",)),
        PageQuestion("rephrase", "Which city?", ("Roma", "Rome")),
        PageQuestion("rephrase", "Its capital is", ("Rome",)),
        PageQuestion("consequence", "a -> b", ("c",)),
        PageQuestion("consequence", "open"),
        PageQuestion("consequence", "bare"),
        PageQuestion("neighbour", "stays"),
        PageQuestion("neighbour", "stays too", ("3",)),
    )


def test_unreadable_questions_are_named():
    with pytest.raises(RequestError, match=r"consequence 2: nothing is asked before the arrow \('-> b'\)"):
        questions_of(REQUEST, "fine", "one\n -> b")
    with pytest.raises(RequestError, match=f"more than the {comparison.MAX_QUESTIONS - 1}"):
        questions_of(REQUEST, "again\n" * 40)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (PageQuestion("request", "x" * 3000, ("y",)), "the fact: 3000 characters"),
        (PageQuestion("rephrase", "half \ud83d of an emoji"), "rephrase 1: .*surrogate"),
        (PageQuestion("neighbour", "word " * 150), r"neighbour 1: \d+ tokens leave no room .* \d+ would"),
        (PageQuestion("neighbour", "short", ("long " * 200,)), "neighbour 1: "),
    ],
)
def test_questions_that_cannot_be_asked_are_named(bench, question, message):
    with pytest.raises(RequestError, match=message):
        require_askable(bench.model, bench.tokenizer, [question])


def test_any_script_can_be_asked(bench):
    texts = ("富士山は", "Où est Zürich ?", "Ответ: 🗼🏔️", "<script>alert(1)</script>", "مرحبا", "${1+1} {{x}} %s \\")
    questions = [PageQuestion("neighbour", text, ("東京 🗼",)) for text in texts]
    require_askable(bench.model, bench.tokenizer, questions)
    edit = bench.editor.edit(bench.model, bench.tokenizer, [EditRequest("富士山 🏔️", "東京 🗼")])
    assert [row["prompt"] for row in compare_answers(bench.model, bench.tokenizer, questions, edit)] == list(texts)


def test_examples_survive_being_typed_in():
    records = example_records()
    assert len(records) == len(RELATIONS)
    for record in records:
        form = Form.of_record(record)
        questions = form.fact().questions
        cases = (*record.generality, *record.locality)
        asked = {question.prompt: question.answers for question in questions[1:]}
        assert asked == {case.prompt: tuple(dict.fromkeys((case.target, *case.aliases))) for case in cases}
        assert (questions[0].prompt, questions[0].answers) == (record.requests[0].prompt, (record.requests[0].target,))
        roles = [question.role for question in questions]
        assert roles.count("rephrase") >= 1
        assert roles.count("consequence") >= 1
        assert roles.count("neighbour") >= NEIGHBOURS
        assert not any(YES_NO in question.prompt for question in questions)


# --- before and after -----------------------------------------------------------------------------------------------


def test_rows_agree_with_the_model_asked_directly(bench):
    model, tokenizer = bench.model, bench.tokenizer
    fact = FORM.fact()
    edit = bench.editor.edit(model, tokenizer, [fact.request])
    rows = compare_answers(model, tokenizer, fact.questions, edit)
    assert [row["role"] for row in rows] == ["request", "rephrase", "consequence", "neighbour", "neighbour"]
    changed = 0
    for question, row in zip(fact.questions, rows, strict=True):
        before = _asked_directly(model, tokenizer, question)
        with edit.attached(model):
            after = _asked_directly(model, tokenizer, question)
        for reading, (text, top) in ((row["before"], before), (row["after"], after)):
            assert reading["answer"] == next((line.strip() for line in text.splitlines() if line.strip()), "")
            assert [token for token, _ in reading["top"]] == [token for token, _ in top]
            assert [p for _, p in reading["top"]] == pytest.approx([p for _, p in top], abs=1e-5)
        changed += row["before"]["top"] != row["after"]["top"]
        assert row["right"] == is_right(question, row["before"]["answer"], row["after"]["answer"])
    assert changed == len(rows)


def _asked_directly(model, tokenizer, question):
    names = [len(tokenizer(f" {name}")["input_ids"]) for name in question.answers] or [
        comparison.TOKENS_WITHOUT_ANSWER
    ]
    return answer(model, tokenizer, question.prompt, max_new_tokens=max(names) + 3), top_predictions(
        model, tokenizer, question.prompt
    )


def test_without_an_edit_nothing_differs(bench):
    rows = compare_answers(bench.model, bench.tokenizer, FORM.fact().questions, None)
    assert all(row["before"] == row["after"] for row in rows)


@pytest.mark.parametrize(
    ("role", "answers", "before", "after", "right"),
    [
        ("request", ("Rome",), "Paris", "Rome, of course", True),
        ("request", ("Rome",), "Paris", "Romeo", False),
        ("rephrase", ("Roma", "Rome"), "", "Rome", True),
        ("consequence", (), "a", "b", None),
        ("question", (), "a", "b", None),
        ("neighbour", (), "Oslo", "Oslo", True),
        ("neighbour", ("Oslo",), "Bern", "Oslo", False),
    ],
)
def test_marks(role, answers, before, after, right):
    assert is_right(PageQuestion(role, "prompt", answers), before, after) is right


# --- scale factors --------------------------------------------------------------------------------------------------


def test_scale_factors_are_the_gates_of_the_edit(bench):
    model, tokenizer, editor = bench.model, bench.tokenizer, bench.editor
    previous = editor.edit(model, tokenizer, [EditRequest("An oak is a", "metal")])
    plain, later = (scale_factors(editor, model, tokenizer, REQUEST, edit) for edit in (None, previous))
    batch = encode_requests(tokenizer, [REQUEST])
    assert "".join(plain["tokens"]) == tokenizer.decode(batch.input_ids[0])
    assert sum(plain["judged"]) == int((batch.labels != -100).sum())
    assert list(plain["layers"]) == editor.config.module_names()
    adapted = editor(editor.capture(model, batch))
    for values, factors in zip(plain["layers"].values(), adapted, strict=True):
        assert values == factors.gates[0].sigmoid().tolist()
        assert all(0 < value < 1 for value in values)
    assert later["layers"] != plain["layers"]


def test_editors_without_a_scale_factor_have_none(bench):
    mend = MENDEditor.for_backbone(bench.model, hidden_dim=8, standardise=False)
    for editor in (mend, bench.fine_tuning):
        assert scale_factors(editor, bench.model, bench.tokenizer, REQUEST) is None


def test_a_character_of_several_tokens_stands_once(tiny_tokenizer):
    ids = tiny_tokenizer("a 富🗼 b")["input_ids"]
    texts = token_texts(tiny_tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).replace("·", "") == "a 富🗼 b"
    assert texts.count("·") == 2 + 3


def test_reading_leaves_no_trace(bench):
    ids = bench.tokenizer(REQUEST.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = bench.model(input_ids=ids).logits
    edit = bench.editor.edit(bench.model, bench.tokenizer, [REQUEST])
    compare_answers(bench.model, bench.tokenizer, FORM.fact().questions, edit)
    scale_factors(bench.editor, bench.model, bench.tokenizer, REQUEST, edit)
    with torch.no_grad():
        assert torch.equal(before, bench.model(input_ids=ids).logits)
