"""CounterFact: native and flat records, their lists of cases and their targets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from native_records import read, rewrite, rome

from ibke_hf.core.records import PROTOCOL, EditRecord, EditRequest
from ibke_hf.data.counterfact import read_counterfact, rephrase_kind

Find = Callable[[str], Path]


@pytest.fixture
def native(native_data: Find) -> dict[str, EditRecord]:
    return {record.id: record for record in read_counterfact(native_data("counterfact/rome_native_200.json"))}


@pytest.fixture
def flat(native_data: Find) -> dict[str, EditRecord]:
    files = [native_data(f"counterfact/easyedit_flat_{name}.json") for name in ("500", "train", "val")]
    return {record.id: record for file in files for record in read_counterfact(file)}


def test_counterfact_native_prompts_are_filled_and_flat_ones_are_kept(
    native: dict[str, EditRecord], flat: dict[str, EditRecord]
) -> None:
    shared = native.keys() & flat.keys()
    assert len(shared) == 200
    for key in shared:
        assert native[key].requests == flat[key].requests
        assert native[key].metadata == flat[key].metadata
        (asked,) = flat[key].locality
        assert (asked.prompt, asked.target) in {
            (c.prompt, c.target) for c in native[key].locality if c.name == "neighborhood_prompts"
        }
    angola = native["20952"]
    assert angola.requests == (EditRequest("Angola is located in", "Antarctica", "Angola", PROTOCOL),)
    assert (angola.kind, angola.relation, angola.metadata) == ("counterfactual", "P30", {"original": "Africa"})


def test_counterfact_lists_are_answered_with_the_right_object(native: dict[str, EditRecord]) -> None:
    for record in native.values():
        answers = {
            name: {c.target for c in record.generality + record.locality if c.name == name}
            for name in ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts")
        }
        new = {record.requests[0].target}
        assert answers == {
            "paraphrase_prompts": new,
            "neighborhood_prompts": {record.metadata["original"]},
            "attribute_prompts": new,
        }


def test_counterfact_targets_have_no_space_of_their_own_and_prompts_keep_their_line_breaks(
    native: dict[str, EditRecord], flat: dict[str, EditRecord]
) -> None:
    for records, breaks in ((native, 74), (flat, 316)):
        assert not any(record.requests[0].target.startswith(" ") for record in records.values())
        assert sum("\n" in case.prompt for record in records.values() for case in record.generality) == breaks


def test_rephrase_kinds_are_those_of_the_native_records(
    native: dict[str, EditRecord], flat: dict[str, EditRecord], native_data: Find
) -> None:
    for record in json.loads(native_data("counterfact/rome_native_200.json").read_text(encoding="utf-8")):
        subject = record["requested_rewrite"]["subject"]
        assert {rephrase_kind(prompt, subject) for prompt in record["paraphrase_prompts"]} == {"Paraphrase"}
        assert {rephrase_kind(prompt, subject) for prompt in record["generation_prompts"]} == {"Generation Prompt"}
    for key, record in native.items():
        (case,) = flat[key].generality
        paraphrase = case.prompt in {c.prompt for c in record.generality}
        assert case.criteria == ("Rephrase", "Paraphrase" if paraphrase else "Generation Prompt")
    kinds = Counter(record.generality[0].criteria[1] for record in flat.values())
    assert kinds["Generation Prompt"] > 4 * kinds["Paraphrase"]  # most are no paraphrases


def test_a_subject_with_braces_fills_its_place(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "counterfact", rome(requested_rewrite=rewrite(subject="{x} {}")))
    assert record.requests[0].prompt == "{x} {} lies in"
