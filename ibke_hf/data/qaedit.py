"""Reader of QAEdit: questions of question-answering benchmarks with their answers (PROTOCOL, Free generation)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..core.records import EditCase, EditRecord, EditRequest
from .fields import Field, cases
from .files import read_each, stem

EMPTY = "edit with an empty prompt or target"
NOISE = re.compile(r"(^|\s+)[*.,;:|~_]+\s*$")  # a mark that stands apart at the end, such as " *"


def read_qaedit(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one QAEdit file.

    A record's id is the file's name up to its first dot, and its position in the file, since its own ``id`` occurs
    more than once. The edit goes from ``prompt`` to ``target``; ``rephrase`` is generality, the list ``locality`` of
    questions (``loc``) and answers (``loc_ans``) locality. Noise at the end of an answer is stripped. A null or empty
    prompt or target is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    counted: Counter[str] = Counter() if skipped is None else skipped
    yield from read_each(file, "list", "QAEdit", partial(_parse, name=stem(file), skipped=counted))


def stripped(answer: str) -> str:
    """Return an answer without blanks around it and without marks that stand apart at its end."""
    return NOISE.sub("", answer).strip()


def _parse(value: Any, key: str, name: str, skipped: Counter[str]) -> EditRecord | None:
    record = Field(value, "", f"{name}-{key}")
    for part in ("prompt", "target", "rephrase"):
        record[part]  # named if it is missing: a blank text is skipped, another format is not
    prompt, target = record.text("prompt").strip(), stripped(record.text("target"))
    if not prompt or not target:
        skipped[EMPTY] += 1
        return None
    locality: list[EditCase] = []
    for other in record["locality"].parts():
        locality += cases("locality", other.text("loc").strip(), stripped(other.text("loc_ans")), skipped)
    metadata = {"id": record["id"].ident() if "id" in record else "", "source": record.text("source")}
    return EditRecord(
        record.record,
        "qaedit",
        "",
        (EditRequest(prompt, target, record.text("subject").strip() or None),),
        generality=cases("rephrase", record.text("rephrase").strip(), target, skipped, criteria=("Rephrase",)),
        locality=tuple(locality),
        metadata={name: text for name, text in metadata.items() if text},
    )
