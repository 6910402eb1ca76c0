"""Chains of triples worded as one question: the paths through a world that edits must ripple along."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .facts import Relation, Triple, World

SAME_ENTITY = "Is {} the same as {}?"
ANOTHER_NAME = "Another name for {} is"


@dataclass(frozen=True)
class Step:
    """One triple walked from subject to object, or backwards from object to subject."""

    triple: Triple
    backwards: bool = False

    @property
    def start(self) -> str:
        """The entity that the step leaves from."""
        return self.triple.object if self.backwards else self.triple.subject

    @property
    def end(self) -> str:
        """The entity that the step arrives at."""
        return self.triple.subject if self.backwards else self.triple.object


Path = tuple[Step, ...]


def noun_phrase(world: World, path: Sequence[Step], start: str | None = None) -> str:
    """Denote the end of a path: ``the capital of the country where Vegemite was invented``.

    `start` replaces the name of the first entity, by one of its aliases.
    """
    phrase = start or path[0].start
    for step in path:
        relation = world.relations[step.triple.relation]
        wording = relation.inverse_noun if step.backwards else relation.noun
        if wording is None:
            raise ValueError(f"relation {relation.id!r} cannot be walked backwards: it has no inverse_noun wording")
        phrase = wording.format(phrase)
    return phrase


def path_prompt(
    world: World, path: Sequence[Step], start: str | None = None, form: int = 0, *, question: bool = False
) -> str:
    """Ask for the end of a path, the last hop by wording number `form`, the others as noun phrases.

    With `question`, the last hop is asked by a question; one that is walked backwards by its inverse wording all the
    same.
    """
    inner = noun_phrase(world, path[:-1], start) if len(path) > 1 else (start or path[0].start)
    relation = world.relations[path[-1].triple.relation]
    if path[-1].backwards:
        return relation.inverse_prompt(inner)
    return relation.question(inner, form) if question else relation.prompt(inner, form)


def walkable(relation: Relation, *, backwards: bool) -> bool:
    """Tell whether a hop has one answer in this direction, so that a chain through it is well defined."""
    return relation.inverse_single if backwards else relation.single_value


def steps_from(world: World, entity: str) -> list[Step]:
    """Return every well-defined step that leaves `entity`."""
    return _steps(world, world.by_subject.get(entity, ()), False) + _steps(
        world, world.by_object.get(entity, ()), True
    )


def steps_to(world: World, entity: str) -> list[Step]:
    """Return every well-defined step that arrives at `entity`."""
    return _steps(world, world.by_object.get(entity, ()), False) + _steps(
        world, world.by_subject.get(entity, ()), True
    )


def _steps(world: World, triples: Collection[Triple], backwards: bool) -> list[Step]:
    return [Step(t, backwards) for t in triples if walkable(world.relations[t.relation], backwards=backwards)]


def extend(
    world: World, path: Path, rng: random.Random, before: int, after: int, avoid: Collection[str] = ()
) -> Path | None:
    """Grow a path by `before` hops in front and `after` hops behind, through entities not visited yet.

    Returns None where the world has no such chain. Entities in `avoid` are never passed through.
    """
    visited = {path[0].start, *(step.end for step in path), *avoid}
    for _ in range(after):
        choices = [step for step in steps_from(world, path[-1].end) if step.end not in visited]
        if not choices:
            return None
        path = (*path, rng.choice(choices))
        visited.add(path[-1].end)
    for _ in range(before):
        choices = [step for step in steps_to(world, path[0].start) if step.start not in visited]
        if not choices:
            return None
        path = (rng.choice(choices), *path)
        visited.add(path[0].start)
    return path


def all_two_hop_chains(world: World) -> list[Path]:
    """Return every two-hop chain whose first hop is well defined, in a fixed order; the last walks forwards."""
    chains: list[Path] = []
    for triple in world.triples:
        relation = world.relations[triple.relation]
        for backwards in (False, True):
            if not walkable(relation, backwards=backwards):
                continue
            first = Step(triple, backwards)
            chains += [
                (first, Step(t))
                for t in world.by_subject.get(first.end, ())
                if t.object != first.start and world.relations[t.relation].single_value
            ]
    return chains
