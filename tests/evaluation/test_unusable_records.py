"""Records and cases that an evaluation cannot use: left out, named and counted, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from naive import OneAtATime, make_records, settings_of

from ibke_hf import EditCase, EditRequest
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import Hop
from ibke_hf.core.tokens import RequestError
from ibke_hf.evaluation.protocol import evaluate_records


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    return settings_of(tiny_model, tiny_tokenizer)


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
