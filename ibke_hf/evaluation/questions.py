"""What an evaluation asks: records in groups, as tokenised questions, without the locality cases that collide.

Everything is tokenised before anything runs, so that an unusable case ends an evaluation in its first minute.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..core.records import EditCase, EditRecord, EditRequest, Hop
from ..core.tokens import Span, encode

Role = Literal["reliability", "generality", "locality"]
Tokens = tuple[list[int], int]
COLLISION = "locality case that collides with an edit"


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
        dropped: One dict for each locality case that does.
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
    """Turns records into questions."""

    tokenizer: PreTrainedTokenizerBase
    span: Span
    max_length: int | None
    supporting_hops: bool

    def group(self, records: Sequence[EditRecord], edited: frozenset[Hashable]) -> Group:
        """Tokenise the questions of a group; drop the locality cases of which any hop is among the `edited` facts.

        Raises:
            RequestError: If a text is empty, too long, or has no target token; names record and case.
        """
        questions: list[RecordQuestion] = []
        dropped: list[dict[str, Any]] = []
        for record in records:
            questions += [
                self._question(record, "reliability", i, request) for i, request in enumerate(record.requests)
            ]
            questions += [self._question(record, "generality", i, case) for i, case in enumerate(record.generality)]
            for i, case in enumerate(record.locality):
                if any(hop.key() in edited for hop in case.facts):
                    dropped.append(
                        {
                            "record": record.id,
                            "dataset": record.dataset,
                            "domain": record.domain,
                            "role": "locality",
                            "list": case.name,
                            "case": i,
                            "prompt": case.prompt,
                            "reason": COLLISION,
                        }
                    )
                else:
                    questions.append(self._question(record, "locality", i, case))
        return Group(tuple(records), tuple(questions), tuple(dropped))

    def _question(self, record: EditRecord, role: Role, index: int, asked: EditRequest | EditCase) -> RecordQuestion:
        name = question_name(record, role, index)
        supporting = (
            asked.supporting if self.supporting_hops and role == "generality" and isinstance(asked, EditCase) else ()
        )
        hops = tuple(
            self._encode(hop.prompt, hop.target, f"{name}, supporting hop {i}") for i, hop in enumerate(supporting)
        )
        return RecordQuestion(record, role, index, asked, self._encode(asked.prompt, asked.target, name), hops)

    def _encode(self, prompt: str, target: str, name: str) -> Tokens:
        return encode(
            self.tokenizer, prompt or "", target or "", name=name, span=self.span, max_length=self.max_length
        )


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


def fill_lots(groups: Sequence[Group], requests: int) -> Iterator[list[Group]]:
    """Cut groups into lots of at most that many requests (at least one group each), to be edited and asked at once."""
    lot: list[Group] = []
    for group in groups:
        if lot and sum(len(g.requests) for g in lot) + len(group.requests) > requests:
            yield lot
            lot = []
        lot.append(group)
    if lot:
        yield lot
