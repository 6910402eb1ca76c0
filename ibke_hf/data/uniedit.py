"""Reader of UniEdit's native format: one JSON object of records per domain (PROTOCOL, Criteria; FORMAT)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.records import EditCase, EditRecord, EditRequest, Hop
from .fields import Field, RecordError
from .files import read_each, stem

__all__ = ["YES_NO", "RecordError", "parse_record", "read_uniedit"]

YES_NO = " The answer is (Yes/No):"
EDIT_PATH = ["h_e", "r_e", "t_e"]
Json = dict[str, Any]


def read_uniedit(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one UniEdit file (``<domain>.json``, or gzipped ``.json.gz``).

    A null or empty target or prompt is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    domain, counted = stem(file), Counter() if skipped is None else skipped
    yield from read_each(
        file, "object", "UniEdit", lambda value, key: parse_record(value, f"{domain}-{key}", domain, counted)
    )


def parse_record(value: Json, record_id: str, domain: str, skipped: Counter[str]) -> EditRecord | None:
    """Turn one JSON record into an :class:`EditRecord`; None (and a count) where a text is missing.

    Raises:
        RecordError: If it is unreadable, naming record and field.
    """
    record = Field(value, "", record_id)
    edit = record["edit"]
    if not edit.text("prompt") or not edit.text("target"):
        skipped["edit with an empty prompt or target"] += 1
        return None
    fact = _hop(edit)
    request = EditRequest(fact.prompt, fact.target, edit.text("subject").strip() or None)
    generality = [_case(case, fact, "uni_gen", skipped) for case in record["generality"].values()]
    locality = [_case(case, fact, "uni_loc", skipped) for case in record["locality"].values()]
    return EditRecord(
        id=record_id,
        dataset="uniedit",
        domain=domain,
        requests=(request,),
        edits=(fact,),
        generality=tuple(case for case in generality if case),
        locality=tuple(case for case in locality if case),
        kind=record.text("kind"),
        relation=edit["property"].text("label"),
        metadata={"original": record.text("original")} if "original" in value else {},
    )


def _case(case: Field, edit: Hop, name: str, skipped: Counter[str]) -> EditCase | None:
    double = case["path_type"].of(str) == "double"
    halves = [case["single_path1"], case["single_path2"]] if double else [case]
    prompt, target = case.text("prompt"), case.text("target")
    if not prompt or not target:
        skipped[f"{name} case with an empty prompt or target"] += 1
        return None
    paths = [[item.texts() for item in half["paths"].items()] for half in halves]
    hops = [hop for half in halves for hop in half["one_hops"].items()]
    facts = tuple(map(_hop, hops))
    supporting = tuple(fact for fact, hop in zip(facts, hops, strict=True) if hop["path"].texts() != EDIT_PATH)
    if name == "uni_gen" and not all(hop.prompt and hop.target for hop in supporting):  # of locality, no hop is asked
        skipped[f"{name} case with an empty supporting hop"] += 1
        return None
    return EditCase(
        prompt=prompt + YES_NO if double else prompt,
        target=target,
        criteria=_generality(paths, double, hops) if name == "uni_gen" else _locality(paths, double, facts, edit),
        hops=max(map(len, paths)),
        top_k=1 if double else 5,
        name=name,
        facts=facts,
        supporting=supporting,
        aliases=() if double else _other_names(hops[-1], target),
    )


def _hop(hop: Field) -> Hop:
    kind, value = hop["tail_entity"]["datatype"].of(str), hop["tail_entity"]["value"]
    item = kind == "wikibase-item"
    return Hop(
        prompt=hop.text("prompt"),
        target=hop.text("target"),
        head=hop["head_entity"]["id"].of(str),
        property=hop["property"]["id"].of(str),
        tail=value["id"].of(str) if item else f"{kind}:{value.value}",
        tail_is_item=item,
        subject=hop.text("subject").strip() or None,
    )


def _item_tail(hop: Field) -> Field | None:
    tail = hop["tail_entity"]
    return tail["value"] if tail["datatype"].value == "wikibase-item" else None


def _other_names(hop: Field, target: str) -> tuple[str, ...]:
    """Other spellings of the answer, which is the hop's tail, or its head if it was walked backwards."""
    entity = hop["head_entity"] if hop["reverse_in_multi_hop"].of(bool) else _item_tail(hop)
    names = [] if entity is None else [entity["label"].of(str), *entity["aliases"].texts()]
    return tuple(name for name in names if name != target)


def _generality(paths: list[list[list[str]]], double: bool, hops: list[Field]) -> tuple[str, ...]:
    """Name the criteria of a generality case, as UniEdit's own reader derives them."""
    items = [item for path in paths for item in path]
    edits = [hop for hop in hops if hop["path"].texts() == EDIT_PATH]
    named = {
        "Rephrase": not double and len(items) == 1 and items[0][:4] == [*EDIT_PATH, "f"],
        "Multi-Hop": any(len(path) > 1 for path in paths),
        "Relation Reverse": any(item[:4] == ["t_e", "r_e", "h_e", "b"] for item in items),
        "Same-Entity Reasoning": double,
        "Subject Alias": any(_by_alias(hop) for hop in edits),
        "Object Alias": any(_to_alias(hop) for hop in edits),
    }
    return tuple(name for name, holds in named.items() if holds)


def _by_alias(hop: Field) -> bool:
    head = hop["head_entity"]
    return bool(head["aliases"].texts()) and hop.value.get("subject") != head["label"].of(str)


def _to_alias(hop: Field) -> bool:
    tail = _item_tail(hop)
    return tail is not None and bool(tail["aliases"].texts()) and hop.text("target") != tail["label"].of(str)


def _locality(paths: list[list[list[str]]], double: bool, facts: tuple[Hop, ...], edit: Hop) -> tuple[str, ...]:
    """Name the criteria of a locality case (PROTOCOL, Criteria)."""
    ends = [{fact.head, *([fact.tail] if fact.tail_is_item else [])} for fact in facts]
    named = {
        "Subject Specificity": any(edit.head in end for end in ends),
        "Relation Specificity": any(fact.property == edit.property for fact in facts),
        "Object Specificity": edit.tail_is_item and any(edit.tail in end for end in ends),
        "1-N Forgotten": any(fact.head == edit.head and fact.property == edit.property for fact in facts),
        "Multi-Hop": any(len(path) > 1 for path in paths),
        "Same-Entity Reasoning": double,
    }
    return tuple(name for name, holds in named.items() if holds)
