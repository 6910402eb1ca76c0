"""How the records of a benchmark are put to a model in a chat: as its user would ask, and in one place.

ZSRE's readers put marks into prompts that help a plain continuation: " The answer is: " behind a question, "nq
question: " before one. Nobody types these, so in a chat they are left out: of what is edited, of what is asked with
the target fed, and of what is asked freely alike. In plain text they stay, as the benchmarks' evaluators have them.
The Yes/No questions of UniEdit keep what says how they are to be answered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.records import EditCase, EditRecord
from .zsre import ANSWER

NATURAL_QUESTION = "nq question: "  # before the locality questions of ZSRE


def as_asked(record: EditRecord, **changes: Any) -> EditRecord:
    """Return a record in another format, with its prompts as a user would put them if that is a chat.

    Args:
        record: As its reader yields it.
        changes: Fields of :class:`~ibke_hf.core.records.PromptFormat`, see :meth:`EditRecord.formatted`.
    """
    changed = record.formatted(**changes)

    def asked(one: Any) -> Any:
        return replace(one, prompt=bare_question(one.prompt)) if one.format.chat else one

    def case(one: EditCase) -> EditCase:
        return replace(asked(one), supporting=tuple(map(asked, one.supporting)))

    return replace(
        changed,
        requests=tuple(map(asked, changed.requests)),
        generality=tuple(map(case, changed.generality)),
        locality=tuple(map(case, changed.locality)),
    )


def bare_question(prompt: str) -> str:
    """Return a prompt without the marks that benchmarks put around a question for a plain continuation."""
    return prompt.removeprefix(NATURAL_QUESTION).removesuffix(ANSWER)
