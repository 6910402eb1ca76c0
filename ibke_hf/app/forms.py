"""A fact and its questions: as they are typed, and as they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.records import EditRecord, EditRequest
from ..evaluation.comparison import PageQuestion, lines_of, questions_of, typed_lines, without_answers


@dataclass(frozen=True)
class Fact:
    """A request with the questions that judge it."""

    request: EditRequest
    questions: tuple[PageQuestion, ...] = ()


@dataclass(frozen=True)
class Form:
    """A fact and its questions as typed, one a line: see :func:`~ibke_hf.evaluation.comparison.questions_of`."""

    prompt: str
    target: str
    rephrasings: str = ""
    consequences: str = ""
    neighbours: str = ""

    @classmethod
    def of_record(cls, record: EditRecord) -> Form:
        """Type in the first request of a record, and its cases."""
        request = record.requests[0]
        return cls(request.prompt, request.target, *lines_of(record))

    @classmethod
    def of_fact(cls, fact: Fact) -> Form:
        """Type in a fact again, without what the page asks by itself."""
        return cls(fact.request.prompt, fact.request.target, *typed_lines(fact.request, fact.questions))

    def fact(self) -> Fact:
        """Read what was typed.

        Raises:
            RequestError: If a question cannot be read.
        """
        request = EditRequest(self.prompt.strip(), self.target.strip())
        return Fact(request, questions_of(request, self.rephrasings, self.consequences, self.neighbours))

    @property
    def asked(self) -> tuple[str, ...]:
        """The questions without their answers."""
        return tuple(map(without_answers, (self.rephrasings, self.consequences, self.neighbours)))

    def fitted(self, examples: Sequence[Form]) -> Form:
        """Drop what belongs to an example that this fact no longer is: its questions, or only their answers.

        The answers alone are dropped where the fact is the example's with another target.
        """
        example = next((one for one in examples if any(one.asked) and one.asked == self.asked), None)
        if example is None or (example.prompt, example.target) == (self.prompt, self.target):
            return self
        if example.prompt != self.prompt:
            return Form(self.prompt, self.target)
        return replace(self, rephrasings=self.asked[0], consequences=self.asked[1])
