"""The readers of CounterFact, ZSRE and MQuAKE, on real samples and on every trap of PROTOCOL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_records import easyedit, knowedit, mend, mquake, read, rewrite, rome

from ibke_hf.data.fields import RecordError
from ibke_hf.data.sources import read_records

Json = dict[str, Any]
Find = Callable[[str], Path]
UNSCORED = {"generation prompt without a target": 2000}
NO_ALT = {"edit with an empty prompt or target": 2}


# --- every sample, whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dataset", "records", "requests", "lists", "left_out"),
    [
        (
            "counterfact/rome_native_200.json",
            "counterfact",
            200,
            200,
            {"paraphrase_prompts": 400, "neighborhood_prompts": 2000, "attribute_prompts": 2000},
            UNSCORED,
        ),
        (
            "counterfact/easyedit_flat_500.json",
            "counterfact",
            500,
            500,
            {"rephrase_prompt": 500, "locality_prompt": 500},
            {},
        ),
        (
            "counterfact/easyedit_flat_train.json",
            "counterfact",
            10000,
            10000,
            {"rephrase_prompt": 10000, "locality_prompt": 10000},
            {},
        ),
        (
            "counterfact/easyedit_flat_val.json",
            "counterfact",
            1919,
            1919,
            {"rephrase_prompt": 1919, "locality_prompt": 1919},
            {},
        ),
        ("zsre/zsre_mend_train_500.json", "zsre", 498, 498, {"rephrase": 498, "loc": 498}, NO_ALT),
        ("zsre/zsre_mend_eval_24.json", "zsre", 24, 24, {"rephrase": 24, "loc": 24}, {}),
        (
            "zsre/knowedit_zsre_test_100.json",
            "zsre",
            100,
            100,
            {
                "rephrase_prompt": 100,
                "Reasoning": 34,
                "Subject_Aliasing": 34,
                "Logical_Generalization": 32,
                "Relation_Specificity": 200,
            },
            {},
        ),
        ("mquake/mquake_cf_3k_200.json", "mquake", 200, 282, {"questions": 600}, {}),
        ("mquake/mquake_hard_200.json", "mquake", 200, 800, {"questions": 600}, {}),
        ("uniedit/SYNTHETIC_schema_example.json", "uniedit", 4, 4, {"uni_gen": 4, "uni_loc": 4}, {}),
    ],
)
def test_samples_are_read_whole(
    native_data: Find, name: str, dataset: str, records: int, requests: int, lists: Json, left_out: Json
) -> None:
    skipped: Counter[str] = Counter()
    loaded = list(read_records(native_data(name), skipped=skipped))
    assert len({record.id for record in loaded}) == len(loaded) == records
    assert {record.dataset for record in loaded} == {dataset}
    assert sum(len(record.requests) for record in loaded) == requests
    assert Counter(case.name for record in loaded for case in record.generality + record.locality) == lists
    assert skipped == left_out


# --- what is skipped, what is wrong ---------------------------------------------------------------------------------

EMPTY = "edit with an empty prompt, target or subject"


@pytest.mark.parametrize("blank", ["", None, " \n"])
@pytest.mark.parametrize(
    ("dataset", "make", "reason"),
    [
        ("counterfact", lambda b: rome(requested_rewrite=rewrite(target_new={"str": b, "id": ""})), EMPTY),
        ("counterfact", lambda b: rome(requested_rewrite=rewrite(prompt=b)), EMPTY),
        (
            "counterfact",
            lambda b: rome(requested_rewrite=rewrite(target_true={"str": b, "id": ""})),
            "neighborhood_prompts case with an empty prompt or target",
        ),
        ("counterfact", lambda b: easyedit(target_new=b), EMPTY),
        ("counterfact", lambda b: easyedit(rephrase_prompt=b), "rephrase_prompt case with an empty prompt or target"),
        (
            "counterfact",
            lambda b: easyedit(locality_ground_truth=b),
            "locality_prompt case with an empty prompt or target",
        ),
        ("zsre", lambda b: mend(alt=b), "edit with an empty prompt or target"),
        ("zsre", lambda b: mend(rephrase=b), "rephrase case with an empty prompt or target"),
        ("zsre", lambda b: mend(loc_ans=b), "loc case with an empty prompt or target"),
        ("zsre", lambda b: knowedit(target_new=b), "edit with an empty prompt or target"),
        (
            "zsre",
            lambda b: knowedit(portability={"Reasoning": [{"prompt": b, "ground_truth": "x"}]}),
            "Reasoning case with an empty prompt or target",
        ),
        (
            "zsre",
            lambda b: knowedit(locality={"A": [{"prompt": "x", "ground_truth": [b or ""]}]}),
            "A case with an empty prompt or target",
        ),
        (
            "mquake",
            lambda b: mquake(requested_rewrite=[rewrite(subject=b)]),
            "record with an edit of an empty prompt, target or subject",
        ),
        ("mquake", lambda b: mquake(questions=[b or ""]), "questions case with an empty prompt or target"),
    ],
)
def test_blank_texts_are_skipped_and_counted(
    tmp_path: Path, blank: Any, dataset: str, make: Callable[[Any], Json], reason: str
) -> None:
    skipped: Counter[str] = Counter()
    (whole,) = read(tmp_path, dataset, make("{} text"))
    loaded = read(tmp_path, dataset, make(blank), skipped=skipped)
    assert skipped == {reason: 1}
    cases = [len(r.generality + r.locality) for r in loaded]
    assert cases == ([len(whole.generality + whole.locality) - 1] if " case " in reason else [])


def test_a_blank_supporting_hop_leaves_out_the_questions(tmp_path: Path) -> None:
    raw_record, skipped = mquake(), Counter()
    raw_record["new_single_hops"][1]["cloze"] = ""
    (record,) = read(tmp_path, "mquake", raw_record, skipped=skipped)
    assert record.generality == ()
    assert skipped == {"questions case with an empty supporting hop": 3}


def without(record: Json, *path: Any) -> Json:
    *folders, last = path
    inner = record
    for key in folders:
        inner = inner[key]
    del inner[last]
    return record


@pytest.mark.parametrize(
    ("dataset", "record", "what"),
    [
        ("counterfact", [], "record '0': the record is not an object, found []"),
        ("counterfact", without(rome(), "case_id"), "record '0': field 'case_id' is missing"),
        ("counterfact", rome(case_id=True), "record '0': field 'case_id' is not a number or text, found true"),
        (
            "counterfact",
            rome(requested_rewrite=rewrite(prompt="Oslo lies in")),
            (
                "record '7': field 'requested_rewrite.prompt' must hold exactly one {} for the subject, found \"Oslo "
                'lies in"'
            ),
        ),
        (
            "counterfact",
            rome(requested_rewrite=rewrite(prompt="{} lies in {}")),
            "record '7': field 'requested_rewrite.prompt' must hold exactly one",
        ),
        (
            "counterfact",
            rome(requested_rewrite=rewrite(target_new="Norway")),
            "record '7': field 'requested_rewrite.target_new' is not an object",
        ),
        ("counterfact", without(rome(), "attribute_prompts"), "record '7': field 'attribute_prompts' is missing"),
        (
            "counterfact",
            rome(paraphrase_prompts=["a", 5]),
            "record '7': field 'paraphrase_prompts[1]' is not a text, found 5",
        ),
        ("counterfact", without(easyedit(), "locality_prompt"), "record '7': field 'locality_prompt' is missing"),
        ("counterfact", easyedit(target_new=["x"]), "record '7': field 'target_new' is not a text, found [\"x\"]"),
        ("zsre", without(mend(), "alt"), "record 'zsre-cf-0': field 'alt' is missing"),
        ("zsre", mend(answers=[5]), "record 'zsre-cf-0': field 'answers[0]' is not a text, found 5"),
        ("zsre", without(knowedit(), "target_new"), "record 'zsre-cf-0': field 'target_new' is missing"),
        ("zsre", knowedit(locality={"A": {}}), "record 'zsre-cf-0': field 'locality.A' is not a list, found {}"),
        (
            "zsre",
            knowedit(portability={"A": [{"prompt": "x"}]}),
            "record 'zsre-cf-0': field 'portability.A[0].ground_truth' is missing",
        ),
        ("mquake", mquake(requested_rewrite=[]), "record 'mquake-cf-7': field 'requested_rewrite' is empty"),
        ("mquake", mquake(questions=[]), "record 'mquake-cf-7': field 'questions' is empty"),
        ("mquake", without(mquake(), "new_answer_alias"), "record 'mquake-cf-7': field 'new_answer_alias' is missing"),
        (
            "mquake",
            without(mquake(), "orig", "new_triples"),
            "record 'mquake-cf-7': field 'orig.new_triples' is missing",
        ),
        (
            "mquake",
            without(mquake(), "orig", "new_triples", 0),
            "record 'mquake-cf-7': field 'orig.new_triples' has 1 triples for 2 new_single_hops",
        ),
        (
            "mquake",
            without(mquake(), "orig", "new_triples", 1, 0),
            "record 'mquake-cf-7': field 'orig.new_triples[1]' is not a triple",
        ),
        (
            "mquake",
            without(mquake(), "orig", "edit_triples", 0),
            (
                "record 'mquake-cf-7': field 'orig.edit_triples' has no triple of the new object of "
                "requested_rewrite[0] (P17 Q20), found []"
            ),
        ),
    ],
)
def test_an_unreadable_record_is_named_by_file_record_and_field(
    tmp_path: Path, dataset: str, record: Any, what: str
) -> None:
    with pytest.raises(RecordError) as caught:
        read(tmp_path, dataset, record)
    assert str(caught.value).startswith(f"{tmp_path / dataset}-cf.v2.json: {what}")
