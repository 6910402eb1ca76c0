"""Triples and templates -> edit records in UniEdit's schema (`ibke data build`; PROTOCOL, Criteria).

Each record edits one triple: a *counterfactual* edit gives the subject another object of the same kind, an
*unknown* edit states a true triple. Its generality cases are drawn so that the criteria get equal shares as far as
the world allows; every other hop that a case passes through is a triple that the backbone is taken to know.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping

from .case_maker import CaseMaker, Json
from .facts import Relation, Triple, World, stable_id, unique_ids

GENERALITY = ("rephrase", "two_hop", "three_hop", "reverse", "same_entity", "alias")
LOCALITY = ("none", "head", "property", "tail", "one_to_many", "multi_hop", "same_entity")
CASE_KINDS = {"generality": GENERALITY, "locality": LOCALITY}
TRIES = 8


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
        question_rate: Share of the prompts, of requests and cases alike, that are asked as questions.
        cue_rate: Share of the records whose questions all end in :data:`~ibke_hf.data.zsre.ANSWER`, as ZSRE's do.

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
        question_rate: float = 0.0,
        cue_rate: float = 0.0,
    ) -> None:
        self.known, self.world = known, world
        self.ids = unique_ids("Q", world.entities)
        self.rng = random.Random(seed)
        self.sizes = {"generality": generality, "locality": locality}
        self.alias_rate, self.novel_rate, self.near_rate = alias_rate, novel_rate, near_rate
        self.question_rate, self.cue_rate = question_rate, cue_rate
        self.shares = shares or {}
        for group, kind, share in (
            (group, *item) for group, group_shares in self.shares.items() for item in group_shares.items()
        ):
            if kind not in CASE_KINDS.get(group, ()) or not share > 0:
                kinds = CASE_KINDS.get(group, tuple(CASE_KINDS))
                raise ValueError(f"shares: {group} {kind!r} is {share}; kinds are {kinds}, shares above 0")
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
        """Make up a name like a relation's objects, or a number of as many digits; None if the world has it."""
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
        case = CaseMaker(self, edit, original, without)
        generality = self._draw("generality", case.generality_makers())
        locality = self._draw("locality", case.locality_makers())
        if not generality or not locality:
            return None
        request = {"prompt": case.request_prompt, "target": edit.object, "subject": edit.subject}
        return {
            "kind": "unknown" if original is None else "counterfactual",
            **({} if original is None else {"original": original}),
            "edit": {**request, **self.triple_json(edit)},
            "generality": {str(i): case for i, case in enumerate(generality)},
            "locality": {str(i): case for i, case in enumerate(locality)},
        }

    def _known_apart_from(self, edit: Triple, original: str | None) -> World:
        """Drop what the edit contradicts: the old object, the inverse fact, the new object's old subject."""
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
        cases: list[Json] = []
        for kind in sorted(makers, key=lambda name: (used[name], self.rng.random())):
            if len(cases) == self.sizes[group]:
                break
            case = next((c for c in (makers[kind]() for _ in range(TRIES)) if c is not None), None)
            if case is not None:
                cases.append(case)
                used[kind] += 1 / self.shares.get(group, {}).get(kind, 1)
        return cases

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
