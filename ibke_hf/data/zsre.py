"""Reader of ZSRE: MEND's records, which EasyEdit uses too, and KnowEdit's (PROTOCOL, Datasets)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..core.records import EditRecord, EditRequest
from .fields import Field, cases
from .files import read_each, stem
from .knowedit import EMPTY, parse_knowedit

ANSWER = (
    " The answer is: "  # as UniEdit's reader has it: with the target's own space, two spaces stand before the target
)


def read_zsre(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one ZSRE file; an id is the file's name up to its first dot, and the position in it.

    MEND's form gives the lists ``rephrase`` (generality) and ``loc`` (locality); the edit goes toward ``alt``, and "
    The answer is: " is appended to ``src`` and ``rephrase``. KnowEdit's form is :mod:`.knowedit`'s. A null or empty
    prompt or target is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    counted: Counter[str] = Counter() if skipped is None else skipped
    yield from read_each(file, "list", "ZSRE", partial(_parse, name=stem(file), skipped=counted))


def _parse(value: Any, key: str, name: str, skipped: Counter[str]) -> EditRecord | None:
    record = Field(value, "", f"{name}-{key}")
    return _mend(record, skipped) if "src" in record or "alt" in record else parse_knowedit(record, skipped, "zsre")


def _mend(record: Field, skipped: Counter[str]) -> EditRecord | None:
    for key in ("src", "alt", "rephrase", "loc", "loc_ans"):
        record[key]  # named if it is missing: a blank text is skipped, another format is not
    source, new, rephrase = record.text("src"), record.text("alt"), record.text("rephrase")
    if not source or not new:
        skipped[EMPTY] += 1
        return None
    return EditRecord(
        record.record,
        "zsre",
        "",
        (EditRequest(source + ANSWER, new, record.text("subject") or None),),
        generality=cases("rephrase", rephrase and rephrase + ANSWER, new, skipped, criteria=("Rephrase",)),
        locality=cases("loc", record.text("loc"), record.text("loc_ans"), skipped),
        metadata=_original(record["answers"].names()),
    )


def _original(answers: tuple[str, ...]) -> dict[str, str]:
    return {"original": answers[0]} if answers else {}
