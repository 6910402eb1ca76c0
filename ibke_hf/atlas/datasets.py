"""`ibke atlas build-data`: writes the committed evaluation records and builds training records on the fly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..core.records import EditRecord
from ..data.folders import write_records
from ..data.uniedit import parse_record
from .splits import RECORDS, Split, build_records

EVALUATION_CASES = {"generality": 3, "locality": 2}
TRAINING_CASES = {"generality": 4, "locality": 2}
TRAINING_OPTIONS: dict[str, Any] = {
    "unknown_share": 0.4,
    # names that the backbone has never seen are what unknown edits are hardest with, and few are withheld
    "novel_rate": 0.3,
    # the backbone is not sure of its yes and no: answering Yes to everything is soon learnt, and to nothing else takes
    # long
    "shares": {"generality": {"same_entity": 0.5}, "locality": {"same_entity": 6.0}},
}


def write_evaluation_records(split: Split, out: str | Path) -> dict[str, int]:
    """Write test, held-out and validation records, one UniEdit file per domain; return the number of each."""
    counts = {}
    for name, number in RECORDS.items():
        records = build_records(split, name, number, **EVALUATION_CASES)
        write_records(records, Path(out) / name)
        counts[name] = len(records)
    return counts


def write_training_records(split: Split, out: str | Path, number: int, seed: int, **cases: int) -> int:
    """Write training records, one UniEdit file per domain, for an editor of another backbone; return their number.

    Args:
        split: The world.
        out: Folder of the files.
        number: Number of records, of the train side only.
        seed: Seed of every draw.
        cases: ``generality`` and ``locality`` cases of a record, instead of :data:`TRAINING_CASES`.
    """
    records = build_records(split, "train", number, seed=seed, **{**TRAINING_CASES, **cases}, **TRAINING_OPTIONS)
    write_records(records, out)
    return len(records)


def training_records(split: Split, number: int, seed: int) -> list[EditRecord]:
    """Build training records: subjects, relations and withheld triples of the train side only."""
    built = build_records(split, "train", number, seed=seed, **TRAINING_CASES, **TRAINING_OPTIONS)
    skipped: Counter[str] = Counter()
    parsed = [parse_record(record, f"{domain}-{i}", domain, skipped) for i, (domain, record) in enumerate(built)]
    return [record for record in parsed if record is not None]
