"""Reader of KnowEdit: ZsRE, Wiki-recent, Wiki-counterfact and WikiBio, which share one schema (PROTOCOL, Datasets)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..core.records import EditCase, EditRecord, EditRequest
from .fields import Field, cases
from .files import read_each, stem

EMPTY = "edit with an empty prompt or target"
CRITERIA = {
    "Subject_Aliasing": "Subject Alias",
    "Forgetfulness": "1-N Forgotten",
}  # KnowEdit's kinds that PROTOCOL names otherwise
BIOGRAPHY = {"prompt": "text", "target_new": "labels", "subject": "concept"}  # what WikiBio calls the parts of an edit


def read_knowedit(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one KnowEdit file; an id is the file's name up to its first dot, and the position in it.

    ``rephrase_prompt``, where there is one, and a list for each kind of ``portability`` are generality, one for each
    kind of ``locality`` is locality. An answer is a text, a list of texts, or a list of such lists: the first is the
    target, the others are aliases. A null or empty prompt or target is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    counted: Counter[str] = Counter() if skipped is None else skipped
    yield from read_each(file, "list", "KnowEdit", partial(_parse, name=stem(file), skipped=counted))


def _parse(value: Any, key: str, name: str, skipped: Counter[str]) -> EditRecord | None:
    return parse_knowedit(Field(value, "", f"{name}-{key}"), skipped)


def parse_knowedit(record: Field, skipped: Counter[str], dataset: str = "knowedit") -> EditRecord | None:
    """Turn one JSON record into an :class:`EditRecord`; None (and a count) where its prompt or target is blank."""
    names = BIOGRAPHY if "concept" in record and "labels" in record else {part: part for part in BIOGRAPHY}
    for part in ("prompt", "target_new"):
        record[names[part]]  # named if it is missing: a blank text is skipped, another format is not
    prompt, new, subject = (record.text(names[part]) for part in ("prompt", "target_new", "subject"))
    if not prompt or not new:
        skipped[EMPTY] += 1
        return None
    rephrase = (
        cases("rephrase_prompt", record.text("rephrase_prompt"), new, skipped, criteria=("Rephrase",))
        if "rephrase_prompt" in record
        else ()
    )
    truth = record["ground_truth"].names() if "ground_truth" in record else ()
    return EditRecord(
        record.record,
        dataset,
        "",
        (EditRequest(prompt, new, subject or None),),
        generality=rephrase + _kinds(record, "portability", skipped),
        locality=_kinds(record, "locality", skipped),
        metadata={"original": truth[0]} if truth else {},
    )


def _kinds(record: Field, group: str, skipped: Counter[str]) -> tuple[EditCase, ...]:
    """Return the cases of every kind of a group; of several answers the first is the target, the others aliases."""
    if group not in record:
        return ()
    kinds = record[group]
    of_group: list[EditCase] = []
    for kind in kinds.of(dict):
        criteria = (CRITERIA.get(kind, kind.replace("_", " ")),)
        for part in kinds[kind].parts():
            target, *aliases = part["ground_truth"].names() or ("",)
            of_group += cases(kind, part.text("prompt"), target, skipped, criteria=criteria, aliases=tuple(aliases))
    return tuple(of_group)
