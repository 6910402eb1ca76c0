"""The readers of CounterFact, ZSRE and MQuAKE, on real samples and on every trap of PROTOCOL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.core.records import PROTOCOL, EditCase, EditRecord, EditRequest, Hop
from ibke_hf.data.counterfact import read_counterfact, rephrase_kind
from ibke_hf.data.fields import RecordError
from ibke_hf.data.mquake import read_mquake
from ibke_hf.data.sources import read_records
from ibke_hf.data.zsre import ANSWER, read_zsre

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


# --- CounterFact ----------------------------------------------------------------------------------------------------


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


def rewrite(**changes: Any) -> Json:
    return {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "Norway", "id": "Q20"},
        "target_true": {"str": "Denmark", "id": "Q35"},
        "subject": "Oslo",
        **changes,
    }


def rome(**changes: Any) -> Json:
    return {
        "case_id": 7,
        "requested_rewrite": rewrite(),
        "paraphrase_prompts": ["A. Oslo is in"],
        "neighborhood_prompts": ["Ribe is in"],
        "attribute_prompts": ["Bergen is in"],
        "generation_prompts": [],
        **changes,
    }


def easyedit(**changes: Any) -> Json:
    return {
        "case_id": 7,
        "prompt": "Oslo lies in",
        "target_new": "Norway",
        "subject": "Oslo",
        "ground_truth": "Denmark",
        "rephrase_prompt": "People in Oslo speak",
        "locality_prompt": "Ribe is in",
        "locality_ground_truth": "Denmark",
        **changes,
    }


def mend(**changes: Any) -> Json:
    return {
        "subject": "Oslo",
        "src": "Where does Oslo lie?",
        "pred": "Denmark",
        "rephrase": "Where is Oslo?",
        "alt": "Norway",
        "answers": ["Denmark"],
        "loc": "nq question: who sang it",
        "loc_ans": "Abba",
        "cond": "",
        **changes,
    }


def knowedit(**changes: Any) -> Json:
    return {
        "subject": "Oslo",
        "target_new": "Norway",
        "prompt": "Where does Oslo lie?",
        "ground_truth": ["Denmark"],
        "rephrase_prompt": "Where is Oslo?",
        "locality": {},
        "portability": {},
        **changes,
    }


def mquake(**changes: Any) -> Json:
    def hop(cloze: str, answer: str, *aliases: str) -> Json:
        return {"question": f"{cloze}?", "cloze": cloze, "answer": answer, "answer_alias": list(aliases)}

    triples = [["Q585", "P17", "Q20"], ["Q20", "P37", "Q9043"]]
    return {
        "case_id": 7,
        "requested_rewrite": [{**rewrite(), "question": "Where?"}],
        "questions": ["Which language? ", "What tongue?", "Q?"],
        "answer": "Danish",
        "answer_alias": [],
        "new_answer": "Norwegian",
        "new_answer_alias": ["Norwegian", "norsk", "norsk"],
        "single_hops": [],
        "new_single_hops": [hop("Oslo lies in", "Norway"), hop("The language of Norway is", "Norwegian")],
        "orig": {"new_triples": triples, "edit_triples": triples[:1]},
        **changes,
    }


READERS = {"counterfact": read_counterfact, "zsre": read_zsre, "mquake": read_mquake}


def read(folder: Path, dataset: str, *records: Any, skipped: Counter[str] | None = None) -> list[EditRecord]:
    file = folder / f"{dataset}-cf.v2.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return list(READERS[dataset](file, skipped))


def test_a_subject_with_braces_fills_its_place(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "counterfact", rome(requested_rewrite=rewrite(subject="{x} {}")))
    assert record.requests[0].prompt == "{x} {} lies in"


# --- ZSRE -----------------------------------------------------------------------------------------------------------


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


# --- MQuAKE ---------------------------------------------------------------------------------------------------------


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
