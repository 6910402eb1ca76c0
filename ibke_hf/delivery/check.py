"""Asks a model the questions of a file of facts, with an edit or without, and says which answers are wrong.

The answers are judged as everywhere: a continuation begins with an accepted answer, a chat's answer contains one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..core.edits import Edit
from ..evaluation.comparison import PageQuestion, is_right, read_answers, require_askable
from ..io import written_file
from .facts import CheckedFact

NOT_XML = re.compile(
    r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # what a model may say and XML not hold
WIDTH = 44  # of a column of the table
ANSWERED_AS_BEFORE = "as before the edit"


@dataclass(frozen=True)
class Outcome:
    """One question, asked.

    Attributes:
        fact: Name of its fact.
        question: What was asked, and its accepted answers.
        answer: What the model says, with the edit if there is one.
        before: What it says without.
        passed: Whether that is as it should be; None where nothing says what should be: a neighbour without an answer
            of a model without an edit.
    """

    fact: str
    question: PageQuestion
    answer: str
    before: str
    passed: bool | None

    @property
    def expected(self) -> str:
        """What should be answered, in words."""
        return " | ".join(self.question.answers) or ANSWERED_AS_BEFORE


def check_facts(model: Any, tokenizer: Any, facts: Sequence[CheckedFact], edit: Edit | None = None) -> list[Outcome]:
    """Ask every question of the facts, in the order of the file.

    Args:
        model: Any decoder of the transformers library.
        tokenizer: Its tokenizer.
        facts: See :func:`~ibke_hf.delivery.facts.read_checked_facts`.
        edit: Of any kind, attached for the answers that are judged. What must not change is what the model without it
            says; without an edit, stated answers of neighbours are held against what it says.

    Raises:
        RequestError: If a question is too long for the model.
    """
    asked = [(fact.name, question) for fact in facts for question in fact.questions]
    questions = [question for _, question in asked]
    require_askable(model, tokenizer, questions)
    before = read_answers(model, tokenizer, questions)
    after = before if edit is None else read_answers(model, tokenizer, questions, edit)
    outcomes = []
    for (name, question), old, new in zip(asked, before, after, strict=True):
        judged = replace(question, role="question") if edit is None else question
        passed = is_right(judged, old["answer"], new["answer"], chat=bool(new.get("chat")))
        outcomes.append(Outcome(name, question, new["answer"].strip(), old["answer"].strip(), passed))
    return outcomes


def to_edit(facts: Sequence[CheckedFact], outcomes: Sequence[Outcome]) -> list[CheckedFact]:
    """Return the facts that a model does not have: whose prompt, or a rephrasing of it, is answered otherwise."""
    failed = {(one.fact, one.question) for one in outcomes if one.passed is False}
    own = ("request", "rephrase")
    return [fact for fact in facts if any((fact.name, q) in failed for q in fact.questions if q.role in own)]


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes that are not as they should be."""
    return [one for one in outcomes if one.passed is False]


def report(outcomes: Sequence[Outcome]) -> str:
    """Return the failures as a table, and a line that counts."""
    from tabulate import tabulate

    failed, judged = failures(outcomes), [one for one in outcomes if one.passed is not None]
    rows = [
        (one.question.role, one.question.prompt, one.expected, " ".join(one.answer.split()) or "(nothing)")
        for one in failed
    ]
    table = tabulate(
        rows,
        ["", "asked", "expected", "answered"],
        tablefmt="plain",
        disable_numparse=True,
        maxcolwidths=[None, WIDTH, WIDTH, WIDTH],
    )
    wrong = len({one.fact for one in failed})
    count = (
        f"{len(judged) - len(failed)} of {len(judged)} answers are as they should be"
        f"{f', {wrong} of {len({one.fact for one in outcomes})} facts fail' if wrong else ''}"
    )
    return f"{table}\n\n{count}" if failed else count


def write_junit(outcomes: Sequence[Outcome], file: str | Path, suite: str) -> None:
    """Write JUnit's XML, as test services read it: a case for each question, its fact as the class.

    Args:
        outcomes: What was asked.
        file: Written whole or not at all.
        suite: Name of the suite.
    """
    failed, skipped = failures(outcomes), [one for one in outcomes if one.passed is None]
    counts = {"tests": len(outcomes), "failures": len(failed), "errors": 0, "skipped": len(skipped)}
    attributes = {name: str(number) for name, number in counts.items()}
    root = ElementTree.Element("testsuites", attributes)
    parent = ElementTree.SubElement(root, "testsuite", {"name": _xml(suite), **attributes})
    for one in outcomes:
        name = _xml(f"{one.question.role}: {one.question.prompt}")
        case = ElementTree.SubElement(parent, "testcase", {"classname": _xml(one.fact), "name": name})
        if one.passed is False:
            message = _xml(f"expected {one.expected}, answered {one.answer!r}")
            failure = ElementTree.SubElement(case, "failure", {"message": message})
            failure.text = _xml(f"before the edit: {one.before!r}") if one.before != one.answer else ""
        elif one.passed is None:
            ElementTree.SubElement(case, "skipped", {"message": "no answer is stated, and there is no edit"})
    with written_file(file) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    return NOT_XML.sub("�", text)
