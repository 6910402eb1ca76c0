"""Runs questions through a model, edited or not, and turns the predictions at their target positions into rows.

Rows of a batch may carry different edits; batches are sorted by length and left-padded, which changes no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.capture import target_logits
from ..core.edit_values import Edit
from ..core.records import EditCase
from ..core.tokens import IGNORED, context_length, encode, pad_and_label
from . import scores
from .generation import FREE_TOKENS, MORE_TOKENS, answer_text, generate_ids
from .questions import RecordQuestion, Tokens
from .wording import contains_answer, exact_match, normalised

LOGIT_BYTES = 256 << 20  # unedited logits of locality cases that are kept for a lot; the others are asked again
EDIT_BYTES = 4 << 30  # edits that are made, held or copied to the rows of a batch at once
KNOWN_WITHIN = 5  # a supporting hop is known if every target token is within the top 5
LocalityMatch = Literal["ids", "string"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """An edit and who carries it: `rows` maps members (groups or questions, by index) to rows of the edit."""

    edit: Edit | None
    rows: Mapping[int, int]

    def only(self, members: Sequence[int]) -> Carried:
        """Return the same edit for some of the members."""
        return Carried(self.edit, {member: self.rows[member] for member in members})

    def spread(self, owners: Mapping[int, int]) -> Carried:
        """Return the same edit with new members, each of which carries what its owner does."""
        return Carried(self.edit, {member: self.rows[owner] for member, owner in owners.items()})

    def of(self, members: Sequence[int]) -> Any:
        """Return the independent edits of some of the members, one row each."""
        edit: Any = self.edit
        return None if edit is None else edit.select(torch.tensor([self.rows[member] for member in members]))

    def rows_at_once(self, batch_size: int) -> int:
        """Return how many rows a batch may have: each takes a copy of its edit, for which `EDIT_BYTES` are there."""
        if self.edit is None or len(self.edit) == 1:
            return batch_size
        return max(1, min(batch_size, EDIT_BYTES * len(self.edit) // max(self.edit.nbytes, 1)))

    def attached(self, model: Any, members: Sequence[int]) -> AbstractContextManager[Any]:
        """Edit the model for a batch of which each row belongs to one of the members."""
        if self.edit is None:
            return nullcontext(model)
        if len(self.edit) == 1:
            return self.edit.attached(model)
        return self.edit.attached(model, rows=torch.tensor([self.rows[member] for member in members]))


@dataclass(frozen=True)
class Prediction:
    """What the unedited model predicts at the target positions of a question.

    Attributes:
        ids: (p,) argmax, on the CPU.
        logits: (p, vocabulary) on the CPU in the model's precision; of locality questions only, as many as
            `LOGIT_BYTES` have room for.
        answer: Of locality questions, what it answers freely; None if it is not to.
    """

    ids: Tensor
    logits: Tensor | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model writes by itself.

    Attributes:
        short: As far as an exact match is told, the target's length and a little more; None if that is not asked for.
        free: Until it stops by itself, see :data:`~.generation.FREE_TOKENS`; None if that is not asked for.
    """

    short: str | None = None
    free: str | None = None


@dataclass(frozen=True)
class Judge:
    """Asks a model questions in batches of `batch_size` rows.

    Attributes:
        model: The backbone.
        tokenizer: Its tokenizer.
        batch_size: Rows of a forward pass.
        locality_match: How predictions are compared, see :class:`~.protocol.Procedure`.
        generate: Generate answers for exact match.
        free: Let the model answer every question freely as well.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    locality_match: LocalityMatch = "ids"
    generate: bool = True
    free: bool = False

    def predictions(self, questions: Sequence[RecordQuestion]) -> list[Prediction]:
        """Record what the unedited model predicts."""
        predictions: dict[int, Prediction] = {}
        room = LOGIT_BYTES
        unedited = Carried(None, dict.fromkeys(range(len(questions)), 0))
        local = [i for i, question in enumerate(questions) if question.role == "locality"]
        answers = self._answers(questions, unedited.only(local)) if self.free else {}
        for members, logits, parts in self._batches({i: q.tokens for i, q in enumerate(questions)}, unedited):
            ids = logits.float().argmax(-1).cpu()
            for member, part in zip(members, parts, strict=True):
                keep = questions[member].role == "locality" and logits[part].nbytes <= room
                room -= logits[part].nbytes if keep else 0
                # a copy: a view would keep the logits of the whole batch alive
                kept = logits[part].clone().cpu() if keep else None
                predictions[member] = Prediction(ids[part], kept, answers.get(member, Answer()).free)
        return [predictions[i] for i in range(len(questions))]

    def unknown(self, hops: Mapping[int, Tokens], carried: Carried) -> list[int]:
        """Return the members whose hop has ANY target token outside the top 5 of the model that they carry."""
        missing = []
        for members, logits, parts in self._batches(hops, carried):
            targets = torch.tensor(
                [token for member in members for token in _target_ids(hops[member])], device=logits.device
            )
            outside = (scores.token_ranks(logits, targets) >= KNOWN_WITHIN).cpu()
            missing += [member for member, part in zip(members, parts, strict=True) if bool(outside[part].any())]
        return sorted(missing)

    def rows(
        self,
        questions: Sequence[RecordQuestion],
        before: Sequence[Prediction],
        carried: Carried,
        edited_hops: Mapping[int, int],
    ) -> dict[int, Row]:
        """Ask the questions that are members of `carried`, each under its own edit, and return their rows by index.

        Args:
            questions: Every question of the lot.
            before: The unedited prediction for each of them.
            carried: The members' edits.
            edited_hops: Number of supporting hops that were edited in for a question, where there are any.
        """
        put = self._put(questions, carried)
        answers = self._answers(put, carried)
        rows: dict[int, Row] = {}
        for members, logits, parts in self._batches({i: put[i].tokens for i in carried.rows}, carried):
            expected = torch.cat([_expected(questions[i], before[i]) for i in members])
            ranks = scores.token_ranks(logits, expected.to(logits.device)).cpu()
            top = logits.float().argmax(-1).cpu()
            unedited = self._unedited_logits(questions, before, members)
            similarities = _similarities(logits, parts, unedited)
            for i, part, similarity in zip(members, parts, similarities, strict=True):
                question = questions[i]
                hits, first = ranks[part] < question.top_k, ranks[part] < 1
                if question.role == "locality" and self.locality_match == "string":
                    hits, first = self._equal_strings(logits[part], expected[part], question.top_k)
                rows[i] = {
                    **described(question),
                    **scores.case_scores(hits, first),
                    **answer_scores(question, answers.get(i, Answer()), before[i].answer),
                    "before": self._text(before[i].ids),
                    "after": self._text(top[part]),
                    "js_similarity": similarity,
                    "edited_hops": edited_hops.get(i, 0),
                }
        return rows

    def _put(self, questions: Sequence[RecordQuestion], carried: Carried) -> Sequence[RecordQuestion]:
        """Return the questions as they are put where an edit stands in front of the prompt, else as they are."""
        edit: Any = carried.edit
        if not hasattr(edit, "in_front"):
            return questions
        members = list(carried.rows)
        texts = edit.in_front(
            self.model,
            self.tokenizer,
            [(questions[i].asked.prompt, questions[i].asked.format) for i in members],
            [carried.rows[i] for i in members],
            [questions[i].record.requests for i in members],
        )
        put, limit = list(questions), context_length(self.model)
        for i, text in zip(members, texts, strict=True):
            asked = replace(questions[i].asked, prompt=text)
            how: Any = {"name": questions[i].name, "max_length": limit, "prompt_format": asked.format}
            put[i] = replace(questions[i], asked=asked, tokens=encode(self.tokenizer, text, asked.target, **how))
        return put

    def _unedited_logits(
        self, questions: Sequence[RecordQuestion], before: Sequence[Prediction], members: Sequence[int]
    ) -> list[Tensor | None]:
        """Return the unedited logits of a batch's locality questions; those that were not kept are asked again."""
        unedited = {i: before[i].logits for i in members}
        asked = {i: questions[i].tokens for i in members if questions[i].role == "locality" and unedited[i] is None}
        if asked:
            plain = Carried(None, dict.fromkeys(asked, 0))
            for again, logits, parts in self._batches(asked, plain):
                unedited |= {i: logits[part] for i, part in zip(again, parts, strict=True)}
        return [unedited[i] for i in members]

    def _batches(
        self, tokens: Mapping[int, Tokens], carried: Carried
    ) -> Iterator[tuple[list[int], Tensor, list[slice]]]:
        """Yield members, the logits (p, vocabulary) of all their target positions, and which of the p are whose."""
        order = sorted(tokens, key=lambda member: len(tokens[member][0]))
        size = carried.rows_at_once(self.batch_size)
        for start in range(0, len(order), size):
            members = order[start : start + size]
            with torch.no_grad(), carried.attached(self.model, members):
                logits, labels = target_logits(self.model, pad_and_label([tokens[member] for member in members]))
            ends = list(accumulate(len(_target_ids(tokens[member])) for member in members))
            yield members, logits[labels != IGNORED], [slice(*part) for part in zip([0, *ends], ends, strict=False)]

    def _answers(self, questions: Sequence[RecordQuestion], carried: Carried) -> dict[int, Answer]:
        """Generate greedy answers: free ones to all members, short ones to requests and generality cases.

        A short answer is the beginning of the free one, so that nothing is generated twice.
        """
        short = {
            i: len(questions[i].target_ids) + MORE_TOKENS
            for i in carried.rows
            if self.generate and questions[i].role != "locality"
        }
        free = dict.fromkeys(carried.rows if self.free else (), FREE_TOKENS)
        asked = {i: (questions[i].asked.prompt, max(short.get(i, 0), free.get(i, 0))) for i in {**short, **free}}
        formats = {i: questions[i].asked.format for i in asked}
        size = carried.rows_at_once(self.batch_size)
        ids = generate_ids(self.model, self.tokenizer, asked, size, carried.attached, formats)
        return {i: Answer(self._beginning(ids[i], short.get(i)), self._beginning(ids[i], free.get(i))) for i in asked}

    def _beginning(self, ids: Sequence[int], tokens: int | None) -> str | None:
        return None if tokens is None else answer_text(self.tokenizer, ids[:tokens])

    def _equal_strings(self, logits: Tensor, expected: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Hits within the top k and the top 1 where equal decoded tokens count as equal, as UniEdit compares them."""
        best = [self._tokens(row) for row in scores.top_ids(logits, top_k).tolist()]
        targets = self._tokens(expected.tolist())
        hits = [text in texts for text, texts in zip(targets, best, strict=True)]
        return torch.tensor(hits), torch.tensor([text == texts[0] for text, texts in zip(targets, best, strict=True)])

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(self.tokenizer.decode([i])) for i in ids]

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist()))


def described(question: RecordQuestion) -> Row:
    """Return what a row says of its question."""
    record, asked = question.record, question.asked
    case = asked if isinstance(asked, EditCase) else EditCase(asked.prompt, asked.target, name="requests")
    return {
        "record": record.id,
        "domain": record.domain,
        "dataset": record.dataset,
        "kind": record.kind,
        "role": question.role,
        "list": case.name or question.role,
        "case": question.index,
        "criteria": list(case.criteria),
        "hops": case.hops,
        "prompt": case.prompt,
        "target": case.target,
    }


def answer_scores(question: RecordQuestion, answer: Answer, before: str | None) -> Row:
    """Return what a row says of the answers that were generated, and whether they are right.

    Args:
        question: What was asked.
        answer: What the edited model writes.
        before: The unedited model's free answer, which a locality case keeps.
    """
    answered: bool | None = None
    if answer.free is not None and question.role == "locality":
        answered = normalised(answer.free) == normalised(before or "")
    elif answer.free is not None:
        answered = contains_answer(answer.free, question.names)
    return {
        "exact_match": None if answer.short is None else exact_match(answer.short, question.names),
        "answered": answered,
        "generated": answer.short,
        "answer_before": before,
        "answer": answer.free,
    }


def _target_ids(tokens: Tokens) -> list[int]:
    return tokens[0][tokens[1] :]


def _expected(question: RecordQuestion, before: Prediction) -> Tensor:
    """Ids that a question is to be answered with: the target's, or for locality what the unedited model predicts."""
    return before.ids if question.role == "locality" else torch.tensor(question.target_ids)


def _similarities(logits: Tensor, parts: Sequence[slice], before: Sequence[Tensor | None]) -> list[float | None]:
    """Mean JS similarity over the target positions of each question whose unedited logits were kept."""
    kept = [(part, other) for part, other in zip(parts, before, strict=True) if other is not None]
    if not kept:
        return [None] * len(parts)
    edited = torch.cat([logits[part] for part, _ in kept])
    similar = scores.js_similarity(edited, torch.cat([other.to(edited.device) for _, other in kept])).cpu()
    means = iter([float(part.mean()) for part in similar.split([len(other) for _, other in kept])])
    return [None if other is None else next(means) for other in before]
