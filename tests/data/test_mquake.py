"""MQuAKE: hops, their subjects, and what samples hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from native_records import mquake, read

from ibke_hf.core.records import PROTOCOL, EditCase, Hop
from ibke_hf.data.mquake import read_mquake

Json = dict[str, Any]


Find = Callable[[str], Path]


def test_mquake_hops_that_are_not_edited_are_supporting(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "mquake", mquake())
    edit = Hop("Oslo lies in", "Norway", "Q585", "P17", "Q20", subject="Oslo")
    known = Hop("The language of Norway is", "Norwegian", "Q20", "P37", "Q9043")
    assert record.id == "mquake-cf-7"
    assert record.edits == (replace(edit, format=PROTOCOL),)
    assert (record.locality, record.relation, record.metadata) == (
        (),
        "P17",
        {"original": "Danish"},
    )
    facts = (Hop("Oslo lies in", "Norway", "Q585", "P17", "Q20"), known)
    assert record.formatted(leading_space="auto").generality == tuple(
        EditCase(
            prompt,
            "Norwegian",
            ("Multi-Hop",),
            2,
            aliases=("norsk",),
            supporting=(known,),
            facts=facts,
            name="questions",
        )
        for prompt in ("Which language?", "What tongue?", "Q?")
    )


def test_mquake_hops_know_their_subject_where_the_prompt_spells_it(tmp_path: Path, native_data: Find) -> None:
    triples = mquake()["orig"]["new_triples"]
    labelled = [["Oslo", "country", "Norway"], ["the kingdom", "language", "Norwegian"]]
    orig = {"new_triples": triples, "edit_triples": triples[:1], "new_triples_labeled": labelled}
    (record,) = read(tmp_path, "mquake", mquake(orig=orig))
    assert [hop.subject for hop in record.generality[0].facts] == ["Oslo", None]
    records = list(read_mquake(native_data("mquake/mquake_cf_3k_200.json")))
    hops = [hop for record in records for case in record.generality for hop in case.supporting]
    assert len(hops) > 300
    assert sum(hop.subject is not None and hop.subject in hop.prompt for hop in hops) > 0.95 * len(hops)


def test_mquake_samples_hold_every_trap(native_data: Find) -> None:
    easy, hard = (list(read_mquake(native_data(f"mquake/mquake_{name}_200.json"))) for name in ("cf_3k", "hard"))
    assert Counter(len(record.requests) for record in easy) == {1: 123, 2: 72, 3: 5}
    assert Counter(len(record.requests) for record in hard) == {4: 200}
    for record in [*easy, *hard]:
        assert len(record.generality) == 3
        assert [edit.request() for edit in record.edits] == list(record.requests)  # one prompt each, none concatenated
        for case in record.generality:
            assert case.hops == len(case.facts) == len(record.requests) + len(case.supporting)
            assert case.prompt == case.prompt.strip()
            assert case.target not in case.aliases
    assert sum(not record.generality[0].aliases for record in easy) == 24
    asked: dict[str, set[str]] = {}
    for request in (request for record in hard for request in record.requests):
        asked.setdefault(request.prompt, set()).add(request.target)
    assert len(asked) < 800  # the same subject and relation across cases
    conflicting = {prompt for prompt, targets in asked.items() if len(targets) > 1}
    assert (
        sum(any(r.prompt in conflicting for r in record.requests) for record in hard) == 4
    )  # kept: who groups them decides


@pytest.mark.parametrize(
    "extra", [{"answer_extended": "Danish, Faroese"}, {"answer_extended": ["Danish"]}, {"of another": {"key": 1}}]
)
def test_mquake_keys_of_other_versions_change_nothing(tmp_path: Path, extra: Json) -> None:
    plain = read(tmp_path, "mquake", mquake())
    raw_record = mquake(**extra)
    raw_record["orig"]["edit_triples_idx"] = [0]
    assert read(tmp_path, "mquake", raw_record) == plain


def test_mquake_ids_of_different_files_differ(native_data: Find) -> None:
    ids = [{r.id for r in read_mquake(native_data(f"mquake/mquake_{name}_200.json"))} for name in ("cf_3k", "hard")]
    assert not ids[0] & ids[1]
    assert "mquake_cf_3k_200-1" in ids[0]
