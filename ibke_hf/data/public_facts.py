"""ParaRel's and LRE's published triples -> tables of facts that :func:`~ibke_hf.data.facts.load_world` reads.

ParaRel (Elazar et al. 2021) has a file of triples and one of patterns for each Wikidata property; LRE (Hernandez et
al. 2023) one file with both for each relation. Neither says how to chain a hop or ask a question, so nouns and
questions for their relations ship with the package (`assets/wordings`); the statements are the publishers' own.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.records import subject_key
from ..io import FileError, read_json, write_text
from .facts import RELATION_COLUMNS, TEMPLATE_COLUMNS, TRIPLE_COLUMNS, Triple
from .fields import Field, RecordError
from .files import json_items

WORDINGS = Path(__file__).parent / "assets" / "wordings"
KIND = "entity"  # the publishers tell no kinds apart
ARTICLES = (" a", " an", " the")  # at the end of a pattern: which of them is right depends on the object
UNFIT = frozenset("\t\r\n{}")  # in a cell of a table
Cells = tuple[str, ...]


def write_tables(
    out: str | Path,
    *,
    pararel: str | Path | None = None,
    lre: str | Path | None = None,
    without: Collection[str] = (),
) -> Counter[str]:
    """Write the tables of the facts of either source or both, a folder per domain.

    Args:
        out: Gets the folders.
        pararel: ParaRel's folder, with ``triples/P36.jsonl`` and ``patterns/P36.jsonl`` and so on.
        lre: LRE's folder of factual relations, with ``person_father.json`` and so on.
        without: Subjects that no triple may have, as :func:`~ibke_hf.core.records.subject_key` writes them.

    Returns:
        How many ``triples`` and ``relations`` were written, and how many triples were left out, by reason.

    Raises:
        RecordError: If no source is given, or a file of one is unreadable.
    """
    tables: dict[str, dict[str, list[Cells]]] = defaultdict(lambda: defaultdict(list))
    templates, counts = _templates(), Counter[str]()
    sources = [source for source in (pararel, lre) if source is not None]
    if not sources:
        raise RecordError("no source of facts is given: name ParaRel's folder, LRE's, or both")
    for row in _cells(WORDINGS / "relations.tsv"):
        name, forms = row["relation"], templates[row["relation"]]
        triples: list[Triple] = []
        if pararel is not None:
            triples += _pararel_triples(Path(pararel), name)
            forms["prompt"] |= dict.fromkeys(_pararel_prompts(Path(pararel), name))
        if lre is not None and row["source"] != "-":
            samples, prompts = _lre(Path(lre) / f"{row['source']}.json", name)
            triples += samples
            forms["prompt"] |= dict.fromkeys(prompts)
        kept = list(_consistent(triples, row, without, counts))
        if kept:
            counts["relations"] += 1
            _add(tables[row["domain"]], row, forms, kept)
    if not counts["triples"]:
        raise RecordError(
            f"{', '.join(map(str, sources))}: no triple of a known relation; {dict(counts) or 'no file'}"
        )
    headers = {"relations": RELATION_COLUMNS, "templates": TEMPLATE_COLUMNS, "triples": TRIPLE_COLUMNS}
    for domain, of_domain in tables.items():
        (Path(out) / domain).mkdir(parents=True, exist_ok=True)
        for table, header in headers.items():
            lines = ("\t".join(cells) + "\n" for cells in (header, *of_domain[table]))
            write_text(Path(out) / domain / f"{table}.tsv", "".join(lines))
    return counts


def _add(
    tables: Mapping[str, list[Cells]], row: Mapping[str, str], forms: Mapping[str, Iterable[str]], kept: list[Triple]
) -> None:
    name = row["relation"]
    tables["relations"].append((name, row["label"], KIND, KIND, row["single_value"], row["inverse_single"]))
    tables["templates"] += [(name, form, text) for form, texts in forms.items() for text in texts]
    tables["triples"] += [(triple.subject, name, triple.object) for triple in kept]


def _consistent(
    triples: Iterable[Triple], row: Mapping[str, str], without: Collection[str], counts: Counter[str]
) -> Iterator[Triple]:
    """Yield the triples that a table may hold together, count them and the others."""
    seen: set[Triple] = set()
    objects: dict[str, str] = {}
    subjects: dict[str, str] = {}
    for triple in triples:
        single = row["single_value"] == "yes" and objects.get(triple.subject, triple.object) != triple.object
        inverse = row["inverse_single"] == "yes" and subjects.get(triple.object, triple.subject) != triple.subject
        if triple in seen:
            reason = "stated twice"
        elif subject_key(triple.subject) in without:
            reason = "subject to be kept out"
        elif single or inverse:
            reason = "another object or subject of a relation that has one alone"
        elif not triple.subject or not triple.object or UNFIT & {*triple.subject, *triple.object}:
            reason = "a name that no table can hold"
        elif triple.subject == triple.object:
            reason = "a name that is its own object"
        else:
            seen.add(triple)
            objects[triple.subject], subjects[triple.object] = triple.object, triple.subject
            counts["triples"] += 1
            yield triple
            continue
        counts[reason] += 1


def _pararel_triples(folder: Path, relation: str) -> Iterator[Triple]:
    file = folder / "triples" / f"{relation}.jsonl"
    for key, value in json_items(file) if file.is_file() else ():
        row = Field(value, "", f"{file}: {key}")
        yield Triple(row.text("sub_label").strip(), relation, row.text("obj_label").strip())


def _pararel_prompts(folder: Path, relation: str) -> Iterator[str]:
    """Yield the patterns that end right before the object, with ``{}`` for the subject."""
    file = folder / "patterns" / f"{relation}.jsonl"
    for key, value in json_items(file) if file.is_file() else ():
        pattern = Field(value, "", f"{file}: {key}").text("pattern").rstrip(" .,")
        before = pattern.removesuffix("[Y]").strip()
        if pattern.endswith(" [Y]") and before.count("[X]") == 1 and not before.endswith((*ARTICLES, ":")):
            yield " ".join(before.replace("[X]", "{}").split())


def _lre(file: Path, relation: str) -> tuple[list[Triple], list[str]]:
    """Return triples and prompts of a relation's file; none where there is no file."""
    if not file.is_file():
        return [], []
    try:
        content = Field(read_json(file), "", str(file))
    except FileError as error:
        raise RecordError(str(error)) from error
    samples = content["samples"].parts()
    triples = [Triple(s.text("subject").strip(), relation, s.text("object").strip()) for s in samples]
    prompts = [*content["prompt_templates"].texts(), *content["prompt_templates_zs"].texts()]
    return triples, [prompt.strip() for prompt in prompts if prompt.count("{}") == 1]


def _templates() -> dict[str, dict[str, dict[str, None]]]:
    """Return the wordings that ship with the package, by relation and form; a dict keeps each once, in order."""
    templates: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for row in _cells(WORDINGS / "templates.tsv"):
        templates[row["relation"]][row["form"]][row["text"]] = None
    return templates


def _cells(table: Path) -> Iterator[dict[str, Any]]:
    with table.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
