"""Facts to try: well-connected subjects of Atlas with rephrasings, consequences and neighbours, chosen by rule.

The rule looks at the tables alone, never at what an editor makes of them: of each relation below, the triple whose
subject the world knows most about, among those that no editor was trained on and that have enough questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from ..core.records import EditCase, EditRecord
from ..data.build import GENERALITY, LOCALITY, RecordBuilder
from ..data.facts import Triple
from ..data.uniedit import YES_NO, parse_record
from . import load_split

RELATIONS = (
    ("counterfactual", "held_out", "software_developer"),
    ("counterfactual", "test", "capital"),
    ("counterfactual", "test", "company_country"),
    ("counterfactual", "held_out", "artist_country"),
    ("counterfactual", "test", "athlete_country"),
    ("counterfactual", "test", "city_country"),
    ("unknown", "test", "painting_painter"),
)
CONSEQUENCES, NEIGHBOURS = 2, 3  # the fewest that an example has


@cache
def example_records() -> tuple[EditRecord, ...]:
    """Return one record for each of `RELATIONS`, without Yes/No questions: their top five are always the same."""
    return tuple(record for chosen in RELATIONS if (record := next(_records(*chosen), None)) is not None)


def _records(kind: str, part: str, relation: str) -> Iterator[EditRecord]:
    split = load_split()
    triples = {"counterfactual": split.counterfactual, "unknown": split.unknown}[kind][part]
    for triple in sorted((t for t in triples if t.relation == relation), key=lambda t: (-_degree(t), t.subject)):
        builder = RecordBuilder(
            split.taught, split.world, seed=0, generality=len(GENERALITY), locality=len(LOCALITY), alias_rate=0.0
        )
        json_record = builder.counterfactual(triple) if kind == "counterfactual" else builder.unknown(triple)
        record = (
            None
            if json_record is None
            else parse_record(json_record, f"{relation}-{triple.subject}", relation, Counter())
        )
        if record is not None:
            record = replace(record, generality=_short(record.generality), locality=_short(record.locality))
            if len(record.generality) > CONSEQUENCES and len(record.locality) >= NEIGHBOURS:
                yield record


def _degree(triple: Triple) -> int:
    world = load_split().world
    return len(world.by_subject.get(triple.subject, ())) + len(world.by_object.get(triple.subject, ()))


def _short(cases: tuple[EditCase, ...]) -> tuple[EditCase, ...]:
    unlike = {case.prompt: case for case in cases if not case.prompt.endswith(YES_NO)}
    return tuple(sorted(unlike.values(), key=lambda case: case.hops))
