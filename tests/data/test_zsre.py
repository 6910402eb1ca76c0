"""ZSRE: the records of MEND and of KnowEdit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_records import knowedit, read

from ibke_hf.core.records import PROTOCOL, EditCase, EditRequest
from ibke_hf.data.zsre import ANSWER, read_zsre

Find = Callable[[str], Path]


def test_mend_records_have_two_spaces_before_the_target(native_data: Find, tiny_tokenizer: Any) -> None:
    from ibke_hf.core.tokens import encode

    records = list(read_zsre(native_data("zsre/zsre_mend_train_500.json")))
    spaced = [record for record in records if record.requests[0].target.startswith(" ")]
    assert len(spaced) == 10  # kept as they are: one more space would be added by no one
    for record in [records[0], spaced[0]]:
        request, (rephrase,), (local,) = record.requests[0], record.generality, record.locality
        assert request.prompt.endswith(f"?{ANSWER}")
        assert rephrase.prompt.endswith(f"?{ANSWER}")
        assert rephrase.target == request.target
        ids, _ = encode(tiny_tokenizer, request.prompt, request.target, prompt_format=request.format)
        assert f"? The answer is:  {request.target.strip()}" in tiny_tokenizer.decode(ids)
        assert local.prompt.startswith("nq question: ")
        assert ANSWER not in local.prompt


def test_mend_edits_go_toward_alt(native_data: Find) -> None:
    file = native_data("zsre/zsre_mend_train_500.json")
    raw = json.loads(file.read_text(encoding="utf-8"))
    records = {record.id: record for record in read_zsre(file)}
    assert [i for i in range(500) if f"zsre_mend_train_500-{i}" not in records] == [
        i for i, r in enumerate(raw) if not r["alt"]
    ]
    for i, value in enumerate(raw):
        if value["alt"]:
            record = records[f"zsre_mend_train_500-{i}"]  # positions count the skipped ones
            assert record.requests == (EditRequest(value["src"] + ANSWER, value["alt"], value["subject"], PROTOCOL),)
            assert record.metadata == {"original": value["answers"][0]}
            assert record.locality[0].target == value["loc_ans"]
    assert sum(r["alt"] in r["answers"] for r in raw) == 13  # such edits stay
    assert sum(len(r["answers"]) > 1 for r in raw) == 22


@pytest.mark.parametrize("truth", ["Norse", ["Norse", "Old Norse", "Norse", ""]])
def test_knowedit_truth_is_a_text_or_a_list_at_either_level(tmp_path: Path, truth: Any) -> None:
    aliases = () if isinstance(truth, str) else ("Old Norse",)
    asked = [{"prompt": "What do they speak?", "ground_truth": truth}]
    raw_record = knowedit(
        ground_truth=truth, portability={"Reasoning": asked, "Subject_Aliasing": []}, locality={"Forgetfulness": asked}
    )
    (record,) = read(tmp_path, "zsre", raw_record)
    assert record.requests == (EditRequest("Where does Oslo lie?", "Norway", "Oslo", PROTOCOL),)
    assert record.metadata == {"original": "Norse"}
    assert record.generality == (
        EditCase("Where is Oslo?", "Norway", ("Rephrase",), name="rephrase_prompt", format=PROTOCOL),
        EditCase("What do they speak?", "Norse", ("Reasoning",), aliases=aliases, name="Reasoning", format=PROTOCOL),
    )
    assert record.locality == (
        EditCase(
            "What do they speak?", "Norse", ("1-N Forgotten",), aliases=aliases, name="Forgetfulness", format=PROTOCOL
        ),
    )


def test_knowedit_groups_may_be_absent(tmp_path: Path) -> None:
    raw_record = knowedit()
    del raw_record["portability"], raw_record["locality"], raw_record["rephrase_prompt"], raw_record["ground_truth"]
    (record,) = read(tmp_path, "zsre", raw_record)
    assert (record.generality, record.locality, record.metadata) == ((), (), {})
