"""Reader of UniEdit's native format: one JSON object of records per domain (PROTOCOL, Criteria; FORMAT)."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import EditCase, EditRecord, EditRequest, Hop

YES_NO = " The answer is (Yes/No):"
EDIT_PATH = ["h_e", "r_e", "t_e"]
Json = dict[str, Any]


class RecordError(ValueError):
    """An unreadable record; the message names file, record and field."""


def read_uniedit(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one UniEdit file (``<domain>.json``, or gzipped ``.json.gz``).

    A null or empty target or prompt is skipped and counted by reason in `skipped`.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    path = Path(file)
    domain = path.name.split(".")[0]
    skipped = Counter() if skipped is None else skipped
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        try:
            content = json.load(handle)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecordError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: a UniEdit file is one JSON object of records, found {type(content).__name__}")
    for key, value in content.items():
        try:
            record = parse_record(value, f"{domain}-{key}", domain, skipped)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: record {key!r}: unreadable or missing field {error}") from error
        if record is not None:
            yield record


def parse_record(value: Json, record_id: str, domain: str, skipped: Counter[str]) -> EditRecord | None:
    """Turn one JSON record into an :class:`EditRecord`; None (and a count) where a text is missing."""
    edit = value["edit"]
    if not edit["prompt"] or not edit["target"]:
        skipped["edit with an empty prompt or target"] += 1
        return None
    fact = _hop(edit)
    request = EditRequest(edit["prompt"], edit["target"], edit.get("subject") or None)
    generality = [_case(case, fact, "uni_gen", skipped) for case in value["generality"].values()]
    locality = [_case(case, fact, "uni_loc", skipped) for case in value["locality"].values()]
    return EditRecord(
        id=record_id, dataset="uniedit", domain=domain, requests=(request,), edits=(fact,),
        generality=tuple(case for case in generality if case), locality=tuple(case for case in locality if case),
        kind=value.get("kind", ""), relation=edit["property"]["label"],
        metadata={"original": value["original"]} if "original" in value else {},
    )  # fmt: skip


def _case(value: Json, edit: Hop, name: str, skipped: Counter[str]) -> EditCase | None:
    double = value["path_type"] == "double"
    halves = [value["single_path1"], value["single_path2"]] if double else [value]
    if not value["prompt"] or not value["target"]:
        skipped[f"{name} case with an empty prompt or target"] += 1
        return None
    hops = [hop for half in halves for hop in half["one_hops"]]
    facts = tuple(_hop(hop) for hop in hops)
    criteria = _generality(halves, double) if name == "uni_gen" else _locality(halves, double, facts, edit)
    last = halves[-1]["one_hops"][-1]
    return EditCase(
        prompt=value["prompt"] + YES_NO if double else value["prompt"], target=value["target"], criteria=criteria,
        hops=max(len(half["paths"]) for half in halves), top_k=1 if double else 5, name=name, facts=facts,
        supporting=tuple(f for f, hop in zip(facts, hops, strict=True) if hop["path"] != EDIT_PATH),
        aliases=() if double else _other_names(last, value["target"]),
    )  # fmt: skip


def _hop(value: Json) -> Hop:
    tail = value["tail_entity"]
    item = tail["datatype"] == "wikibase-item"
    return Hop(
        prompt=value["prompt"], target=value["target"], head=value["head_entity"]["id"], property=value["property"]["id"],
        tail=tail["value"]["id"] if item else f"{tail['datatype']}:{tail['value']}", tail_is_item=item,
        subject=value.get("subject") or None,
    )  # fmt: skip


def _other_names(hop: Json, target: str) -> tuple[str, ...]:
    """Other spellings of the answer, which is the hop's tail, or its head if it was walked backwards."""
    backwards = hop["reverse_in_multi_hop"]
    tail = hop["tail_entity"]
    entity = hop["head_entity"] if backwards else tail["value"] if tail["datatype"] == "wikibase-item" else None
    names = () if entity is None else (entity["label"], *entity["aliases"])
    return tuple(name for name in names if name != target)


def _generality(halves: list[Json], double: bool) -> tuple[str, ...]:
    """Name the criteria of a generality case, as UniEdit's own reader derives them."""
    items = [item for half in halves for item in half["paths"]]
    edits = [hop for half in halves for hop in half["one_hops"] if hop["path"] == EDIT_PATH]
    single = len(halves) == 1 and len(items) == 1 and items[0][:4] == [*EDIT_PATH, "f"]
    named = {
        "Rephrase": single,
        "Multi-Hop": any(len(half["paths"]) > 1 for half in halves),
        "Relation Reverse": any(item[:4] == ["t_e", "r_e", "h_e", "b"] for item in items),
        "Same-Entity Reasoning": double,
        "Subject Alias": any(_by_alias(hop) for hop in edits),
        "Object Alias": any(_to_alias(hop) for hop in edits),
    }
    return tuple(name for name, holds in named.items() if holds)


def _by_alias(hop: Json) -> bool:
    return bool(hop["head_entity"]["aliases"]) and hop.get("subject") != hop["head_entity"]["label"]


def _to_alias(hop: Json) -> bool:
    tail = hop["tail_entity"]
    return tail["datatype"] == "wikibase-item" and bool(tail["value"]["aliases"]) and hop["target"] != tail["value"]["label"]


def _locality(halves: list[Json], double: bool, facts: tuple[Hop, ...], edit: Hop) -> tuple[str, ...]:
    """Name the criteria of a locality case (PROTOCOL, Criteria)."""
    ends = [{fact.head, *([fact.tail] if fact.tail_is_item else [])} for fact in facts]
    named = {
        "Subject Specificity": any(edit.head in end for end in ends),
        "Relation Specificity": any(fact.property == edit.property for fact in facts),
        "Object Specificity": edit.tail_is_item and any(edit.tail in end for end in ends),
        "1-N Forgotten": any(fact.head == edit.head and fact.property == edit.property for fact in facts),
        "Multi-Hop": any(len(half["paths"]) > 1 for half in halves),
        "Same-Entity Reasoning": double,
    }
    return tuple(name for name, holds in named.items() if holds)
