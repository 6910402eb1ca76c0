"""Records of a user's own facts: `ibke data build`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ..core.prompts import is_unspaced_text
from ..core.records import subject_key
from ..io import write_json
from .build import RecordBuilder
from .case_maker import Json
from .facts import Triple, World, load_world
from .files import record_files

RECORDS_A_TRIPLE = 1000  # more would only repeat themselves, and take hours to do so


def build_folder(
    facts: str | Path,
    out: str | Path,
    *,
    records: int = 1000,
    validation: float = 0.1,
    generality: int = 3,
    locality: int = 2,
    seed: int = 0,
    replace: bool = False,
    without: Collection[str] = (),
    **options: Any,
) -> dict[str, int]:
    """Turn tables of facts into training and validation records with disjoint subjects; return the number of each.

    Half of the edits are counterfactual, half state the true triple (which a model may or may not know already).

    Args:
        facts: Folder of the tables, see :mod:`ibke_hf.data.facts`.
        out: Gets the folders ``train`` and ``validation``.
        records: Number of training records.
        validation: Share of the subjects kept for validation, and of so many records more.
        generality: Generality cases a record.
        locality: Locality cases a record.
        seed: Of every draw.
        replace: Remove the record files that lie there, once the new ones can be written.
        without: Subjects whose triples are left out, as :func:`~ibke_hf.core.records.subject_key` writes them.
        options: Shares and rates of the records, see :class:`~ibke_hf.data.build.RecordBuilder`.

    Raises:
        FactsError: Naming every bad row by file and line.
        ValueError: If a number is out of range, the tables give no record at all, or `out` holds record files of other
            domains.
    """
    _require_sizes(records, validation, generality, locality)
    world = load_world(facts)
    if without:
        world = world.restricted_to([t for t in world.triples if subject_key(t.subject) not in without])
    if records > RECORDS_A_TRIPLE * len(world.triples):
        raise ValueError(
            f"{facts}: {len(world.triples):,} triples make no more than {RECORDS_A_TRIPLE:,} unlike records each, and "
            f"{records:,} are asked for; add triples or ask for fewer"
        )
    splits = {}
    numbers = {"train": records, "validation": round(records * validation)}
    for name, triples in _split_by_subject(world, validation, seed).items():
        builder = RecordBuilder(
            world, world, seed=f"{seed}-{name}", generality=generality, locality=locality, **options
        )
        splits[name] = _records(builder, world, triples, numbers[name], random.Random(f"{seed}-{name}"))
        if numbers[name] and not splits[name]:
            raise ValueError(
                f"{facts}: no {name} record can be built; add triples, wordings, or a larger validation share"
            )
    for name, built in splits.items():
        if replace and (Path(out) / name).is_dir():
            for file in record_files(Path(out) / name):
                file.unlink()
        if built:
            write_records(built, Path(out) / name)
    return {name: len(built) for name, built in splits.items()}


def _split_by_subject(world: World, validation: float, seed: int) -> dict[str, list[Triple]]:
    """Return the triples to train with and, of a drawn share of the subjects, those to validate with."""
    subjects = sorted({t.subject for t in world.triples})
    random.Random(seed).shuffle(subjects)
    held = set(subjects[: round(validation * len(subjects))])
    return {
        "train": [t for t in world.triples if t.subject not in held],
        "validation": [t for t in world.triples if t.subject in held],
    }


def _require_sizes(records: int, validation: float, generality: int, locality: int) -> None:
    if min(records, generality, locality) < 1:
        raise ValueError(
            f"records, generality and locality must be at least 1, found {records}, {generality} and {locality}"
        )
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be in [0, 1), found {validation}")


def _records(
    builder: RecordBuilder, world: World, triples: list[Triple], count: int, rng: random.Random
) -> list[tuple[str, Json]]:
    rng.shuffle(triples)
    makers, number = (builder.counterfactual, builder.unknown), max(len(triples), 1)
    turns = enumerate(islice(cycle(triples), 4 * count))  # each triple gets the other kind of edit at its next turn
    tries = ((makers[(i // number + i % number) % 2](triple), triple) for i, triple in turns)
    built_records = (
        (world.relations[triple.relation].domain, with_spacing(record))
        for record, triple in tries
        if record is not None
    )
    return list(islice(built_records, count))


def with_spacing(record: Json) -> Json:
    """Return a record that says so if its targets follow their prompts without a space, as its script has them."""
    asked = [record["edit"], *record["generality"].values(), *record["locality"].values()]
    unspaced = any(is_unspaced_text(one["prompt"]) for one in asked)
    return {**record, "leading_space": "auto"} if unspaced else record


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
