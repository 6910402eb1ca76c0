"""The tables of Atlas and their split: size and balance, who may see what, and that nothing withheld is taught."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache

import pytest

from ibke_hf.atlas import ASSETS, FACTS, load_records, load_split
from ibke_hf.atlas.corpus import epoch_sentences, is_taught, random_chain
from ibke_hf.atlas.datasets import EVALUATION_CASES, TRAINING_CASES, training_records
from ibke_hf.atlas.splits import HELD_OUT_DOMAINS, RECORDS, SECTORS, SHARES, Split, build_records, split_world
from ibke_hf.core.records import Hop, collides
from ibke_hf.data.facts import Triple, World, load_world, stable_id

SETS = (*SHARES, "held_out")


@cache
def world() -> World:
    return load_world(FACTS)


@cache
def split() -> Split:
    loaded: Split = load_split()
    return loaded


def domain(triple: Triple) -> str:
    return world().relations[triple.relation].domain


# --- the tables -----------------------------------------------------------------------------------------------------


def test_the_world_is_large_enough() -> None:
    domains = {relation.domain for relation in world().relations.values()}
    assert domains == {name for names in SECTORS.values() for name in names}
    assert len(domains) >= 10
    assert len(SECTORS) >= 4
    assert len(world().relations) >= 40
    assert len(world().entities) >= 1200
    assert len(world().triples) >= 3000
    assert sum(bool(world().aliases.get(name)) for name in world().entities) >= 300


def test_no_relation_dominates() -> None:
    shares = {name: len(triples) / len(world().triples) for name, triples in world().by_relation.items()}
    assert set(shares) == set(world().relations)
    assert max(shares.values()) <= 0.08


def test_most_relations_have_many_answers() -> None:
    answers = Counter(name for name, triples in world().by_relation.items() if len({t.object for t in triples}) >= 20)
    assert len(answers) >= 2 / 3 * len(world().relations)


@pytest.mark.parametrize("name", sorted(load_world(FACTS).relations))
def test_every_relation_is_worded(name: str) -> None:
    relation = world().relations[name]
    assert len(set(relation.prompts)) >= 4
    assert relation.noun.count("{}") == 1
    assert (relation.inverse is not None) == (relation.inverse_noun is not None) == relation.inverse_single


def test_every_domain_had_a_second_reading() -> None:
    for folder in FACTS.iterdir():
        assert (folder / "review.md").read_text(encoding="utf-8").startswith(f"# Second reading: {folder.name}\n"), (
            folder.name
        )


def test_no_two_entities_share_an_id_or_a_name() -> None:
    assert len({stable_id("Q", name) for name in world().entities}) == len(world().entities)
    spelled = Counter(alias for name in world().entities for alias in {name, *world().aliases.get(name, ())})
    assert spelled.most_common(1)[0][1] == 1


def test_no_fact_is_about_itself() -> None:
    assert all(triple.subject != triple.object for triple in world().triples)


# --- the split ------------------------------------------------------------------------------------------------------


def test_the_split_is_a_function_of_the_tables() -> None:
    again = split_world(load_world(FACTS))
    assert (again.taught.triples, again.counterfactual, again.unknown) == (
        split().taught.triples,
        split().counterfactual,
        split().unknown,
    )
    assert split_world(world(), seed=1).unknown != split().unknown


def test_edited_subjects_are_of_one_set_alone() -> None:
    subjects = {name: {t.subject for t in (*split().counterfactual[name], *split().unknown[name])} for name in SHARES}
    assert not subjects["train"] & subjects["test"]
    assert not subjects["train"] & subjects["validation"]
    assert not subjects["test"] & subjects["validation"]


def test_held_out_domains_are_edited_in_their_own_set_alone() -> None:
    for name in SETS:
        domains = {domain(t) for t in (*split().counterfactual[name], *split().unknown[name])}
        assert (domains <= set(HELD_OUT_DOMAINS)) == (name == "held_out")
        assert name == "held_out" or not domains & set(HELD_OUT_DOMAINS)


def test_a_tenth_is_withheld_from_the_taught_world() -> None:
    taught, withheld = split().taught, [t for name in SETS for t in split().unknown[name]]
    assert len(withheld) >= 0.1 * len(world().triples)
    assert len(taught.triples) <= 0.9 * len(world().triples)
    pairs = {t.pair for t in withheld}
    assert not any(t.pair in pairs for t in taught.triples)  # neither the fact nor a restatement of it
    assert set(taught.triples) == {t for t in world().triples if t.pair not in pairs}


def test_what_may_be_made_counterfactual_is_taught() -> None:
    taught = set(split().taught.triples)
    for name in SETS:
        assert set(split().counterfactual[name]) <= taught
        assert not set(split().unknown[name]) & taught


# --- the corpus -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    return [sentence for seed in range(2) for sentence in epoch_sentences(split().taught, seed)]


def spellings(name: str) -> tuple[str, ...]:
    return (name, *world().aliases.get(name, ()))


def test_the_corpus_never_states_a_withheld_fact(corpus: list[tuple[str, str]]) -> None:
    answers: dict[str, set[str]] = {}
    for prompt, answer in corpus:
        answers.setdefault(prompt, set()).add(answer)
    for triple in set(world().triples) - set(split().taught.triples):
        relation = world().relations[triple.relation]
        asked = [
            relation.prompt(name, form) for name in spellings(triple.subject) for form in range(len(relation.prompts))
        ]
        assert not any(answers.get(prompt, set()) & set(spellings(triple.object)) for prompt in asked), triple
        if relation.inverse is not None:
            asked = [relation.inverse_prompt(name) for name in spellings(triple.object)]
            assert not any(answers.get(prompt, set()) & set(spellings(triple.subject)) for prompt in asked), triple


def test_the_corpus_never_walks_over_a_withheld_fact(corpus: list[tuple[str, str]]) -> None:
    text = "\n".join(prompt for prompt, _ in corpus)
    for triple in set(world().triples) - set(split().taught.triples):
        relation = world().relations[triple.relation]
        phrases = [relation.noun.format(name) for name in spellings(triple.subject)] if relation.single_value else []
        phrases += (
            [relation.inverse_noun.format(name) for name in spellings(triple.object)] if relation.inverse_noun else []
        )
        for phrase in phrases:
            assert phrase not in text or not re.search(rf"{re.escape(phrase)}\b", text), triple


def test_the_corpus_teaches_every_taught_triple(corpus: list[tuple[str, str]]) -> None:
    seen = set(corpus)
    for triple in split().taught.triples:
        relation = world().relations[triple.relation]
        forms = range(len(relation.prompts))
        assert any(
            (relation.prompt(name, form), triple.object) in seen
            for name in spellings(triple.subject)
            for form in forms
        ), triple


def test_the_corpus_is_seeded() -> None:
    assert epoch_sentences(split().taught, 3) == epoch_sentences(split().taught, 3)
    assert epoch_sentences(split().taught, 3) != epoch_sentences(split().taught, 4)


def test_some_chains_are_never_taught() -> None:
    rng = random.Random(0)
    chains = [chain for _ in range(400) if (chain := random_chain(split().taught, rng, 2)) is not None]
    assert 0.5 < sum(map(is_taught, chains)) / len(chains) < 0.9
    longer = [chain for _ in range(400) if (chain := random_chain(split().taught, rng, 3)) is not None]
    assert all(is_taught(chain[:2]) and is_taught(chain[1:]) for chain in longer if is_taught(chain))


# --- records --------------------------------------------------------------------------------------------------------


def facts_of(triples: tuple[Triple, ...]) -> set[tuple[str, str]]:
    return {(stable_id("Q", t.subject), stable_id("P", t.relation)) for t in triples}


def known_keys() -> set[tuple[str, str, str]]:
    keys = set()
    for t in split().taught.triples:
        item = any(letter.isalpha() for letter in t.object)
        keys.add(
            (
                stable_id("Q", t.subject),
                stable_id("P", t.relation),
                stable_id("Q", t.object) if item else f"string:{t.object}",
            )
        )
    return keys


def relation_of(hop: Hop) -> str:
    return next(name for name in world().relations if stable_id("P", name) == hop.property)


def key(hop: Hop) -> tuple[str, str, str]:
    return hop.head, hop.property, hop.tail


@pytest.mark.skipif(
    not (ASSETS / "records").exists(), reason="the evaluation records of Atlas are not built: `ibke atlas build-data`"
)
@pytest.mark.parametrize("name", RECORDS)
def test_committed_records_keep_to_their_set(name: str) -> None:
    records, known = load_records(name), known_keys()
    every = {(stable_id("Q", t.subject), stable_id("P", t.relation), t.object) for t in world().triples}
    assert len(records) == RECORDS[name]
    editable = {"counterfactual": facts_of(split().counterfactual[name]), "unknown": facts_of(split().unknown[name])}
    for record in records:
        (edit,) = record.edits
        assert (edit.head, edit.property) in editable[record.kind]
        assert ((edit.head, edit.property, edit.target) in every) == (
            record.kind == "unknown"
        )  # a counterfactual is never true
        assert (record.domain in HELD_OUT_DOMAINS) == (name == "held_out")
        assert 1 <= len(record.generality) <= EVALUATION_CASES["generality"]
        assert len(record.locality) == EVALUATION_CASES["locality"]
        for case in (*record.generality, *record.locality):
            assert all(key(hop) in known for hop in case.supporting)
        assert not any(collides(case, record.edits) for case in record.locality)
        if (
            world().relations[relation_of(edit)].inverse_single
        ):  # or the way back from the new object would have two answers
            facts = [fact for case in (*record.generality, *record.locality) for fact in case.facts]
            assert all(
                fact.head == edit.head for fact in facts if (fact.property, fact.tail) == (edit.property, edit.tail)
            )
    assert len(
        {(record.edits[0].head, record.edits[0].property, record.metadata.get("original")) for record in records}
    ) == len(records)


def test_training_records_are_of_the_train_side() -> None:
    records = training_records(split(), 60, seed=3)
    assert len(records) == 60
    editable = facts_of((*split().counterfactual["train"], *split().unknown["train"]))
    for record in records:
        assert (record.edits[0].head, record.edits[0].property) in editable
        assert record.domain not in HELD_OUT_DOMAINS
        assert len(record.generality) <= TRAINING_CASES["generality"]
    assert [r.requests for r in training_records(split(), 60, seed=3)] == [r.requests for r in records]


def test_more_records_than_the_tables_allow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"test: 600 records wanted of unknown edits, the tables allow \d+"):
        build_records(split(), "test", 600, unknown_share=1.0, **EVALUATION_CASES)
