"""The generality and locality cases of one edit of a world of facts, in UniEdit's schema (PROTOCOL, Criteria)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .chains import ANOTHER_NAME, SAME_ENTITY, Path, Step, extend, noun_phrase, path_prompt, steps_to, walkable
from .facts import Triple, World
from .zsre import ANSWER

if TYPE_CHECKING:
    from .build import RecordBuilder

LOCALITY_TYPE = {"head": "head of edit", "property": "property of edit", "tail": "tail of edit"}
Json = dict[str, Any]
QUESTION_FORMS = 12  # a multiple of the usual numbers of questions, so that each is drawn as often


class CaseMaker:
    """Makes the cases of one edit, each of another kind; None where the world has none of a kind."""

    def __init__(self, builder: RecordBuilder, edit: Triple, original: str | None, known: World) -> None:
        self.builder, self.edit, self.original, self.known = builder, edit, original, known
        self.rng, self.world = builder.rng, builder.world
        self.relation = self.world.relations[edit.relation]
        self.names = {edit.subject: "h_e", edit.object: "t_e"}
        self.cued = self._chance(builder.cue_rate)
        self.request_prompt = self._request_prompt()

    def _request_prompt(self) -> str:
        """Return the prompt of the edit itself: the first wording of its relation, or any of its questions."""
        if not self._chance(self.builder.question_rate):
            return self.relation.prompt(self.edit.subject)
        return self._cued(self.relation.question(self.edit.subject, self.rng.randrange(QUESTION_FORMS)))

    def _chance(self, rate: float) -> bool:
        """Draw whether something happens; nothing is drawn for a rate of 0, so that older records stay as they are."""
        return rate > 0 and self.rng.random() < rate

    def _cued(self, question: str) -> str:
        return question + ANSWER if self.cued else question

    # --- generality --------------------------------------------------------------------------------------------

    def generality_makers(self) -> dict[str, Callable[[], Json | None]]:
        """Return what makes a generality case of each kind that the edit may have."""
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

    def _rephrase(self) -> Json | None:
        case = self._single((Step(self.edit),), form=self.rng.randrange(1, len(self.relation.prompts)))
        return None if case["prompt"] == self.request_prompt else case

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
        """Return what makes a locality case of each kind; none in a world of one fact."""
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
        asked = prompt or self._prompt(path, alias, form)
        hops = [
            self._hop(step, alias if i == 0 else None, target if i == len(path) - 1 else None)
            for i, step in enumerate(path)
        ]
        return {
            "path_type": "single",
            "prompt": asked,
            "target": target or path[-1].end,
            "paths": [self._path_item(step) for step in path],
            "one_hops": hops,
        }

    def _prompt(self, path: Sequence[Step], alias: str | None, form: int) -> str:
        if path[-1].backwards or not self._chance(self.builder.question_rate):
            return path_prompt(self.world, path, alias, form)
        form = self.rng.randrange(QUESTION_FORMS)
        return self._cued(path_prompt(self.world, path, alias, form, question=True))

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
