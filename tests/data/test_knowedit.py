"""KnowEdit's files and QAEdit's, real ones where they lie beside this checkout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.data.fields import RecordError
from ibke_hf.data.qaedit import stripped
from ibke_hf.data.sources import read_records, recognise

Find = Callable[[str], Path]
EDIT = {"subject": "Oslo", "prompt": "Oslo lies in", "target_new": "Norway"}


def written(folder: Path, record: Any) -> Path:
    file = folder / "made.json"
    file.write_text(json.dumps([record]))
    return file


@pytest.mark.parametrize(
    ("name", "format_name", "dataset", "records", "cases"),
    [
        ("zsre_test_1000", "zsre", "zsre", 1000, 4000),
        ("wiki_recent_train", "knowedit", "knowedit", 570, 2690),
        ("wiki_counterfact_train", "knowedit", "knowedit", 1428, 4253),
    ],
)
def test_every_file_of_knowedit_is_read(
    native_data: Find, name: str, format_name: str, dataset: str, records: int, cases: int
) -> None:
    file = native_data(f"knowedit/{name}.json")
    assert recognise(file) == format_name
    skipped: Counter[str] = Counter()
    read = list(read_records(file, skipped=skipped))
    assert len(read) == records
    assert {record.dataset for record in read} == {dataset}
    assert sum(len(record.generality) + len(record.locality) for record in read) == cases
    assert sum(skipped.values()) == {"zsre_test_1000": 0, "wiki_recent_train": 7, "wiki_counterfact_train": 2}[name]


@pytest.mark.parametrize(
    ("truth", "names"),
    [
        ("Norse", ("Norse",)),
        (["Norse", "norsk"], ("Norse", "norsk")),
        ([["Norse", "norsk"], ["Danish"], []], ("Norse", "norsk", "Danish")),
    ],
)
def test_answers_are_texts_lists_or_lists_of_lists(tmp_path: Path, truth: Any, names: tuple[str, ...]) -> None:
    locality = {"Relation_Specificity": [{"prompt": "They speak", "ground_truth": truth}]}
    (record,) = read_records(written(tmp_path, {**EDIT, "portability": {}, "locality": locality}))
    (case,) = record.locality
    assert (case.target, *case.aliases) == names
    assert case.criteria == ("Relation Specificity",)


def test_case_without_an_answer_is_counted(tmp_path: Path) -> None:
    skipped: Counter[str] = Counter()
    locality = {"Forgetfulness": [{"prompt": "They speak", "ground_truth": [[]]}]}
    (record,) = read_records(written(tmp_path, {**EDIT, "portability": {}, "locality": locality}), skipped=skipped)
    assert not record.locality
    assert skipped == {"Forgetfulness case with an empty prompt or target": 1}


def test_biographies_are_read(tmp_path: Path) -> None:
    locality = {"Relation_Specificity": [{"prompt": "Oslo lies in", "ground_truth": [["Norway"]]}]}
    biography = {"text": "Ada was", "labels": "a mathematician", "concept": "Ada", "locality": locality}
    (record,) = read_records(written(tmp_path, biography))
    request = record.requests[0]
    assert (request.prompt, request.target, request.subject) == ("Ada was", "a mathematician", "Ada")
    assert record.locality[0].target == "Norway"


def test_an_answer_of_another_type_is_named(tmp_path: Path) -> None:
    locality = {"A": [{"prompt": "They speak", "ground_truth": [["Norse", {"x": 1}]]}]}
    with pytest.raises(
        RecordError, match=r"made\.json: record 'made-0': field 'locality\.A\[0\]\.ground_truth\[0\]\[1\]"
    ):
        list(read_records(written(tmp_path, {**EDIT, "portability": {}, "locality": locality})))


# --- QAEdit ---------------------------------------------------------------------------------------------------------


def test_qaedit_is_read(native_data: Find) -> None:
    file = native_data("qaedit/qaedit_700.json")
    skipped: Counter[str] = Counter()
    records = list(read_records(file, skipped=skipped))
    assert recognise(file) == "qaedit"
    assert len(records) == len({record.id for record in records}) == 700  # of the file's own ids, 19 occur twice
    first = records[0]
    assert first.requests[0].target == "Lord Snooty"
    assert first.generality[0].criteria == ("Rephrase",)
    assert first.metadata == {"id": "9712", "source": "TQA"}
    assert Counter(len(record.locality) for record in records) == {5: 699, 4: 1}
    assert skipped == {"locality case with an empty prompt or target": 1}  # its answer is "*"
    targets = [case.target for record in records for case in (*record.requests, *record.locality)]
    assert all(target == target.strip() and not target.endswith((" *", " .")) for target in targets)


@pytest.mark.parametrize(
    ("answer", "clean"),
    [
        ("Paris *", "Paris"),
        (" Paris ", "Paris"),
        ("Rollins Jr .", "Rollins Jr"),
        ("Rollins Jr.", "Rollins Jr."),
        ("1,376 * ", "1,376"),
        ("C*", "C*"),
        ("Till (seed)", "Till (seed)"),
        ("*", ""),
    ],
)
def test_noise_at_the_end_of_an_answer_is_stripped(answer: str, clean: str) -> None:
    assert stripped(answer) == clean
