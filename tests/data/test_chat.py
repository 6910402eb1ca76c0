"""Records as a chat's user puts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ibke_hf import EditRecord
from ibke_hf.core.records import PromptFormat
from ibke_hf.data.chat import as_asked, bare_question
from ibke_hf.data.sources import read_records

ZSRE = {
    "subject": "Ada Hill",
    "src": "Which school did Ada Hill attend?",
    "rephrase": "Where did Ada Hill go to school?",
    "alt": "Yale",
    "answers": ["Oxford"],
    "loc": "nq question: who sings the song",
    "loc_ans": "Mary",
}


@pytest.fixture
def record(tmp_path: Path) -> EditRecord:
    file = tmp_path / "zsre.json"
    file.write_text(json.dumps([ZSRE]))
    return next(iter(read_records(file)))


def prompts(record: EditRecord) -> list[str]:
    return [case.prompt for case in (*record.requests, *record.generality, *record.locality)]


def test_in_a_chat_zsre_asks_the_bare_question_and_edits_it(record: EditRecord) -> None:
    chat = as_asked(record, chat=True)
    assert prompts(chat) == [ZSRE["src"], ZSRE["rephrase"], "who sings the song"]
    assert all(case.format.chat for case in (*chat.requests, *chat.generality, *chat.locality))
    assert chat.requests[0].subject == "Ada Hill"


def test_plain_text_stays_as_the_readers_have_it(record: EditRecord) -> None:
    assert as_asked(record) == record
    assert prompts(as_asked(record, leading_space="never")) == prompts(record)
    assert prompts(record)[0].endswith(" The answer is: ") and prompts(record)[2].startswith("nq question: ")


def test_a_record_that_is_a_chat_already_is_asked_like_one(record: EditRecord) -> None:
    assert as_asked(record.formatted(chat=True)) == as_asked(record, chat=True)
    assert as_asked(record, chat=True).requests[0].format == PromptFormat(
        True, {}, record.requests[0].format.leading_space
    )


@pytest.mark.parametrize(
    "prompt", ["The capital of France is", "Is Oslo in Norway? The answer is (Yes/No):", "The answer is: ", ""]
)
def test_other_prompts_are_left_alone(prompt: str) -> None:
    assert bare_question(prompt) == prompt


def test_real_records_have_no_marks_left(native_data: Callable[[str], Path]) -> None:
    for name in ("zsre/zsre_mend_eval_24.json", "zsre/knowedit_zsre_test_100.json", "qaedit/qaedit_700.json"):
        records = list(read_records(native_data(name), limit=50))
        asked = [prompt for one in records for prompt in prompts(as_asked(one, chat=True))]
        assert not any("nq question" in prompt or "The answer is" in prompt for prompt in asked)
        assert len(asked) == sum(len(prompts(one)) for one in records)
