"""The reader of UniEdit's native format, on every trap of FORMAT.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from uniedit_records import BERGEN, EDIT_HOP, NORWAY, OSLO, entity, fact, hop, read, record, single, write

from ibke_hf.data.sources import read_records
from ibke_hf.data.uniedit import YES_NO, RecordError, read_uniedit

Json = dict[str, Any]


# --- traps ----------------------------------------------------------------------------------------------------------


def test_extra_keys_and_tails_of_every_datatype_are_read(tmp_path: Path) -> None:
    tails = {
        "string": "C8",
        "math": "x^2",
        "quantity": {"amount": "+12.3", "unit": "1"},
        "globe-coordinate": {"latitude": 1.5},
        "monolingualtext": {"language": "en", "text": "motto"},
    }
    for datatype, value in tails.items():
        raw = record()
        raw["locality"]["0"]["one_hops"][0].update(fact(BERGEN, "p", value, datatype))
        (parsed,) = read(tmp_path, raw)
        assert parsed.locality[0].facts[0].tail == f"{datatype}:{value}"
        assert parsed.locality[0].aliases == ()
    (parsed,) = read(tmp_path, record())
    assert parsed.id == "geography-0"
    assert parsed.generality[0].criteria == ("Multi-Hop",)


@pytest.mark.parametrize(
    ("subject", "expected"), [("Oslo", "Oslo"), ("slo ", "slo"), ("", None), (" ", None), (None, None)]
)
def test_a_subject_may_be_a_fragment_or_empty(tmp_path: Path, subject: str | None, expected: str | None) -> None:
    raw = record()
    raw["edit"]["subject"] = subject
    (parsed,) = read(tmp_path, raw)
    assert parsed.requests[0].subject == expected
    del raw["edit"]["subject"]
    assert read(tmp_path, raw)[0].requests[0].subject is None


@pytest.mark.parametrize("empty", ["", None, "  \n"])
@pytest.mark.parametrize(
    ("where", "reason", "left"),
    [
        (("edit", "target"), "edit with an empty prompt or target", None),
        (("edit", "prompt"), "edit with an empty prompt or target", None),
        (("generality", "0", "target"), "uni_gen case with an empty prompt or target", (0, 1)),
        (("generality", "0", "prompt"), "uni_gen case with an empty prompt or target", (0, 1)),
        (("generality", "0", "one_hops", 1, "target"), "uni_gen case with an empty supporting hop", (0, 1)),
        (("locality", "0", "target"), "uni_loc case with an empty prompt or target", (1, 0)),
        (("locality", "0", "one_hops", 0, "target"), None, (1, 1)),  # nobody asks the hops of locality
    ],
)
def test_empty_texts_are_skipped_and_counted(
    tmp_path: Path, empty: str | None, where: tuple[Any, ...], reason: str | None, left: tuple[int, int] | None
) -> None:
    raw, skipped = record(), Counter()
    set_at(raw, where, empty)
    parsed = read(tmp_path, raw, record(), skipped=skipped)
    assert skipped == ({} if reason is None else {reason: 1})
    assert [(len(r.generality), len(r.locality)) for r in parsed] == [*([left] if left else []), (1, 1)]


def set_at(value: Any, where: tuple[Any, ...], new: Any) -> None:
    for key in where[:-1]:
        value = value[key]
    value[where[-1]] = new


def test_double_paths_have_no_paths_of_their_own(tmp_path: Path) -> None:
    raw = record()
    other = hop(["e_0", "r_0", "t_e"], "Bergen lies in", "Norway", fact(BERGEN, "country", NORWAY))
    speech = hop(
        ["t_e", "r_1", "e_1"], "The language of Norway is", "Norwegian", fact(NORWAY, "language", entity("Norwegian"))
    )
    raw["generality"]["0"] = {
        "path_type": "double",
        "prompt": "Is it?",
        "target": "Yes",
        "single_path1": single("a", "b", EDIT_HOP, speech),
        "single_path2": single("c", "d", other),
    }
    raw["locality"]["0"] = {"loc_type": "none", **raw["generality"]["0"], "target": "No"}
    (parsed,) = read(tmp_path, raw)
    case, local = parsed.generality[0], parsed.locality[0]
    assert (case.prompt, case.target, case.top_k, case.hops) == (
        f"Is it?{YES_NO}",
        "Yes",
        1,
        2,
    )  # the longer half counts
    assert case.criteria == ("Multi-Hop", "Same-Entity Reasoning")
    assert [h.prompt for h in case.supporting] == ["The language of Norway is", "Bergen lies in"]
    assert (local.prompt, local.target) == (f"Is it?{YES_NO}", "No")
    assert local.criteria == (
        "Subject Specificity",
        "Relation Specificity",
        "Object Specificity",
        "1-N Forgotten",
        "Multi-Hop",
        "Same-Entity Reasoning",
    )


@pytest.mark.parametrize(
    ("triple", "criteria"),
    [
        (fact(BERGEN, "mayor", entity("Marit")), ()),
        (fact(OSLO, "mayor", entity("Marit")), ("Subject Specificity",)),
        (fact(BERGEN, "twin", OSLO), ("Subject Specificity",)),
        (fact(BERGEN, "country", entity("Sweden")), ("Relation Specificity",)),
        (fact(NORWAY, "capital", BERGEN), ("Object Specificity",)),
        (fact(BERGEN, "part", NORWAY), ("Object Specificity",)),
        (fact(OSLO, "country", entity("Denmark")), ("Subject Specificity", "Relation Specificity", "1-N Forgotten")),
        (fact(BERGEN, "code", "Q-Oslo", "string"), ()),  # a text that looks like an id is none
    ],
)
def test_locality_criteria(tmp_path: Path, triple: Json, criteria: tuple[str, ...]) -> None:
    raw = record()
    raw["locality"]["0"] = single("a", "b", hop(["h_l", "r_l", "t_l"], "a", "b", triple), loc_type="none")
    assert read(tmp_path, raw)[0].locality[0].criteria == criteria


def test_object_specificity_needs_an_item(tmp_path: Path) -> None:
    raw = record()
    raw["edit"]["tail_entity"] = {"order_in_property": 0, "datatype": "string", "value": "Q-Bergen"}
    assert read(tmp_path, raw)[0].locality[0].criteria == ()


def test_a_reversed_hop_is_asked_forwards_and_answers_with_its_head(tmp_path: Path) -> None:
    raw = record()
    back = {**EDIT_HOP, "reverse_in_multi_hop": True, "reversed": {"prompt": "A city in Norway is", "target": "Oslo"}}
    raw["generality"]["0"] = {
        **single("A city in Norway is", "Oslo", back),
        "paths": [["t_e", "r_e", "h_e", "b", "m"]],
    }
    (parsed,) = read(tmp_path, raw)
    case = parsed.generality[0]
    assert case.criteria == ("Relation Reverse",)
    assert case.facts[0].prompt == "Oslo lies in"
    assert case.aliases == ("Christiania",)


@pytest.mark.parametrize("name", ["civil engineering.json", "civil engineering.json.gz"])
def test_a_domain_may_have_a_space_and_be_gzipped(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"7": record(), "1234": record()}, name)
    assert [(r.id, r.domain) for r in read_records(tmp_path)] == [
        (f"civil engineering-{key}", "civil engineering") for key in (7, 1234)
    ]


def test_text_of_other_scripts_is_kept(tmp_path: Path) -> None:
    raw = record()
    raw["edit"]["target"] = "Норвегия 🏔️"
    assert read(tmp_path, raw)[0].requests[0].target == "Норвегия 🏔️"


# --- what is wrong --------------------------------------------------------------------------------------------------


def without(*where: Any) -> Callable[[Json], None]:
    def remove(value: Any) -> None:
        for key in where[:-1]:
            value = value[key]
        del value[where[-1]]

    return remove


def with_(new: Any, *where: Any) -> Callable[[Json], None]:
    return lambda value: set_at(value, where, new)


HOP = ("generality", "0", "one_hops", 0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (without("edit"), "field 'edit' is missing"),
        (without("generality"), "field 'generality' is missing"),
        (without("edit", "head_entity", "id"), "field 'edit.head_entity.id' is missing"),
        (without("edit", "property"), "field 'edit.property' is missing"),
        (
            without(*HOP, "tail_entity", "value", "aliases"),
            "field 'generality.0.one_hops[0].tail_entity.value.aliases' is missing",
        ),
        (without(*HOP, "path"), "field 'generality.0.one_hops[0].path' is missing"),
        (
            without("generality", "0", "one_hops", 1, "reverse_in_multi_hop"),
            "field 'generality.0.one_hops[1].reverse_in_multi_hop' is missing",
        ),
        (without("locality", "0", "path_type"), "field 'locality.0.path_type' is missing"),
        (without("locality", "0", "paths"), "field 'locality.0.paths' is missing"),
        (with_([], "generality"), "field 'generality' is not an object, found []"),
        (with_("x", "generality", "0"), "field 'generality.0' is not an object, found \"x\""),
        (with_([], "generality", "0", "one_hops"), "field 'generality.0.one_hops' is empty"),
        (with_({}, "generality", "0", "one_hops"), "field 'generality.0.one_hops' is not a list, found {}"),
        (with_([], "locality", "0", "paths"), "field 'locality.0.paths' is empty"),
        (with_([1], "locality", "0", "paths", 0), "field 'locality.0.paths[0][0]' is not a text, found 1"),
        (with_(5, "edit", "target"), "field 'edit.target' is not a text, found 5"),
        (with_(["Oslo"], "edit", "subject"), "field 'edit.subject' is not a text, found [\"Oslo\"]"),
        (
            with_("Q1", *HOP, "tail_entity", "value"),
            "field 'generality.0.one_hops[0].tail_entity.value' is not an object, found \"Q1\"",
        ),
        (
            with_(7, *HOP, "head_entity", "id"),
            "field 'generality.0.one_hops[0].head_entity.id' is not a text, found 7",
        ),
        (with_(None, "edit", "tail_entity"), "field 'edit.tail_entity' is not an object, found null"),
        (with_("double", "generality", "0", "path_type"), "field 'generality.0.single_path1' is missing"),
    ],
)
def test_an_unreadable_record_is_named_by_file_record_and_field(
    tmp_path: Path, change: Callable[[Json], None], field: str
) -> None:
    raw = record()
    change(raw)
    file = write(tmp_path, {"3": record(), "17": raw})
    stream = read_uniedit(file)
    assert next(stream).id == "geography-3"
    with pytest.raises(RecordError) as caught:
        next(stream)
    assert str(caught.value) == f"{file}: record 'geography-17': {field}"


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_record_that_is_no_object_is_named(tmp_path: Path, value: Any) -> None:
    file = write(tmp_path, {"5": value})
    with pytest.raises(RecordError, match=r"geography.json: record 'geography-5': the record is not an object, found"):
        list(read_uniedit(file))


def test_a_file_that_is_no_object_of_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"geography.json: a UniEdit file is one JSON object of records, found list"):
        list(read_uniedit(write(tmp_path, [record()])))


@pytest.mark.parametrize("content", [b"", b"{", b'{"1": ', b"\xff\xfe{}"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "art.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"art.json: not (valid JSON|a text in UTF-8)"):
        list(read_uniedit(tmp_path / "art.json"))


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path, {str(i): record() for i in range(9)}, "art.json.gz").read_bytes()
    for damaged in (b"{}", whole[: len(whole) // 2], whole[:40] + bytes(200) + whole[240:]):
        (tmp_path / "art.json.gz").write_bytes(damaged)
        with pytest.raises(RecordError, match=r"art.json.gz: not a complete gzip file"):
            list(read_uniedit(tmp_path / "art.json.gz"))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.json"):
        list(read_uniedit(tmp_path / "nothing.json"))
