"""Tables of triples and templates on disk -> a :class:`World`; every bad row is named by file and line.

A folder of facts holds four tab-separated tables, each with one header line (or one sub-folder per domain that
holds them): ``relations.tsv``, ``templates.tsv``, ``triples.tsv`` and ``entities.tsv`` (aliases; may be absent).
"""

from __future__ import annotations

import zlib
from collections import ChainMap, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

RELATION_COLUMNS = ("relation", "label", "subject_kind", "object_kind", "single_value", "inverse_single")
TEMPLATE_COLUMNS = ("relation", "form", "text")
TRIPLE_COLUMNS = ("subject", "relation", "object")
ENTITY_COLUMNS = ("entity", "aliases")
TABLES = ("relations.tsv", "templates.tsv", "triples.tsv")
FORMS = ("prompt", "question", "noun", "inverse", "inverse_noun")
MINIMUM_PROMPTS = 2


class FactsError(ValueError):
    """Bad rows in a folder of facts; the message lists each as ``file:line: what is wrong``."""


@dataclass(frozen=True)
class Relation:
    """A relation with its wordings; every wording has one ``{}``.

    `prompts` and `inverse` end right before the answer; `noun` and `inverse_noun` denote the object of a subject
    and the subject of an object, and chain hops into one question. `questions` end in a question mark.
    """

    id: str
    label: str
    domain: str
    subject_kind: str
    object_kind: str
    single_value: bool
    inverse_single: bool
    prompts: tuple[str, ...]
    noun: str
    inverse: str | None = None
    inverse_noun: str | None = None
    questions: tuple[str, ...] = ()

    def prompt(self, subject: str, form: int = 0) -> str:
        """Return wording number `form` (modulo the number of wordings) filled with `subject`, capitalised."""
        return _sentence(self.prompts[form % len(self.prompts)].format(subject))

    def question(self, subject: str, form: int = 0) -> str:
        """Return question number `form` filled with `subject`; one made of the noun wording where there is none."""
        questions = self.questions or (f"What is {self.noun}?",)
        return _sentence(questions[form % len(questions)].format(subject))

    def inverse_prompt(self, obj: str) -> str:
        """Return the inverse wording filled with `obj`; only for relations with `inverse_single`."""
        if self.inverse is None:
            raise ValueError(f"relation {self.id!r} has no inverse wording")
        return _sentence(self.inverse.format(obj))


@dataclass(frozen=True)
class Triple:
    """One fact (subject, relation, object), the entities by name."""

    subject: str
    relation: str
    object: str

    @property
    def pair(self) -> frozenset[str]:
        """The unordered pair of entities, which collisions and leaks are judged on."""
        return frozenset((self.subject, self.object))


@dataclass(frozen=True)
class World:
    """Relations, triples and aliases, with look-ups by subject, object and relation."""

    relations: dict[str, Relation]
    triples: Sequence[Triple]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the triples."""
        by_subject: dict[str, list[Triple]] = defaultdict(list)
        by_object: dict[str, list[Triple]] = defaultdict(list)
        by_relation: dict[str, list[Triple]] = defaultdict(list)
        by_kind: dict[str, dict[str, None]] = defaultdict(dict)
        for triple in self.triples:
            relation = self.relations[triple.relation]
            by_subject[triple.subject].append(triple)
            by_object[triple.object].append(triple)
            by_relation[triple.relation].append(triple)
            by_kind[relation.subject_kind][triple.subject] = None
            by_kind[relation.object_kind][triple.object] = None
        object.__setattr__(self, "by_subject", dict(by_subject))
        object.__setattr__(self, "by_object", dict(by_object))
        object.__setattr__(self, "by_relation", dict(by_relation))
        object.__setattr__(self, "by_kind", {kind: tuple(names) for kind, names in by_kind.items()})

    by_subject: Mapping[str, list[Triple]] = field(init=False, repr=False, compare=False)
    by_object: Mapping[str, list[Triple]] = field(init=False, repr=False, compare=False)
    by_relation: Mapping[str, list[Triple]] = field(init=False, repr=False, compare=False)
    by_kind: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    @property
    def entities(self) -> tuple[str, ...]:
        """Every entity named by a triple, sorted."""
        return tuple(sorted({name for t in self.triples for name in (t.subject, t.object)}))

    def objects(self, subject: str, relation: str) -> set[str]:
        """Return every object of (subject, relation)."""
        return {t.object for t in self.by_subject.get(subject, []) if t.relation == relation}

    def without(self, dropped: Collection[Triple]) -> World:
        """Return the same world without a few triples, in a time that does not grow with the world."""
        smaller, gone = copy(self), set(dropped)
        vars(smaller).pop("places", None)
        for index, key in (("by_subject", "subject"), ("by_object", "object"), ("by_relation", "relation")):
            lists: Mapping[str, list[Triple]] = getattr(self, index)
            changed = {
                name: [triple for triple in lists[name] if triple not in gone]
                for name in {getattr(triple, key) for triple in gone}
            }
            object.__setattr__(smaller, index, ChainMap(changed, lists))  # type: ignore[arg-type]  # nothing is written
        places = sorted(self.places[triple] for triple in gone)
        object.__setattr__(smaller, "triples", _Remaining(self.triples, places))
        return smaller

    @cached_property
    def places(self) -> dict[Triple, int]:
        """Where each triple stands among them all."""
        return {triple: place for place, triple in enumerate(self.triples)}

    def restricted_to(self, triples: Iterator[Triple] | tuple[Triple, ...] | list[Triple]) -> World:
        """Return the same world with these triples only."""
        return World(self.relations, tuple(triples), self.aliases)


class _Remaining(Sequence[Triple]):
    """The triples of a sequence but for those at a few places, which are sorted; nothing is copied."""

    def __init__(self, triples: Sequence[Triple], dropped: list[int]) -> None:
        self.triples, self.dropped = triples, dropped

    def __len__(self) -> int:
        return len(self.triples) - len(self.dropped)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]  # of an index from the end, and an IndexError past it
        for dropped in self.dropped:
            if dropped > place:
                break
            place += 1
        return self.triples[place]


def stable_id(prefix: str, name: str) -> str:
    """Return an id that depends on the name alone, such as ``Q2215478`` for an entity."""
    return f"{prefix}{zlib.crc32(name.encode('utf-8'))}"


def unique_ids(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Return the stable id of each name; of names that share one, the later takes the next free number."""
    taken: dict[int, str] = {}
    for name in sorted(set(names)):
        number = zlib.crc32(name.encode("utf-8"))
        while number in taken:
            number += 1
        taken[number] = name
    return {name: f"{prefix}{number}" for number, name in taken.items()}


def load_world(folder: str | Path) -> World:
    """Read a folder of facts, or a folder of such folders (one per domain).

    Raises:
        FactsError: With one line per bad row, ``file:line: what is wrong``.
        FileNotFoundError: If the folder holds no table of facts.
    """
    root = Path(folder)
    folders = [path for path in (root, *sorted(root.glob("*/"))) if any((path / name).exists() for name in TABLES)]
    if not folders:
        raise FileNotFoundError(
            f"{root}: no {', '.join(TABLES)} here or one folder below; see the README on building records"
        )
    reader = _Reader()
    for path in folders:
        reader.read_relations(path)
    for path in folders:
        reader.read_facts(path)
    return reader.world()


class _Reader:
    """Collects rows and complaints over the folders of one world."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.rows: dict[str, tuple[str, list[str], str]] = {}
        self.forms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.triples: dict[Triple, str] = {}
        self.objects: dict[tuple[str, str], str] = {}
        self.subjects: dict[tuple[str, str], str] = {}
        self.kinds: dict[str, str] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.alias_owner: dict[str, str] = {}
        self.alias_rows: list[tuple[str, str, tuple[str, ...]]] = []

    def read_relations(self, folder: Path) -> None:
        for where, row in self._table(folder / "relations.tsv", RELATION_COLUMNS):
            if row[0] in self.rows:
                self._problem(where, f"relation {row[0]!r} is defined twice")
            if not {row[4], row[5]} <= {"yes", "no"}:
                self._problem(where, f"single_value and inverse_single are yes or no, found {row[4]!r} and {row[5]!r}")
            self.rows[row[0]] = (folder.resolve().name, row, where)
        for where, (relation, form, text) in self._table(folder / "templates.tsv", TEMPLATE_COLUMNS):
            if form not in FORMS:
                self._problem(where, f"form is one of {', '.join(FORMS)}, found {form!r}")
            elif not text.count("{}") == text.count("{") == text.count("}") == 1:
                self._problem(where, f"a wording has exactly one {{}}, found {text!r}")
            elif relation not in self.rows:
                self._problem(where, f"relation {relation!r} is not in relations.tsv")
            elif text in self.forms[relation][form]:
                self._problem(where, f"the {form} wording {text!r} of {relation!r} is given twice")
            else:
                self.forms[relation][form].append(text)

    def read_facts(self, folder: Path) -> None:
        for where, (subject, relation, obj) in self._table(folder / "triples.tsv", TRIPLE_COLUMNS):
            self._add_triple(where, Triple(subject, relation, obj))
        entities = folder / "entities.tsv"
        for where, (entity, aliases) in self._table(entities, ENTITY_COLUMNS) if entities.exists() else ():
            names = tuple(name.strip() for name in aliases.split("|") if name.strip())
            for name in names:
                if self.alias_owner.setdefault(name, entity) != entity:
                    self._problem(where, f"alias {name!r} belongs to {self.alias_owner[name]!r} already")
            self.aliases[entity] = tuple(dict.fromkeys((*self.aliases.get(entity, ()), *names)))
            self.alias_rows.append((where, entity, names))

    def world(self) -> World:
        relations = {name: built for name in self.rows if (built := self._relation(name)) is not None}
        for where, entity, names in self.alias_rows:
            if entity not in self.kinds:
                self._problem(where, f"entity {entity!r} is in no triple")
            for name in names:
                if name in self.kinds:
                    self._problem(where, f"alias {name!r} of {entity!r} is an entity's own name; leave it out")
        if self.problems:
            raise FactsError("\n".join(self.problems))
        return World(relations, tuple(self.triples), self.aliases)

    def _relation(self, name: str) -> Relation | None:
        domain, row, where = self.rows[name]
        forms, inverse = self.forms[name], row[5] == "yes"
        expected = {"noun": 1, "inverse": int(inverse), "inverse_noun": int(inverse)}
        bad = [
            f"{number} {form} wording, found {len(forms[form])}"
            for form, number in expected.items()
            if len(forms[form]) != number
        ]
        if len(forms["prompt"]) < MINIMUM_PROMPTS:
            bad.append(f"at least {MINIMUM_PROMPTS} prompt wordings, found {len(forms['prompt'])}")
        for what in bad:
            self._problem(where, f"relation {name!r} needs {what}")
        if bad:
            return None
        return Relation(
            id=name,
            label=row[1],
            domain=domain,
            subject_kind=row[2],
            object_kind=row[3],
            single_value=row[4] == "yes",
            inverse_single=inverse,
            prompts=tuple(forms["prompt"]),
            noun=forms["noun"][0],
            inverse=forms["inverse"][0] if inverse else None,
            inverse_noun=forms["inverse_noun"][0] if inverse else None,
            questions=tuple(forms["question"]),
        )

    def _add_triple(self, where: str, triple: Triple) -> None:
        if triple.relation not in self.rows:
            self._problem(where, f"relation {triple.relation!r} is not in relations.tsv")
            return
        row = self.rows[triple.relation][1]
        if triple in self.triples:
            self._problem(where, f"the row stands at {self.triples[triple]} already")
        if (
            row[4] == "yes"
            and self.objects.setdefault((triple.subject, triple.relation), triple.object) != triple.object
        ):
            other = self.objects[triple.subject, triple.relation]
            self._problem(
                where, f"{triple.subject!r} has two objects of the single-valued {triple.relation!r}: {other!r}"
            )
        if (
            row[5] == "yes"
            and self.subjects.setdefault((triple.object, triple.relation), triple.subject) != triple.subject
        ):
            other = self.subjects[triple.object, triple.relation]
            self._problem(
                where, f"{triple.object!r} has two subjects of {triple.relation!r}, whose inverse is single: {other!r}"
            )
        for name, kind in ((triple.subject, row[2]), (triple.object, row[3])):
            if self.kinds.setdefault(name, kind) != kind:
                self._problem(where, f"{name!r} is a {kind!r} here and a {self.kinds[name]!r} elsewhere; rename one")
        self.triples.setdefault(triple, where)

    def _table(self, path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
        for number, line in self._lines(path, columns):
            row, where = line.split("\t"), f"{path}:{number}"
            if number == 1 and tuple(row) != columns:
                self._problem(where, f"the header is {', '.join(columns)} between tabs, found {line!r}")
            elif number > 1 and line.strip():
                if len(row) == len(columns) and all(cell and cell == cell.strip() for cell in row):
                    yield where, row
                else:
                    self._problem(
                        where, f"a row has {len(columns)} non-empty cells without outer spaces, found {line!r}"
                    )

    def _lines(self, path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """Yield numbered lines; only a line feed ends one, and a byte-order mark is no part of the first."""
        if not path.exists():
            self._problem(f"{path}:1", f"the file is missing; its columns are {', '.join(columns)}")
            return
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self._problem(
                f"{path}:{error.object[: error.start].count(10) + 1}", "not UTF-8 text; save the table as UTF-8"
            )
            return
        yield from enumerate(text.split("\n"), start=1)

    def _problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}")


def _sentence(text: str) -> str:
    """Capitalise the first letter, so that a prompt may begin with a noun phrase."""
    return text[:1].upper() + text[1:]
