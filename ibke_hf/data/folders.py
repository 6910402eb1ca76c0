"""Records of a user's own facts: `ibke data build`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

from ..io import write_json
from .build import Json, RecordBuilder
from .facts import Triple, World, load_world
from .files import record_files


def build_folder(
    facts: str | Path,
    out: str | Path,
    *,
    records: int = 1000,
    validation: float = 0.1,
    generality: int = 3,
    locality: int = 2,
    seed: int = 0,
) -> dict[str, int]:
    """Turn tables of facts into training and validation records with disjoint subjects; return the number of each.

    Half of the edits are counterfactual, half state the true triple (which a model may or may not know already).

    Raises:
        FactsError: Naming every bad row by file and line.
        ValueError: If a number is out of range, the tables give no record at all, or `out` holds record files of other
            domains.
    """
    if min(records, generality, locality) < 1:
        raise ValueError(
            f"records, generality and locality must be at least 1, found {records}, {generality} and {locality}"
        )
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be in [0, 1), found {validation}")
    world = load_world(facts)
    subjects = sorted({t.subject for t in world.triples})
    random.Random(seed).shuffle(subjects)
    held = set(subjects[: round(validation * len(subjects))])
    counts = {}
    for name, wanted in (("train", records), ("validation", round(records * validation))):
        triples = [t for t in world.triples if (t.subject in held) == (name == "validation")]
        builder = RecordBuilder(world, world, seed=f"{seed}-{name}", generality=generality, locality=locality)
        made = _records(builder, world, triples, wanted, random.Random(f"{seed}-{name}"))
        if wanted and not made:
            raise ValueError(
                f"{facts}: no {name} record can be built; add triples, wordings, or a larger validation share"
            )
        if made:
            write_records(made, Path(out) / name)
        counts[name] = len(made)
    return counts


def _records(
    builder: RecordBuilder, world: World, triples: list[Triple], wanted: int, rng: random.Random
) -> list[tuple[str, Json]]:
    rng.shuffle(triples)
    makers, number = (builder.counterfactual, builder.unknown), max(len(triples), 1)
    turns = enumerate(islice(cycle(triples), 4 * wanted))  # each triple gets the other kind of edit at its next turn
    tries = ((makers[(i // number + i % number) % 2](triple), triple) for i, triple in turns)
    made = ((world.relations[triple.relation].domain, record) for record, triple in tries if record is not None)
    return list(islice(made, wanted))


def write_records(records: Iterable[tuple[str, Json]], folder: str | Path) -> None:
    """Write (domain, record) pairs as one UniEdit file per domain; the keys keep the order over all domains.

    Raises:
        ValueError: If the folder holds record files of other domains, which would be read together with these.
    """
    by_domain: dict[str, Json] = defaultdict(dict)
    for index, (domain, record) in enumerate(records):
        by_domain[domain][str(index)] = record
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    others = sorted(file.name for file in record_files(target) if file.name.removesuffix(".json") not in by_domain)
    if others:
        raise ValueError(
            f"{target}: holds other record files already ({', '.join(others)}); remove them or choose another folder"
        )
    for domain, content in by_domain.items():
        write_json(target / f"{domain}.json", content, compact=True, ensure_ascii=False)
