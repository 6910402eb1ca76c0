"""A visitor's edits as a value.

Each fact is edited by itself into the untouched model, and a visitor carries these edits together. So their order does
not matter, an edit that is undone is gone without a trace, and what is left is what it was. No weight is ever touched;
a visitor without edits has the plain model, bit by bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.composition import RIDGE
from ..core.conflicts import Conflict, conflicts
from ..core.edits import LowRankEdit
from .forms import Fact


@dataclass(frozen=True)
class Step:
    """A fact as it was edited in.

    Attributes:
        fact: With its questions.
        edit: Of this fact alone and whole, on the CPU so that any process can take it over; routed where there is a
            router.
        seconds: That the edit took.
        factors: The scale factors of its tokens, if the editor has any.
    """

    fact: Fact
    edit: Any
    seconds: float
    factors: dict[str, Any] | None = None


@dataclass(frozen=True)
class Session:
    """What one visitor has done.

    Attributes:
        steps: The active edits.
        edit: All of them in one, of which each prompt carries those that it is about where there is a router; a single
            one acts on every prompt. None without any.
        folder: Where this visitor's downloads lie, empty before the first.
        rank: That each active edit is cut to, 0 for whole edits.
    """

    steps: tuple[Step, ...] = ()
    edit: Any = None
    folder: str = ""
    rank: int = 0

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, in the order in which they were edited."""
        return tuple(step.fact for step in self.steps)

    def carrying(self, steps: Iterable[Step], ridge: float | None = RIDGE) -> Session:
        """Return the session with other active edits, solved by this ridge; None: summed."""
        steps = tuple(steps)
        edits = [step.edit.truncate(self.rank) if self.rank else step.edit for step in steps]
        whole = _together(edits, ridge) if len(edits) > 1 else next(map(alone, edits), None)
        return replace(self, steps=steps, edit=whole)

    def conflicts(self) -> list[Conflict]:
        """Return which active edits are at odds, by their places."""
        return conflicts([step.edit for step in self.steps])


def alone(edit: Any) -> Any:
    """Return a single edit as one that acts on every prompt."""
    return edit.whole() if hasattr(edit, "whole") else edit


def _together(edits: Sequence[Any], ridge: float | None) -> Any:
    """Return several edits as one: solved where each knows the inputs that it was made for, else summed."""
    if ridge is not None and all(isinstance(edit, LowRankEdit) and edit.has_keys for edit in edits):
        return edits[0].compose(*edits[1:], how="solve", ridge=ridge)
    return edits[0].compose(*edits[1:])


def forget(session: Session) -> None:
    """Remove the files of a visitor who has left."""
    if session.folder:
        shutil.rmtree(session.folder, ignore_errors=True)
