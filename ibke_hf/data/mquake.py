"""Reader of MQuAKE: MQuAKE-CF, -CF-3k, -T and -hard, which share one schema (PROTOCOL, Datasets)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.records import EditCase, EditRecord, EditRequest, Hop
from .fields import Field, cases
from .files import read_each, stem


def read_mquake(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one MQuAKE file; a record's id is the file's name up to its first dot, and its ``case_id``.

    Every requested rewrite is a request of its own; every question is a generality case of the list ``questions``,
    with the new hops that are not edited as its supporting hops. There is no locality. A null or empty prompt or
    target is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    counted: Counter[str] = Counter() if skipped is None else skipped
    yield from read_each(file, "list", "MQuAKE", partial(_parse, name=stem(file), skipped=counted))


def _parse(value: Any, key: str, name: str, skipped: Counter[str]) -> EditRecord | None:
    record = Field(value, "", f"{name}-{key}")
    record = Field(value, "", f"{name}-{record['case_id'].ident()}")  # case_ids of different files overlap
    rewrites = record["requested_rewrite"].items()
    if not all(rewrite.text(part) for rewrite in rewrites for part in ("prompt", "subject")) or not all(
        map(_new_target, rewrites)
    ):
        skipped["record with an edit of an empty prompt, target or subject"] += 1
        return None
    requests = tuple(
        EditRequest(r["prompt"].filled(r.text("subject")), _new_target(r), r.text("subject")) for r in rewrites
    )
    edits = _edits(record["orig"]["edit_triples"], rewrites, requests)
    relations = dict.fromkeys(rewrite["relation_id"].of(str) for rewrite in rewrites)
    return EditRecord(
        record.record,
        "mquake",
        "",
        requests,
        generality=_questions(record, edits, skipped),
        edits=edits,
        relation=",".join(relations),
        metadata={"original": record.text("answer")},
    )


def _new_target(rewrite: Field) -> str:
    return rewrite["target_new"].text("str")


def _edits(triples: Field, rewrites: Sequence[Field], requests: Sequence[EditRequest]) -> tuple[Hop, ...]:
    """Return the requests as triples: rewrites name relation and new object, ``orig.edit_triples`` the subject too."""
    edited = [triple.texts() for triple in triples.parts()]
    edits = []
    for i, (rewrite, request) in enumerate(zip(rewrites, requests, strict=True)):
        relation, new_object = rewrite["relation_id"].of(str), rewrite["target_new"]["id"].of(str)
        candidates = [*edited[i : i + 1], *edited]
        head = next((triple[0] for triple in candidates if triple[1:] == [relation, new_object]), None)
        if head is None:
            raise triples.error(f"has no triple of the new object of {rewrite.path} ({relation} {new_object})")
        edits.append(Hop(request.prompt, request.target, head, relation, new_object, subject=request.subject))
    return tuple(edits)


def _questions(record: Field, edits: Sequence[Hop], skipped: Counter[str]) -> tuple[EditCase, ...]:
    facts = _new_hops(record)
    edited = {(edit.head, edit.property, edit.tail) for edit in edits}
    supporting = tuple(hop for hop in facts if (hop.head, hop.property, hop.tail) not in edited)
    questions = [question.of(str) for question in record["questions"].items()]
    if not all(hop.prompt and hop.target for hop in supporting):
        skipped["questions case with an empty supporting hop"] += len(questions)
        return ()
    target = record.text("new_answer")
    aliases = tuple(name for name in record["new_answer_alias"].names() if name != target)
    details = {
        "criteria": ("Multi-Hop",),
        "hops": len(facts),
        "aliases": aliases,
        "supporting": supporting,
        "facts": facts,
    }
    case_lists = [
        cases("questions", question.rstrip(), target, skipped, **details) for question in questions
    ]  # the seam has one space
    return tuple(case for question_cases in case_lists for case in question_cases)


def _new_hops(record: Field) -> tuple[Hop, ...]:
    hops, triples = record["new_single_hops"].items(), record["orig"]["new_triples"]
    if len(hops) != len(triples.of(list)):
        raise triples.error(f"has {len(triples.value)} triples for {len(hops)} new_single_hops")
    for triple in triples.parts():
        if len(triple.texts()) != 3:
            raise triple.error("is not a triple")
    new_hops = []
    for hop, (head, relation, tail), subject in zip(hops, triples.value, _heads(record, len(hops)), strict=True):
        prompt = hop.text("cloze").rstrip()
        new_hops.append(
            Hop(
                prompt,
                hop.text("answer"),
                head,
                relation,
                tail,
                subject=subject if subject and subject in prompt else None,
            )
        )
    return tuple(new_hops)


def _heads(record: Field, number: int) -> list[str | None]:
    """Return the names of the hops' heads, which editors may look for in a hop's prompt; None where there are none."""
    labelled = record["orig"].value.get("new_triples_labeled")
    if not isinstance(labelled, list) or len(labelled) != number:
        return [None] * number
    return [
        triple[0] if isinstance(triple, list) and triple and isinstance(triple[0], str) else None
        for triple in labelled
    ]
