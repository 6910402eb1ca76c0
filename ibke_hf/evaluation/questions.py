"""What an evaluation asks: records in groups, as tokenised questions, without the locality cases that collide.

Records are tokenised group by group as they are asked; only one lot of groups is held as questions at a time. What
cannot be asked is left out and named, or in a strict evaluation ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..core.records import EditCase, EditRecord, EditRequest, Hop
from ..core.tokens import RequestError, Span, encode

Role = Literal["reliability", "generality", "locality"]
Tokens = tuple[list[int], int]
COLLISION = "locality case that collides with an edit"
UNUSABLE = {"record": "record with an unusable request", "case": "unusable case"}


@dataclass(frozen=True)
class RecordQuestion:
    """One request or case of a record that the model is asked.

    Attributes:
        record: Where it comes from.
        role: What the answer counts for.
        index: Its position among the record's requests or cases of that role.
        asked: The request (reliability) or case.
        tokens: Ids of prompt + target, and the index of the first target token.
        hops: The same of each supporting hop that the model may need to be taught first.
    """

    record: EditRecord
    role: Role
    index: int
    asked: EditRequest | EditCase
    tokens: Tokens
    hops: tuple[Tokens, ...] = ()

    @property
    def name(self) -> str:
        """What errors call the question."""
        return question_name(self.record, self.role, self.index)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells the question apart from all others, as :func:`row_key` does of its row."""
        return self.record.dataset, self.record.id, self.role, self.index

    @property
    def target_ids(self) -> list[int]:
        """Ids of the target tokens."""
        ids, start = self.tokens
        return ids[start:]

    @property
    def top_k(self) -> int:
        """Number of predictions that a target token may be among to count as a hit."""
        return self.asked.top_k if isinstance(self.asked, EditCase) else 1

    @property
    def supporting(self) -> tuple[Hop, ...]:
        """The supporting hops, in order."""
        return self.asked.supporting if isinstance(self.asked, EditCase) else ()

    @property
    def names(self) -> tuple[str, ...]:
        """The target and its aliases, which generation may answer with."""
        return (self.asked.target, *(self.asked.aliases if isinstance(self.asked, EditCase) else ()))


@dataclass(frozen=True)
class Group:
    """Whole records whose requests are applied together, with all that is asked of the model that carries them.

    Attributes:
        records: In the order of the selection.
        questions: By record: requests, generality cases, locality cases that collide with no edit.
        dropped: One dict for each locality case that does, and for each case that cannot be asked.
    """

    records: tuple[EditRecord, ...]
    questions: tuple[RecordQuestion, ...]
    dropped: tuple[dict[str, Any], ...] = ()

    @property
    def requests(self) -> list[tuple[str, EditRequest]]:
        """The requests to be edited in, each with its name."""
        return [
            (question_name(r, "reliability", i), request) for r in self.records for i, request in enumerate(r.requests)
        ]


@dataclass(frozen=True)
class Reader:
    """Turns records into questions.

    Attributes:
        tokenizer: The backbone's.
        span: Where the target span starts, see :func:`ibke_hf.core.tokens.encode`.
        max_length: The backbone's context in tokens, if it is limited.
        supporting_hops: Tokenise the supporting hops of generality cases too.
        strict: Raise for a case that cannot be asked, instead of leaving it out.
        check: Called with whatever the editor may have to edit, and its name; raises RequestError if it cannot.
    """

    tokenizer: PreTrainedTokenizerBase
    span: Span
    max_length: int | None
    supporting_hops: bool
    strict: bool = False
    check: Callable[[EditRequest, str], Any] | None = None

    def usable(self, records: Sequence[EditRecord]) -> tuple[list[EditRecord], list[dict[str, Any]]]:
        """Part records into those whose requests can all be edited and asked, and a dict for each of the others.

        Raises:
            RequestError: If a record cannot, in a strict evaluation; or if none can.
        """
        kept: list[EditRecord] = []
        dropped: list[dict[str, Any]] = []
        for record in records:
            unusable = self._unusable(record)
            if unusable is None:
                kept.append(record)
            else:
                dropped.append(unusable)
        if dropped and not kept:
            raise RequestError(f"no record can be used; the first: {dropped[0]['detail']}")
        return kept, dropped

    def _unusable(self, record: EditRecord) -> dict[str, Any] | None:
        """Describe the first request that cannot be edited and asked; None if all can."""
        index = 0
        try:
            for index, request in enumerate(record.requests):
                self._question(record, "reliability", index, request)
        except RequestError as error:
            if self.strict:
                raise
            return _left_out(record, "reliability", index, record.requests[index], UNUSABLE["record"], error)
        return None

    def group(self, records: Sequence[EditRecord], edited: frozenset[Hashable]) -> Group:
        """Tokenise the questions of a group; drop the locality cases of which any hop is among the `edited` facts.

        Raises:
            RequestError: If a text is empty, too long, or has no target token, in a strict evaluation; names record
                and case.
        """
        questions: list[RecordQuestion] = []
        dropped: list[dict[str, Any]] = []
        for record in records:
            questions += [
                self._question(record, "reliability", i, request) for i, request in enumerate(record.requests)
            ]
            lists: dict[Role, tuple[EditCase, ...]] = {"generality": record.generality, "locality": record.locality}
            for role, cases in lists.items():
                for i, case in enumerate(cases):
                    if role == "locality" and any(hop.key() in edited for hop in case.facts):
                        dropped.append(_left_out(record, role, i, case, COLLISION))
                        continue
                    self._ask_or_drop(record, role, i, case, questions, dropped)
        return Group(tuple(records), tuple(questions), tuple(dropped))

    def _ask_or_drop(
        self,
        record: EditRecord,
        role: Role,
        index: int,
        case: EditCase,
        questions: list[RecordQuestion],
        dropped: list[dict[str, Any]],
    ) -> None:
        try:
            questions.append(self._question(record, role, index, case))
        except RequestError as error:
            if self.strict:
                raise
            dropped.append(_left_out(record, role, index, case, UNUSABLE["case"], error))

    def _question(self, record: EditRecord, role: Role, index: int, asked: EditRequest | EditCase) -> RecordQuestion:
        name = question_name(record, role, index)
        if isinstance(asked, EditRequest) and self.check is not None:
            self.check(asked, name)
        supporting = (
            asked.supporting if self.supporting_hops and role == "generality" and isinstance(asked, EditCase) else ()
        )
        hops = tuple(self._hop(hop, f"{name}, supporting hop {i}") for i, hop in enumerate(supporting))
        return RecordQuestion(record, role, index, asked, self._encode(asked, name), hops)

    def _hop(self, hop: Hop, name: str) -> Tokens:
        if self.check is not None:
            self.check(hop.request(), name)
        return self._encode(hop, name)

    def _encode(self, asked: EditRequest | EditCase | Hop, name: str) -> Tokens:
        return encode(
            self.tokenizer,
            asked.prompt or "",
            asked.target or "",
            name=name,
            span=self.span,
            max_length=self.max_length,
            prompt_format=asked.format,
        )


def _left_out(
    record: EditRecord,
    role: Role,
    index: int,
    asked: EditRequest | EditCase,
    reason: str,
    error: RequestError | None = None,
) -> dict[str, Any]:
    """Describe a request or case that is not asked."""
    return {
        "record": record.id,
        "dataset": record.dataset,
        "domain": record.domain,
        "role": role,
        "list": asked.name if isinstance(asked, EditCase) else "requests",
        "case": index,
        "prompt": asked.prompt,
        "reason": reason,
        **({} if error is None else {"detail": str(error)}),
    }


def question_name(record: EditRecord, role: Role, index: int) -> str:
    """Name a request or case in errors."""
    return (
        f"record {record.id!r} of {record.dataset or 'no dataset'}, "
        f"{'request' if role == 'reliability' else f'{role} case'} {index}"
    )


def fact_keys(records: Iterable[EditRecord]) -> frozenset[Hashable]:
    """Return the keys of everything that the records edit."""
    return frozenset(edit.key() for record in records for edit in record.edits)


def fill_groups(records: Sequence[EditRecord], requests: int) -> Iterator[list[EditRecord]]:
    """Fill groups with whole records until each has at least that many requests; the last one may have fewer."""
    group: list[EditRecord] = []
    for record in records:
        group.append(record)
        if number_of_requests(group) >= requests:
            yield group
            group = []
    if group:
        yield group


def number_of_requests(records: Iterable[EditRecord]) -> int:
    """Return the number of requests of some records."""
    return sum(len(record.requests) for record in records)


def fill_lots(groups: Iterable[list[EditRecord]], requests: int) -> Iterator[list[list[EditRecord]]]:
    """Cut groups into lots of at most that many requests (at least one group each), to be edited and asked at once."""
    lot: list[list[EditRecord]] = []
    for group in groups:
        if lot and sum(map(number_of_requests, lot)) + number_of_requests(group) > requests:
            yield lot
            lot = []
        lot.append(group)
    if lot:
        yield lot
