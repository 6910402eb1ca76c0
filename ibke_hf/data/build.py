"""Triples and templates -> edit records in UniEdit's schema (`ibke data build`; PROTOCOL, Criteria).

Each record edits one triple: a *counterfactual* edit gives the subject another object of the same kind, an
*unknown* edit states a true triple. Its generality cases are drawn so that the criteria get equal shares as far as
the world allows; every other hop that a case passes through is a triple that the backbone is taken to know.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .chains import ANOTHER_NAME, SAME_ENTITY, Path, Step, extend, noun_phrase, path_prompt, steps_to, walkable
from .facts import Relation, Triple, World, stable_id, unique_ids

GENERALITY = ("rephrase", "two_hop", "three_hop", "reverse", "same_entity", "alias")
LOCALITY = ("none", "head", "property", "tail", "one_to_many", "multi_hop", "same_entity")
LOCALITY_TYPE = {"head": "head of edit", "property": "property of edit", "tail": "tail of edit"}
TRIES = 8

Json = dict[str, Any]


class RecordBuilder:
    """Builds records about one world.

    Args:
        known: The triples that the backbone is taken to know; supporting hops and locality cases use these alone.
        world: Every true triple, the withheld ones included, so that no counterfactual is true by accident.
        seed: Seeds every draw; the same world, seed and calls give the same records.
        generality: Generality cases a record, each of another criterion.
        locality: Locality cases a record, each of another kind.
        alias_rate: Share of chains that start from an alias of their first entity.
        shares: Share of a kind of `GENERALITY` or `LOCALITY` beside that of the others of its group, by
            ``"generality"`` or ``"locality"`` and kind; 1 where none is given.
        novel_rate: Share of counterfactual edits whose object is a name that nobody has: for training, where the names
            that a backbone does not know are few. The name joins the beginning of one object's with the end of
            another's.
        near_rate: Share of the ``"property"`` cases that are as near to the edit as can be: about a subject with the
            object that the edit takes away, where there is one, and in the very words of the edit. For training too.

    Raises:
        ValueError: If a share is of no kind that there is, or not above 0.
    """

    def __init__(
        self,
        known: World,
        world: World,
        *,
        seed: int | str,
        generality: int = 1,
        locality: int = 1,
        alias_rate: float = 0.15,
        shares: Mapping[str, Mapping[str, float]] | None = None,
        novel_rate: float = 0.0,
        near_rate: float = 0.0,
    ) -> None:
        self.known, self.world = known, world
        self.ids = unique_ids("Q", world.entities)
        self.rng = random.Random(seed)
        self.sizes = {"generality": generality, "locality": locality}
        self.alias_rate, self.novel_rate, self.near_rate = alias_rate, novel_rate, near_rate
        self.shares = shares or {}
        kinds = {"generality": GENERALITY, "locality": LOCALITY}
        for group, kind, share in ((group, *item) for group, given in self.shares.items() for item in given.items()):
            if kind not in kinds.get(group, ()) or not share > 0:
                raise ValueError(
                    f"shares: {group} {kind!r} is {share}; kinds are {kinds.get(group, tuple(kinds))}, shares above 0"
                )
        self.used: dict[str, dict[str, float]] = {"generality": defaultdict(float), "locality": defaultdict(float)}

    def counterfactual(self, triple: Triple) -> Json | None:
        """Return a record that moves `triple` to another object of its kind, or None where there is none."""
        relation = self.world.relations[triple.relation]
        target = self._other_object(triple, relation)
        return None if target is None else self._record(Triple(triple.subject, relation.id, target), triple.object)

    def unknown(self, triple: Triple) -> Json | None:
        """Return a record that states the true `triple`."""
        return self._record(triple, None)

    def _other_object(self, triple: Triple, relation: Relation) -> str | None:
        """Draw a false object of the right kind, preferring ones that edits can ripple on from."""
        truths = self.world.objects(triple.subject, relation.id) | {triple.subject}
        if self.novel_rate and self.rng.random() < self.novel_rate and (name := self._novel_name(relation)):
            return name
        answers = sorted({t.object for t in self.known.by_relation.get(relation.id, ())} - truths)
        if relation.inverse_single:  # a fresh object keeps the reverse question well defined
            fresh = sorted(set(self.known.by_kind.get(relation.object_kind, ())) - set(answers) - truths)
            if fresh and self.rng.random() < 0.5:
                answers = fresh
        rippling = [name for name in answers if name in self.known.by_subject]
        if rippling and self.rng.random() < 0.6:
            answers = rippling
        return self.rng.choice(answers) if answers else None

    def _novel_name(self, relation: Relation) -> str | None:
        """Make up a name like those of a relation's objects, or a number of as many digits; None if the world has it already."""
        names = self.known.by_kind.get(relation.object_kind, ("",))
        first, last = self.rng.choice(names), self.rng.choice(names)
        if first.isdecimal():
            name = first[0] + "".join(self.rng.choice("0123456789") for _ in first[1:])
        elif " " in first and " " in last:
            words, others = first.split(), last.split()
            name = " ".join((*words[: (len(words) + 1) // 2], *others[len(others) // 2 :]))
        else:
            name = (first[: (len(first) + 1) // 2] + last[len(last) // 2 :]).strip()
        return None if not name or name in self.ids else name

    def _record(self, edit: Triple, original: str | None) -> Json | None:
        without = self._known_apart_from(edit, original)
        case = _Cases(self, edit, original, without)
        generality = self._draw("generality", case.generality_makers())
        locality = self._draw("locality", case.locality_makers())
        if not generality or not locality:
            return None
        relation = self.world.relations[edit.relation]
        request = {"prompt": relation.prompt(edit.subject), "target": edit.object, "subject": edit.subject}
        return {
            "kind": "unknown" if original is None else "counterfactual",
            **({} if original is None else {"original": original}),
            "edit": {**request, **self.triple_json(edit)},
            "generality": {str(i): made for i, made in enumerate(generality)},
            "locality": {str(i): made for i, made in enumerate(locality)},
        }

    def _known_apart_from(self, edit: Triple, original: str | None) -> World:
        """Drop what the edit contradicts: the old object, the same fact told the other way round, the new object's old subject."""
        pairs = {edit.pair} | ({frozenset((edit.subject, original))} if original else set())
        relation = self.world.relations[edit.relation]

        def contradicted(t: Triple) -> bool:
            same_head = relation.single_value and t.subject == edit.subject
            same_tail = relation.inverse_single and t.object == edit.object
            return t.pair in pairs or (t.relation == edit.relation and (same_head or same_tail))

        known = self.known
        near = (
            *known.by_subject.get(edit.subject, ()),
            *known.by_object.get(edit.subject, ()),
            *known.by_object.get(edit.object, ()),
        )
        return known.without([t for t in near if contradicted(t)])

    def _draw(self, group: str, makers: dict[str, Callable[[], Json | None]]) -> list[Json]:
        """Make cases of the least used kinds first, so that the kinds get their shares, which are equal by default."""
        used = self.used[group]
        made: list[Json] = []
        for kind in sorted(makers, key=lambda name: (used[name], self.rng.random())):
            if len(made) == self.sizes[group]:
                break
            case = next((c for c in (makers[kind]() for _ in range(TRIES)) if c is not None), None)
            if case is not None:
                made.append(case)
                used[kind] += 1 / self.shares.get(group, {}).get(kind, 1)
        return made

    # --- JSON of the parts -------------------------------------------------------------------------------------

    def entity_json(self, name: str) -> Json:
        """Return an entity with its id and aliases."""
        aliases = list(self.world.aliases.get(name, ()))
        return {"id": self.ids.get(name) or stable_id("Q", name), "label": name, "description": "", "aliases": aliases}

    def triple_json(self, triple: Triple) -> Json:
        """Return the four keys that UniEdit mixes into edits and hops."""
        relation = self.world.relations[triple.relation]
        item = any(letter.isalpha() for letter in triple.object)
        tail = (
            {"datatype": "wikibase-item", "value": self.entity_json(triple.object)}
            if item
            else {"datatype": "string", "value": triple.object}
        )
        return {
            "head_entity": self.entity_json(triple.subject),
            "property": {
                "id": stable_id("P", relation.id),
                "label": relation.label,
                "description": relation.id,
                "aliases": [],
                "single_value": relation.single_value,
            },
            "tail_entity": {"order_in_property": 0, **tail},
            "single_inverse": relation.inverse_single,
        }


class _Cases:
    """The cases of one edit."""

    def __init__(self, builder: RecordBuilder, edit: Triple, original: str | None, known: World) -> None:
        self.builder, self.edit, self.original, self.known = builder, edit, original, known
        self.rng, self.world = builder.rng, builder.world
        self.relation = self.world.relations[edit.relation]
        self.names = {edit.subject: "h_e", edit.object: "t_e"}

    # --- generality --------------------------------------------------------------------------------------------

    def generality_makers(self) -> dict[str, Callable[[], Json | None]]:
        makers = {
            "rephrase": self._rephrase,
            "two_hop": lambda: self._chain(1),
            "three_hop": lambda: self._chain(2),
            "same_entity": self._same_entity,
            "alias": self._alias,
        }
        if self.relation.inverse_single and not self._has_another_subject():
            makers["reverse"] = self._reverse
        return makers

    def _has_another_subject(self) -> bool:
        triples = self.world.by_object.get(self.edit.object, ())
        return any(t.relation == self.relation.id and t.subject != self.edit.subject for t in triples)

    def _rephrase(self) -> Json:
        form = self.rng.randrange(1, len(self.relation.prompts))
        return self._single((Step(self.edit),), form=form)

    def _chain(self, more: int) -> Json | None:
        before = self.rng.randint(0, more) if self.relation.single_value else more
        path = extend(self.known, (Step(self.edit),), self.rng, before, more - before, avoid=self._avoid())
        return None if path is None else self._single(path, form=self._form(path), alias=self._some_alias(path))

    def _reverse(self) -> Json | None:
        path: Path = (Step(self.edit, backwards=True),)
        if self.rng.random() < 0.3:
            path = extend(self.known, path, self.rng, 0, 1, avoid=self._avoid()) or path
        return self._single(path, form=self._form(path))

    def _same_entity(self) -> Json | None:
        if not self.relation.single_value:
            return None
        others = [s for s in steps_to(self.known, self.edit.object) if s.start != self.edit.subject]
        if not others:
            return None
        return self._double((Step(self.edit),), (self.rng.choice(others),))

    def _alias(self) -> Json | None:
        subject, target = (self.world.aliases.get(name, ()) for name in (self.edit.subject, self.edit.object))
        path = (Step(self.edit),)
        if subject and (not target or self.rng.random() < 0.5):
            return self._single(path, form=self._form(path), alias=self.rng.choice(subject))
        if target and self.relation.single_value:
            prompt = ANOTHER_NAME.format(noun_phrase(self.world, path))
            return self._single(path, prompt=prompt, target=target[0])
        return None

    # --- locality ----------------------------------------------------------------------------------------------

    def locality_makers(self) -> dict[str, Callable[[], Json | None]]:
        edit, known = self.edit, self.known
        if not known.triples:  # of a world of one fact, nothing is left beside the edit
            return {}
        same_head = [t for t in known.by_subject.get(edit.subject, ()) if t.relation != edit.relation]
        tails = [*known.by_subject.get(edit.object, ()), *known.by_object.get(edit.object, ())]
        return {
            "none": lambda: self._located("none", known.triples, unrelated=True),
            "head": lambda: self._located("head", same_head),
            "property": lambda: self._nearby() or self._located("property", known.by_relation.get(edit.relation, ())),
            "tail": lambda: self._located("tail", tails),
            "one_to_many": self._one_to_many,
            "multi_hop": lambda: self._unrelated_chain(self.rng.choice((1, 1, 2))),
            "same_entity": self._unrelated_pair,
        }

    def _located(self, kind: str, triples: Sequence[Triple], unrelated: bool = False) -> Json | None:
        if not triples:
            return None
        triple = self.rng.choice(triples)
        related = {self.edit.subject, self.edit.object} & {triple.subject, triple.object}
        if unrelated and (related or triple.relation == self.edit.relation):
            return None
        if triple.subject == self.edit.subject and triple.relation == self.edit.relation:
            return None
        path = (Step(triple),)
        return self._local(self._single(path, form=self._form(path)), LOCALITY_TYPE.get(kind, "none"))

    def _nearby(self) -> Json | None:
        if not self.builder.near_rate or self.rng.random() >= self.builder.near_rate:
            return None
        others = [t for t in self.known.by_relation.get(self.relation.id, ()) if t.subject != self.edit.subject]
        nearest = [t for t in others if t.object == self.original] or others
        if not nearest:
            return None
        return self._local(self._single((Step(self.rng.choice(nearest)),)), LOCALITY_TYPE["property"])

    def _one_to_many(self) -> Json | None:
        if self.relation.single_value:
            return None
        others = self.known.objects(self.edit.subject, self.relation.id) - {self.edit.object}
        if not others:
            return None
        path = (Step(Triple(self.edit.subject, self.relation.id, self.rng.choice(sorted(others)))),)
        return self._local(self._single(path, form=self.rng.randrange(1, len(self.relation.prompts))), "head of edit")

    def _unrelated_chain(self, more: int) -> Json | None:
        path = extend(self.known, (Step(self.rng.choice(self.known.triples)),), self.rng, 0, more, avoid=self._avoid())
        if path is None or not self.world.relations[path[0].triple.relation].single_value or self._meets_edit(path):
            return None
        return self._local(self._single(path, form=self._form(path)), "none")

    def _unrelated_pair(self) -> Json | None:
        """Ask yes or no about other facts, half of them with the answer No.

        UniEdit has Yes alone; the other half is ours, so that an editor that turns every such answer into Yes is found
        out.
        """
        first = self.rng.choice(self.known.triples)
        if not self.world.relations[first.relation].single_value:
            return None
        same = self.rng.random() < 0.5
        others = (
            steps_to(self.known, first.object)
            if same
            else [Step(self.rng.choice(self.known.by_relation[first.relation]))]
        )
        others = [s for s in others if s.start != first.subject and (s.end == first.object) == same]
        if not others:
            return None
        second = self.rng.choice(others)
        if self._meets_edit((Step(first), second)):
            return None
        return self._local(self._double((Step(first),), (second,), "Yes" if same else "No"), "none")

    def _meets_edit(self, path: Sequence[Step]) -> bool:
        return any(
            s.triple.pair == self.edit.pair
            or (s.triple.subject == self.edit.subject and s.triple.relation == self.edit.relation)
            for s in path
        )

    def _local(self, case: Json | None, kind: str) -> Json | None:
        return None if case is None else {"loc_type": kind, **case}

    # --- JSON of a case ----------------------------------------------------------------------------------------

    def _avoid(self) -> tuple[str, ...]:
        return () if self.original is None else (self.original,)

    def _form(self, path: Sequence[Step]) -> int:
        return self.rng.randrange(len(self.world.relations[path[-1].triple.relation].prompts))

    def _some_alias(self, path: Sequence[Step]) -> str | None:
        aliases = self.world.aliases.get(path[0].start, ())
        return self.rng.choice(aliases) if aliases and self.rng.random() < self.builder.alias_rate else None

    def _single(
        self,
        path: Sequence[Step],
        *,
        form: int = 0,
        alias: str | None = None,
        prompt: str | None = None,
        target: str | None = None,
    ) -> Json:
        """Return a case that walks one path (UniEdit's `path_type` "single")."""
        question = prompt or path_prompt(self.world, path, alias, form)
        hops = [
            self._hop(step, alias if i == 0 else None, target if i == len(path) - 1 else None)
            for i, step in enumerate(path)
        ]
        return {
            "path_type": "single",
            "prompt": question,
            "target": target or path[-1].end,
            "paths": [self._path_item(step) for step in path],
            "one_hops": hops,
        }

    def _double(self, first: Sequence[Step], second: Sequence[Step], answer: str = "Yes") -> Json:
        """Return a yes/no case about the ends of two paths (UniEdit's `path_type` "double")."""
        halves = [first, second]
        self.rng.shuffle(halves)
        phrases = [noun_phrase(self.world, half) for half in halves]
        return {
            "path_type": "double",
            "prompt": SAME_ENTITY.format(*phrases),
            "target": answer,
            "single_path1": self._single(halves[0]),
            "single_path2": self._single(halves[1]),
        }

    def _nodes(self, triple: Triple) -> list[str]:
        for name in (triple.subject, triple.object):
            self.names.setdefault(name, f"e_{len(self.names)}")
        relation = "r_e" if triple == self.edit else f"r_{triple.relation}"
        return [self.names[triple.subject], relation, self.names[triple.object]]

    def _path_item(self, step: Step) -> list[str]:
        head, relation, tail = self._nodes(step.triple)
        single = walkable(self.world.relations[step.triple.relation], backwards=step.backwards)
        ends = [tail, relation, head, "b"] if step.backwards else [head, relation, tail, "f"]
        return [*ends, "s" if single else "m"]

    def _hop(self, step: Step, alias: str | None, target: str | None) -> Json:
        relation = self.world.relations[step.triple.relation]
        subject = alias if alias and not step.backwards else step.triple.subject
        hop = {
            "path": self._nodes(step.triple),
            "reverse_in_multi_hop": step.backwards,
            "prompt": relation.prompt(subject),
            "subject": subject,
            "target": target or step.triple.object,
            **self.builder.triple_json(step.triple),
        }
        if step.backwards:
            hop["reversed"] = {"prompt": relation.inverse_prompt(step.triple.object), "target": step.triple.subject}
        return hop
