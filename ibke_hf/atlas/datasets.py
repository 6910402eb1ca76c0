"""`ibke atlas build-data`: writes the committed evaluation records and builds training records on the fly."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.records import EditRecord
from ..data.facts import Triple
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


def training_records(
    split: Split, number: int, seed: int, *, domain: str | None = None, **options: Any
) -> list[EditRecord]:
    """Build training records: subjects, relations and withheld triples of the train side only.

    Args:
        split: Of :func:`~ibke_hf.atlas.load_split`.
        number: Of records.
        seed: Of all draws.
        domain: Edit facts of this domain alone; the cases may lead to any fact.
        options: What differs from `TRAINING_CASES` and `TRAINING_OPTIONS`, such as ``unknown_share``.

    Raises:
        ValueError: If no fact of the domain may be edited in training.
    """
    if domain is not None:
        split = _only(split, domain)
    built = build_records(split, "train", number, seed=seed, **{**TRAINING_CASES, **TRAINING_OPTIONS, **options})
    skipped: Counter[str] = Counter()
    parsed = [parse_record(record, f"{part}-{i}", part, skipped) for i, (part, record) in enumerate(built)]
    return [record for record in parsed if record is not None]


def _only(split: Split, domain: str) -> Split:
    """Return the split with the training facts of one domain."""

    def kept(triples: tuple[Triple, ...]) -> tuple[Triple, ...]:
        return tuple(triple for triple in triples if split.world.relations[triple.relation].domain == domain)

    counterfactual, unknown = kept(split.counterfactual["train"]), kept(split.unknown["train"])
    if not (counterfactual and unknown):
        domains = sorted({split.world.relations[triple.relation].domain for triple in split.unknown["train"]})
        raise ValueError(f"no fact of {domain!r} may be edited in training; domains are {', '.join(domains)}")
    return replace(split, counterfactual={"train": counterfactual}, unknown={"train": unknown})
