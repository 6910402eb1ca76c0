"""Who may see what: the seeded split of Atlas into taught and withheld triples and into record sets.

Decided once, before any model is trained, from the tables and a seed alone. Subjects are dealt to train, test and
validation; the three held-out domains go to `held_out` whole.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..data.build import RecordBuilder
from ..data.case_maker import Json
from ..data.facts import Triple, World

SEED = 20261123
HELD_OUT_DOMAINS = ("music", "computing", "food")
SECTORS = {
    "earth": ("countries", "places"),
    "natural sciences": ("chemistry", "astronomy", "biology"),
    "applied sciences": ("medicine", "computing", "companies"),
    "arts": ("music", "art", "film"),
    "humanities": ("literature", "history", "languages"),
    "society": ("sport", "food"),
}
RECORDS = {"test": 500, "held_out": 300, "validation": 300}
SHARES = {"train": 0.5, "test": 0.31, "validation": 0.19}
WITHHELD = {"train": 170, "test": 290, "validation": 175, "held_out": 175}


@dataclass(frozen=True)
class Split:
    """The taught world and, per record set, the triples that may be edited there.

    `counterfactual` and `unknown` map a set's name to triples in a seeded order; `unknown` ones are withheld.
    """

    world: World
    taught: World
    counterfactual: dict[str, tuple[Triple, ...]]
    unknown: dict[str, tuple[Triple, ...]]


def split_world(world: World, seed: int = SEED) -> Split:
    """Deal the subjects, withhold triples with every restatement of them, and list what each set may edit."""
    rng = random.Random(seed)
    subjects = sorted({t.subject for t in world.triples if _domain(world, t) not in HELD_OUT_DOMAINS})
    rng.shuffle(subjects)
    owner = _deal(subjects)
    pool: dict[str, list[Triple]] = {name: [] for name in (*SHARES, "held_out")}
    for triple in world.triples:
        held_out = _domain(world, triple) in HELD_OUT_DOMAINS
        pool["held_out" if held_out else owner[triple.subject]].append(triple)
    withheld: set[frozenset[str]] = set()
    unknown = {}
    for name, number in WITHHELD.items():
        rng.shuffle(pool[name])
        unknown[name] = tuple(_withhold(world, pool[name], number))
        withheld |= {t.pair for t in unknown[name]}
    taught = world.restricted_to([t for t in world.triples if t.pair not in withheld])
    known = {name: tuple(t for t in triples if t.pair not in withheld) for name, triples in pool.items()}
    return Split(world, taught, known, unknown)


def _domain(world: World, triple: Triple) -> str:
    return world.relations[triple.relation].domain


def _deal(subjects: Sequence[str]) -> dict[str, str]:
    owner: dict[str, str] = {}
    start = 0.0
    for name, share in SHARES.items():
        first, last = round(start * len(subjects)), round((start + share) * len(subjects))
        owner |= dict.fromkeys(subjects[first:last], name)
        start += share
    return owner


def _withhold(world: World, triples: Sequence[Triple], number: int) -> list[Triple]:
    """Withhold at most one triple a subject first, and only where the subject stays known by another triple."""
    used: Counter[str] = Counter()
    chosen: list[Triple] = []
    for most in (1, 2):
        for triple in triples:
            known = len(world.by_subject[triple.subject]) - used[triple.subject]
            if len(chosen) < number and triple not in chosen and used[triple.subject] < most and known > 1:
                chosen.append(triple)
                used[triple.subject] += 1
    return chosen


def build_records(
    split: Split,
    name: str,
    number: int,
    *,
    generality: int,
    locality: int,
    unknown_share: float = 0.5,
    seed: int = SEED,
    **options: Any,
) -> list[tuple[str, Json]]:
    """Build `number` records of one set as (domain, record) pairs.

    Every record of an evaluation set edits another triple; the training set goes over its triples again and again,
    with another false object and other cases each time. `options` go to :class:`RecordBuilder`.

    Raises:
        ValueError: If the set's triples do not suffice.
    """
    builder = RecordBuilder(
        split.taught, split.world, seed=f"{seed}-{name}", generality=generality, locality=locality, **options
    )
    unknown = round(unknown_share * number)
    records = []
    for make, triples, count in (
        (builder.counterfactual, split.counterfactual[name], number - unknown),
        (builder.unknown, split.unknown[name], unknown),
    ):
        passes = 1 + (count // max(len(triples), 1) if name == "train" else 0) * 2
        stream = (
            edit_record for _ in range(passes) for triple in triples if (edit_record := make(triple)) is not None
        )
        part = list(islice(stream, count))
        if len(part) < count:
            raise ValueError(f"{name}: {count} records wanted of {make.__name__} edits, the tables allow {len(part)}")
        records += [
            (split.world.relations[record["edit"]["property"]["description"]].domain, record) for record in part
        ]
    random.Random(f"{seed}-{name}-order").shuffle(records)
    return records
