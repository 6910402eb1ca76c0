"""A share of the training records is asked in a chat too; subjects that measure the editor stay out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATE
from record_files import CITIES, Json
from training_runs import record

from ibke_hf.core.records import EditRequest
from ibke_hf.data.sources import read_records
from ibke_hf.training.batches import AlsoInChat, RecordDataset
from ibke_hf.training.recipe import new_trainer, train_editor, training_arguments
from ibke_hf.training.settings import TrainingSettings

MEND = {"pred": "", "rephrase": "", "answers": [], "loc": "", "loc_ans": "", "cond": ""}
RECORDS = [record(i, generality=2, locality=1) for i in range(400)]


def test_a_share_of_the_records_is_asked_in_a_chat_too() -> None:
    dataset = AlsoInChat(RecordDataset(RECORDS), 0.5, {"enable_thinking": False})
    assert len(dataset) == 400
    asked = [dataset[i] for i in range(400)]
    assert asked == [dataset[i] for i in range(400)]
    in_chat = [(plain, turned) for plain, turned in zip(RECORDS, asked, strict=True) if len(turned.generality) == 3]
    assert 170 < len(in_chat) < 230
    assert all(a == b for a, b in zip(RECORDS, asked, strict=True) if len(b.generality) == 2)
    for plain, turned in in_chat:
        assert turned.requests == plain.requests and turned.edits == plain.edits
        first = turned.generality[0]
        assert (first.prompt, first.target) == (plain.requests[0].prompt, plain.requests[0].target)
        assert first.format.chat and first.format.chat_options == {"enable_thinking": False}
    for part in ("generality", "locality"):
        turns = [getattr(turned, part)[-1].format.chat for _, turned in in_chat]
        assert 70 < sum(turns) < 130
        kept = [getattr(turned, part)[-1] == getattr(plain, part)[-1] for plain, turned in in_chat]
        assert kept == [not turn for turn in turns]


def test_marks_of_teacher_forcing_are_not_said_in_a_chat(tmp_path: Path) -> None:
    row = {**MEND, "subject": "Rome", "src": "Where is Rome?", "rephrase": "Rome is where?", "alt": "x"}
    (tmp_path / "zsre.json").write_text(json.dumps([{**row, "loc": "nq question: who is it", "loc_ans": "y"}]))
    (plain,) = read_records(tmp_path / "zsre.json")
    turned = AlsoInChat([plain], 1.0, {}).in_chat(plain)
    assert turned.requests == plain.requests and turned.requests[0].prompt == "Where is Rome? The answer is: "
    in_chat = [case.prompt for case in (*turned.generality, *turned.locality) if case.format.chat]
    assert "Where is Rome?" in in_chat
    assert not any("The answer is" in prompt or "nq question" in prompt for prompt in in_chat)


def test_every_record_or_none() -> None:
    assert [AlsoInChat(RECORDS, 0.0, {})[i] for i in range(400)] == RECORDS
    assert all(len(AlsoInChat(RECORDS, 1.0, {})[i].generality) == 3 for i in range(400))


@pytest.mark.parametrize(
    ("template", "chosen", "expected"),
    [(TEMPLATE, {}, True), (TEMPLATE, {"chat_share": 0.0}, False), (None, {}, False)],
)
def test_training_asks_in_a_chat_where_there_is_a_template(
    settings: Json,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    chosen: Json,
    expected: bool,
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    tiny_tokenizer.save_pretrained(settings["backbone"])
    checked = TrainingSettings.of({**settings, **chosen})
    trainer = new_trainer(checked, training_arguments(checked))
    records = trainer.train_dataset.records
    assert isinstance(records, AlsoInChat) == expected
    turns = [case.format.chat for i in range(len(records)) for case in records[i].generality]
    assert any(turns) == expected
    assert {type(request) for i in range(len(records)) for request in records[i].requests} == {EditRequest}


def test_subjects_of_given_records_are_not_trained_on(settings: Json, tmp_path: Path) -> None:
    rows = [{**MEND, "subject": city, "src": f"Where is {city}?", "alt": "x"} for city in CITIES[:4]]
    (tmp_path / "trained.json").write_text(json.dumps(rows))
    (tmp_path / "measured.json").write_text(json.dumps(rows[1:3]))
    files = {"records": str(tmp_path / "trained.json"), "without": str(tmp_path / "measured.json")}
    checked = TrainingSettings.of({**settings, **files})
    records = new_trainer(checked, training_arguments(checked)).train_dataset.records
    trained = {subject for i in range(len(records)) for subject in records[i].subjects}
    assert trained == {CITIES[0].casefold(), CITIES[3].casefold()}


def test_a_share_that_cannot_be_is_refused(settings: Json) -> None:
    with pytest.raises(ValueError, match=r"chat_share must be from 0 to 1, found 1\.5"):
        train_editor({**settings, "chat_share": 1.5})
