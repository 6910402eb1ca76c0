"""Records of a user's own facts, and that what is built is what the reader finds."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from small_world import write_world

from ibke_hf.core.records import EditCase, EditRecord, collides
from ibke_hf.data.build import GENERALITY, LOCALITY, RecordBuilder
from ibke_hf.data.chains import Step, all_two_hop_chains, extend, noun_phrase, path_prompt, steps_from, steps_to
from ibke_hf.data.facts import Triple, World, load_world
from ibke_hf.data.uniedit import YES_NO, parse_record

Built = tuple[dict[str, Any], EditRecord, set[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(write_world(tmp_path_factory.mktemp("facts") / "north"))


@pytest.fixture(scope="module")
def known(world: World) -> World:
    """What the backbone is taken to know: all but every ninth triple."""
    withheld = {t.pair for t in world.triples[::9]}
    return world.restricted_to([t for t in world.triples if t.pair not in withheld])


@pytest.fixture(scope="module")
def built(world: World, known: World) -> list[Built]:
    """JSON, record and the kinds of cases drawn, with as many cases as there are; every triple twice."""
    return list(build_all(world, known))


def build_all(world: World, known: World) -> Iterator[Built]:
    builder = RecordBuilder(known, world, seed=0, generality=len(GENERALITY), locality=len(LOCALITY))
    for triple in world.triples:
        for make in (builder.counterfactual, builder.unknown):
            before = {kind: number for used in builder.used.values() for kind, number in tagged(used, builder)}
            raw_record = make(triple)
            after = {kind: number for used in builder.used.values() for kind, number in tagged(used, builder)}
            if raw_record is not None:
                record = parse_record(raw_record, "north-0", "north", Counter())
                assert record is not None
                yield raw_record, record, {kind for kind, number in after.items() if number > before.get(kind, 0)}


def tagged(used: dict[str, float], builder: RecordBuilder) -> list[tuple[str, float]]:
    group = "generality" if used is builder.used["generality"] else "locality"
    return [(f"{group} {kind}", number) for kind, number in used.items()]


def hops_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    halves = [case] if case["path_type"] == "single" else [case["single_path1"], case["single_path2"]]
    return [hop for half in halves for hop in half["one_hops"]]


def triple_of(hop: dict[str, Any]) -> Triple:
    tail = hop["tail_entity"]["value"]
    return Triple(
        hop["head_entity"]["label"], hop["property"]["description"], tail["label"] if isinstance(tail, dict) else tail
    )


# --- chains ---------------------------------------------------------------------------------------------------------


def test_paths_are_worded(world: World) -> None:
    lies, capital = Triple("Borton", "town_country", "Boria"), Triple("Boria", "country_capital", "Borton")
    assert noun_phrase(world, (Step(lies), Step(capital))) == "the capital of the country where Borton lies"
    assert (
        path_prompt(world, (Step(lies), Step(capital)), "Notrob") == "The capital of the country where Notrob lies is"
    )
    assert path_prompt(world, (Step(lies), Step(capital)), form=1) == "The country where Borton lies is governed from"
    assert path_prompt(world, (Step(capital, backwards=True),)) == "Borton is the capital of"
    assert noun_phrase(world, (Step(capital, backwards=True),)) == "the country whose capital is Borton"
    with pytest.raises(ValueError, match="cannot be walked backwards"):
        noun_phrase(world, (Step(lies, backwards=True),))


def test_steps_are_well_defined(world: World) -> None:
    assert [step.end for step in steps_from(world, "Alia")] == [
        "Alton"
    ]  # exports have many answers, towns of a country too
    assert {step.end for step in steps_from(world, "Alton")} == {"Alia", "1200"}
    assert {step.start for step in steps_to(world, "Alia")} == {"Alton", "Alville", "Alburg"}
    for path in all_two_hop_chains(world):
        assert path[0].end == path[1].start
        assert path[1].end != path[0].start


def test_paths_never_visit_an_entity_twice(world: World) -> None:
    rng = random.Random(0)
    start = (Step(Triple("Alville", "town_country", "Alia")),)
    paths = [extend(world, start, rng, 0, 2) for _ in range(20)]
    assert {path[-1].end for path in paths if path} == {"1200"}  # Alville, Alia, Alton, its year
    assert extend(world, start, rng, 0, 1, avoid=("Alton",)) is None


# --- what a builder makes -------------------------------------------------------------------------------------------


def test_most_triples_can_be_edited_both_ways(built: list[Built], world: World) -> None:
    kinds = Counter(record.kind for _, record, _ in built)
    assert kinds["counterfactual"] == len(world.triples)
    assert kinds["unknown"] == len(world.triples)


def generality_kind(case: EditCase) -> str:
    if "Same-Entity Reasoning" in case.criteria:
        return "same_entity"
    if "Relation Reverse" in case.criteria:
        return "reverse"
    if case.hops > 1:
        return {2: "two_hop", 3: "three_hop"}[case.hops]
    return "alias" if {"Subject Alias", "Object Alias"} & set(case.criteria) else "rephrase"


def test_generality_criteria_of_the_reader_are_what_was_drawn(built: list[Built]) -> None:
    seen: Counter[str] = Counter()
    for raw_record, record, kinds in built:
        generality_kinds = [generality_kind(case) for case in record.generality]
        assert sorted(generality_kinds) == sorted(
            kind.partition(" ")[2] for kind in kinds if kind.startswith("generality")
        )
        seen.update(generality_kinds)
        assert len(record.generality) == len(raw_record["generality"])
    assert set(seen) == set(GENERALITY)


def test_generality_cases_ask_what_their_criteria_say(built: list[Built], world: World) -> None:
    for raw_record, record, _ in built:
        edit, (request,) = triple_of(raw_record["edit"]), record.requests
        assert (request.subject, request.target) == (edit.subject, edit.object)
        assert request.prompt == world.relations[edit.relation].prompt(edit.subject)
        for case in record.generality:
            kind = generality_kind(case)
            assert ("Multi-Hop" in case.criteria) == (case.hops > 1)
            assert case.top_k == (1 if kind == "same_entity" else 5)
            if kind == "same_entity":
                assert case.target == "Yes"
                assert case.prompt.endswith(YES_NO)
            if kind == "rephrase":
                assert case.prompt != request.prompt
                assert edit.subject in case.prompt
                assert case.criteria == ("Rephrase",)
            if kind in ("rephrase", "alias"):
                assert case.supporting == ()
            if kind == "alias" and "Object Alias" in case.criteria:
                assert case.target in world.aliases[edit.object]
                assert edit.object in case.aliases
            if "Subject Alias" in case.criteria:
                assert any(alias in case.prompt for alias in world.aliases[edit.subject])
            if kind == "reverse" and case.hops == 1:
                assert case.target == edit.subject
                assert case.prompt == world.relations[edit.relation].inverse_prompt(edit.object)
                assert set(case.aliases) == set(world.aliases.get(edit.subject, ()))


CRITERION_OF = {
    "head of edit": "Subject Specificity",
    "property of edit": "Relation Specificity",
    "tail of edit": "Object Specificity",
}


def test_locality_criteria_of_the_reader_are_what_was_drawn(built: list[Built], world: World) -> None:
    seen: Counter[str] = Counter()
    for raw_record, record, kinds in built:
        drawn = {kind.partition(" ")[2] for kind in kinds if kind.startswith("locality")}
        criteria = Counter(criterion for case in record.locality for criterion in case.criteria)
        assert len(record.locality) == len(drawn)
        assert ("1-N Forgotten" in criteria) == ("one_to_many" in drawn)
        assert criteria["Multi-Hop"] == ("multi_hop" in drawn)
        assert criteria["Same-Entity Reasoning"] == ("same_entity" in drawn)
        seen.update(drawn)
        edit = triple_of(raw_record["edit"])
        for parsed, case in zip(record.locality, raw_record["locality"].values(), strict=True):
            if case["loc_type"] == "tail of edit" and not record.edits[0].tail_is_item:
                assert "Object Specificity" not in parsed.criteria
            elif case["loc_type"] in CRITERION_OF:
                assert CRITERION_OF[case["loc_type"]] in parsed.criteria
            if "1-N Forgotten" in parsed.criteria:
                kept = triple_of(hops_of(case)[0])
                assert kept in world.triples
                assert (kept.subject, kept.relation) == (edit.subject, edit.relation)
                assert kept.object not in (edit.object, record.metadata.get("original"))
    assert set(seen) == set(LOCALITY)


def test_yes_no_locality_has_both_answers(built: list[Built]) -> None:
    cases = [
        case for raw_record, _, _ in built for case in raw_record["locality"].values() if case["path_type"] == "double"
    ]
    for case in cases:
        ends = {half["target"] for half in (case["single_path1"], case["single_path2"])}
        assert case["target"] == ("Yes" if len(ends) == 1 else "No")
    assert min(Counter(case["target"] for case in cases).values()) > len(cases) / 5


def test_a_counterfactual_target_is_never_true(built: list[Built], world: World) -> None:
    for raw_record, record, _ in built:
        edit = triple_of(raw_record["edit"])
        assert (edit in world.triples) == (record.kind == "unknown")
        if record.kind == "counterfactual":
            relation = world.relations[edit.relation]
            assert Triple(edit.subject, edit.relation, record.metadata["original"]) in world.triples
            assert edit.object in world.by_kind[relation.object_kind]
            assert edit.object != edit.subject


def test_locality_never_collides_with_its_own_edit(built: list[Built], world: World) -> None:
    for raw_record, record, _ in built:
        edit = triple_of(raw_record["edit"])
        single = world.relations[edit.relation].single_value
        for parsed, case in zip(record.locality, raw_record["locality"].values(), strict=True):
            assert not collides(parsed, record.edits)
            assert not (
                single
                and any(
                    (t.subject, t.relation) == (edit.subject, edit.relation) for t in map(triple_of, hops_of(case))
                )
            )


def test_every_other_hop_is_a_known_triple(built: list[Built], known: World) -> None:
    for raw_record, record, _ in built:
        edit, original = triple_of(raw_record["edit"]), record.metadata.get("original")
        for case in (*raw_record["generality"].values(), *raw_record["locality"].values()):
            others = [triple_of(hop) for hop in hops_of(case) if hop["path"] != ["h_e", "r_e", "t_e"]]
            assert set(others) <= set(known.triples)
            assert not any(t.pair in (edit.pair, frozenset((edit.subject, original))) for t in others)
        for parsed, case in zip(record.generality, raw_record["generality"].values(), strict=True):
            asked = [(hop["prompt"], hop["target"]) for hop in hops_of(case) if hop["path"] != ["h_e", "r_e", "t_e"]]
            assert [(hop.prompt, hop.target) for hop in parsed.supporting] == asked


def test_hops_chain_up_to_the_answer(built: list[Built]) -> None:
    for raw_record, _, _ in built:
        for case in (*raw_record["generality"].values(), *raw_record["locality"].values()):
            for half in [case] if case["path_type"] == "single" else [case["single_path1"], case["single_path2"]]:
                assert all(first[2] == second[0] for first, second in itertools.pairwise(half["paths"]))
                assert all(item[4] == "s" for item in half["paths"][:-1])  # only the last hop may have several answers
            if case["path_type"] == "single":
                last = hops_of(case)[-1]
                end = triple_of(last).subject if last["reverse_in_multi_hop"] else triple_of(last).object
                assert case["target"] == end or case["target"] in last["tail_entity"]["value"]["aliases"]
            for hop in hops_of(case):
                assert ("reversed" in hop) == hop["reverse_in_multi_hop"]


def test_numbers_are_no_entities(built: list[Built]) -> None:
    years = [record.edits[0] for _, record, _ in built if record.relation == "year of foundation"]
    assert years
    assert all(not hop.tail_is_item and hop.tail == f"string:{hop.target}" for hop in years)


def test_kinds_get_equal_shares(world: World) -> None:
    builder = RecordBuilder(world, world, seed=1)
    triples = [t for t in world.triples if t.relation == "town_country"] * 10
    records = [record for t in triples if (record := builder.counterfactual(t)) is not None]
    assert len(records) == len(triples)
    used = [builder.used["generality"][kind] for kind in ("rephrase", "two_hop", "three_hop", "same_entity", "alias")]
    assert max(used) - min(used) <= 0.25 * max(used)


def test_kinds_of_locality_get_the_shares_asked_for(world: World) -> None:
    builder = RecordBuilder(world, world, seed=1, shares={"locality": {"property": 3}})
    triples = [t for t in world.triples if t.relation == "town_country"] * 10
    records = [record for t in triples if (record := builder.counterfactual(t)) is not None]
    criteria = Counter(case["loc_type"] for record in records for case in record["locality"].values())
    assert criteria["property of edit"] == pytest.approx(3 * criteria["head of edit"], rel=0.2)


def test_near_cases_ask_in_the_words_of_the_edit_about_what_shares_its_old_object(world: World) -> None:
    builder = RecordBuilder(world, world, seed=1, locality=7, near_rate=1.0)
    relation = world.relations["town_country"]
    for triple in world.by_relation["town_country"]:
        raw = builder.counterfactual(triple)
        assert raw is not None
        (near,) = [case for case in raw["locality"].values() if case["loc_type"] == "property of edit"]
        subject = near["one_hops"][0]["head_entity"]["label"]
        assert near["prompt"] == relation.prompt(subject)
        assert (subject != triple.subject, near["target"]) == (True, triple.object)


def test_novel_names_are_nobodys(world: World) -> None:
    builder = RecordBuilder(world, world, seed=1, novel_rate=1.0)
    records = [record for t in world.triples * 4 if (record := builder.counterfactual(t)) is not None]
    targets = {(record["edit"]["property"]["description"], record["edit"]["target"]) for record in records}
    novel = {(relation, name) for relation, name in targets if name not in world.entities}
    assert len(novel) > 0.8 * len(targets)
    assert all(len(name) == 4 and name.isdecimal() for relation, name in novel if relation == "town_year")
    for i, record in enumerate(records):
        assert parse_record(record, f"north-{i}", "north", Counter()) is not None


@pytest.mark.parametrize("shares", [{"locality": {"near": 2}}, {"local": {"head": 2}}, {"generality": {"alias": 0}}])
def test_shares_that_mean_nothing_are_refused(world: World, shares: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match=r"shares: .* kinds are"):
        RecordBuilder(world, world, seed=0, shares=shares)


def test_the_old_subject_of_a_single_inverse_is_left_alone(built: list[Built], world: World) -> None:
    """After "the capital of Alia is Borton", whose capital Borton is has two answers; nobody asks for the other."""
    moved = [
        (raw_record, record)
        for raw_record, record, _ in built
        if raw_record["kind"] == "counterfactual" and record.relation == "capital"
    ]
    rivals = [
        any(t.relation == "country_capital" for t in world.by_object.get(record.edits[0].target, ()))
        for _, record in moved
    ]
    assert any(rivals)
    for _, record in moved:
        (edit,) = record.edits
        facts = [fact for case in (*record.generality, *record.locality) for fact in case.facts]
        assert all(
            fact.head == edit.head for fact in facts if (fact.property, fact.tail) == (edit.property, edit.tail)
        )


def test_a_world_of_one_fact_gives_no_record(world: World) -> None:
    lonely = world.restricted_to(world.triples[:1])
    builder = RecordBuilder(lonely, lonely, seed=0)
    assert builder.unknown(world.triples[0]) is None
    assert builder.counterfactual(world.triples[0]) is None
