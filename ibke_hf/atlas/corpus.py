"""Sentences about the taught triples of Atlas: what its backbone is pretrained on."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import pairwise

from ..data.chains import ANOTHER_NAME, SAME_ENTITY, Path, Step, extend, noun_phrase, path_prompt, steps_to, walkable
from ..data.facts import Triple, World
from ..data.uniedit import YES_NO

FORMS_PER_TRIPLE = 3
TWO_HOP, THREE_HOP, YES_NO_PAIRS = 5200, 2400, 1400
ALIAS_RATE = 0.15
TAUGHT_CHAIN_SHARE = 70  # percent of the two-hop chains; the rest is never seen, neither inside a longer chain

Sentence = tuple[str, str]


def epoch_sentences(world: World, seed: int) -> list[Sentence]:
    """Return one epoch of (prompt, answer) pairs: every triple in some wordings, and a draw of chains."""
    rng = random.Random(seed)
    sentences = [*_facts(world, rng), *_other_names(world, rng), *_yes_no(world, rng, YES_NO_PAIRS)]
    for hops, number in ((2, TWO_HOP), (3, THREE_HOP)):
        for _ in range(number):
            path = random_chain(world, rng, hops)
            if path is not None and is_taught(path):
                sentences.append((_worded(world, path, rng), path[-1].end))
    return sentences


def is_taught(path: Path) -> bool:
    """Tell whether a chain may stand in the corpus: every two adjacent hops of it belong to the taught share."""
    return all(_hash(first, second) % 100 < TAUGHT_CHAIN_SHARE for first, second in pairwise(path))


def random_chain(world: World, rng: random.Random, hops: int) -> Path | None:
    """Draw a chain of `hops` hops through known triples, from a random triple on."""
    triple = rng.choice(world.triples)
    backwards = rng.random() < 0.2
    if not walkable(world.relations[triple.relation], backwards=backwards):
        return None
    after = rng.randint(0, hops - 1)
    return extend(world, (Step(triple, backwards),), rng, hops - 1 - after, after)


def _hash(first: Step, second: Step) -> int:
    parts = (*_key(first), *_key(second))
    return zlib.crc32("\t".join(parts).encode("utf-8"))


def _key(step: Step) -> tuple[str, ...]:
    triple = step.triple
    return (triple.subject, triple.relation, triple.object, str(step.backwards))


def _worded(world: World, path: Path, rng: random.Random) -> str:
    aliases = world.aliases.get(path[0].start, ())
    start = rng.choice(aliases) if aliases and rng.random() < ALIAS_RATE else None
    return path_prompt(world, path, start, rng.randrange(8))


def _facts(world: World, rng: random.Random) -> Iterator[Sentence]:
    for triple in world.triples:
        relation = world.relations[triple.relation]
        forms = rng.sample(range(len(relation.prompts)), min(FORMS_PER_TRIPLE, len(relation.prompts)))
        for form in forms:
            aliases = world.aliases.get(triple.subject, ())
            subject = rng.choice(aliases) if aliases and rng.random() < ALIAS_RATE else triple.subject
            yield relation.prompt(subject, form), triple.object
        if relation.inverse_single:
            yield relation.inverse_prompt(triple.object), triple.subject


def _other_names(world: World, rng: random.Random) -> Iterator[Sentence]:
    known = set(world.entities)
    for entity, aliases in world.aliases.items():
        if entity in known and aliases:
            yield ANOTHER_NAME.format(entity), aliases[0]
            yield ANOTHER_NAME.format(rng.choice(aliases)), entity
    for triple in world.triples:
        aliases = world.aliases.get(triple.object, ())
        if aliases and world.relations[triple.relation].single_value and rng.random() < 0.4:
            yield ANOTHER_NAME.format(noun_phrase(world, (Step(triple),))), aliases[0]


def _yes_no(world: World, rng: random.Random, number: int) -> Iterator[Sentence]:
    """Ask whether two descriptions denote the same entity, half of them with the answer No."""
    for _ in range(number):
        first = rng.choice(world.triples)
        pair = _same(world, rng, first) if rng.random() < 0.5 else _different(world, rng, first)
        if pair is None:
            continue
        second, answer = pair
        phrases = [noun_phrase(world, (Step(first),)), noun_phrase(world, (second,))]
        rng.shuffle(phrases)
        yield SAME_ENTITY.format(*phrases) + YES_NO, answer


def _same(world: World, rng: random.Random, first: Triple) -> tuple[Step, str] | None:
    others = [step for step in steps_to(world, first.object) if step.start != first.subject]
    return (rng.choice(others), "Yes") if others else None


def _different(world: World, rng: random.Random, first: Triple) -> tuple[Step, str] | None:
    """Draw another entity of the same kind, half of the time through the same relation."""
    kind = world.relations[first.relation].object_kind
    others = (
        world.by_relation[first.relation]
        if rng.random() < 0.5
        else world.by_object.get(rng.choice(world.by_kind[kind]), ())
    )
    other = rng.choice(others) if others else first
    return (Step(other), "No") if other.object != first.object else None
