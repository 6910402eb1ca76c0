"""Edits requests and supporting hops into a model, for many groups or questions at once where the editor can."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..core.capture import NonFiniteError
from ..core.edit_values import Edit
from ..core.records import EditRequest
from ..core.tokens import RequestError
from . import judging
from .judging import Carried, Judge
from .questions import Group, RecordQuestion, question_name

CARRIED_BYTES = 1 << 30  # edits that are copied at once to take one more request each
EDITS_ALONE, ENOUGH_SECONDS = 5, 10.0  # edits that are timed for the time of one alone, and when that is enough
WORKING_COPIES = 4  # of an edit while it is made: itself, its gradient and the two moments of Adam
GroupMode = Literal["sequential", "joint"]
Named = tuple[str, EditRequest]


class Editing:
    """An editor at work on one model; None edits nothing.

    Attributes:
        seconds: Time spent so far on the groups' own requests; supporting hops are not counted.
        requests: Number of those requests.
    """

    def __init__(
        self, editor: Any, model: Any, tokenizer: PreTrainedTokenizerBase, mode: GroupMode, batch_size: int
    ) -> None:
        self.editor, self.model, self.tokenizer, self.mode, self.batch_size = (
            editor,
            model,
            tokenizer,
            mode,
            batch_size,
        )
        self.at_once = bool(getattr(editor, "supports_independent", True))
        self.seconds, self.requests = 0.0, 0
        self._edit_bytes: int | None = None  # of one request

    def edit_groups(self, groups: Sequence[Group]) -> Iterator[Carried]:
        """Apply the requests of each group one after another, each on the model edited so far (or jointly).

        If the editor makes independent edits, request k of many groups is one batch of them, as many as `EDIT_BYTES`
        have room for; else one group's edit is made. They are yielded and forgotten before the next are made.

        Yields:
            Edits whose members are the groups, by index.
        """
        longest = max(len(group.requests) for group in groups)
        if self.editor is None:
            yield Carried(None, dict.fromkeys(range(len(groups)), 0))
        elif self.at_once and (self.mode == "sequential" or longest == 1):
            size = self._groups_at_once(groups)
            for start in range(0, len(groups), size):
                yield from self._edit_together(groups, range(start, min(start + size, len(groups))))
        else:
            for i, group in enumerate(groups):
                with self._timed([group]):
                    edit = self._edit(group.requests, self.mode, None)
                yield Carried(edit, {i: 0})

    def _edit_together(self, groups: Sequence[Group], members: Sequence[int]) -> list[Carried]:
        """Make the independent edits of some of the groups, request by request."""
        with self._timed([groups[i] for i in members]):
            carried = [Carried(None, dict.fromkeys(members, 0))]
            for k in range(max(len(groups[i].requests) for i in members)):
                requests = {i: groups[i].requests[k] for i in members if k < len(groups[i].requests)}
                carried = [part for whole in carried for part in self.add(whole, requests)]
        return carried

    def _groups_at_once(self, groups: Sequence[Group]) -> int:
        """Number of groups whose edits are made and held at once: by the size of one edit, made to be weighed.

        Nothing is weighed where even edits as large as the model would fit.
        """
        if self._edit_bytes is None and len(groups) > 1:
            largest = sum(parameter.nbytes for parameter in self.model.parameters())
            if largest * WORKING_COPIES * len(groups) <= judging.EDIT_BYTES:
                return len(groups)
            self._edit_bytes = self._edit(groups[0].requests[:1], "sequential", None).nbytes
        return max(1, judging.EDIT_BYTES // max(WORKING_COPIES * (self._edit_bytes or 0), 1))

    def add(self, carried: Carried, requests: Mapping[int, Named]) -> Iterator[Carried]:
        """Edit a request into the model of each member that has one, on top of what it carries; the others stay."""
        moving = [member for member in carried.rows if member in requests]
        staying = [member for member in carried.rows if member not in requests]
        if staying:
            yield carried.only(staying)
        size = self._members_at_once(carried.edit)
        for start in range(0, len(moving), size):
            members = moving[start : start + size]
            mode, previous = ("independent", carried.of(members)) if self.at_once else ("sequential", carried.edit)
            edit = self._edit([requests[member] for member in members], mode, previous)
            yield Carried(edit, {member: row for row, member in enumerate(members)})

    def edit_in_hops(
        self, judge: Judge, carried: Carried, questions: Sequence[RecordQuestion], edited: Counter[int], first: int = 0
    ) -> Iterator[Carried]:
        """Edit in the supporting hops that the current model does not know, in order, cumulatively for each question.

        An edit is yielded and forgotten before the next is made, so that few are held at once.

        Args:
            judge: Asks the hops.
            carried: The edit of the questions, which are its members.
            questions: Every question of the lot.
            edited: Receives the number of hops that are edited in for each question.
            first: The hop to start from.

        Yields:
            Edits whose members are the questions.
        """
        asked = {i: questions[i].hops[first] for i in carried.rows if first < len(questions[i].hops)}
        if not asked or self.editor is None:
            yield carried
            return
        unknown = judge.unknown(asked, carried)
        edited.update(unknown)
        for part in self.add(carried, {i: _hop(questions[i], first) for i in unknown}):
            yield from self.edit_in_hops(judge, part, questions, edited, first + 1)

    def _members_at_once(self, edit: Edit | None) -> int:
        """Number of members that take one more request in one batch: their edits are copied, which takes memory."""
        if not self.at_once:
            return 1
        if edit is None:
            return self.batch_size
        one = max(edit.nbytes / len(edit), 1)
        return int(max(1, min(self.batch_size, CARRIED_BYTES // one, judging.EDIT_BYTES // (WORKING_COPIES * one))))

    def _edit(self, requests: Sequence[Named], mode: str, previous: Edit | None) -> Edit:
        """Edit, and let errors name the records instead of places in a batch."""
        try:
            return self.editor.edit(
                self.model, self.tokenizer, [request for _, request in requests], mode=mode, previous=previous
            )
        except (RequestError, NonFiniteError) as error:
            places = [int(place) for place in re.findall(r"\brequest (\d+)\b", str(error))]
            names = [requests[place][0] for place in places if place < len(requests)] or [name for name, _ in requests]
            raise type(error)(f"{'; '.join(names)}: {error}") from error

    @contextmanager
    def _timed(self, groups: Sequence[Group]) -> Iterator[None]:
        """Count the time of a block as spent on editing the groups' requests."""
        started = clock()
        yield
        self.seconds += clock() - started
        self.requests += sum(len(group.requests) for group in groups)


def edit_alone(
    editor: Any, model: Any, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> tuple[float | None, int | None]:
    """Edit a few requests, each alone and into the untouched model; the first time, which warms up, does not count.

    Returns:
        Median seconds and bytes of an edit; None where there is none.
    """
    seconds: list[float] = []
    sizes: list[int] = []
    for request in () if editor is None else [*requests[:1], *requests[:EDITS_ALONE]]:
        started = clock()
        try:
            edit = editor.edit(model, tokenizer, [request], mode="sequential", previous=None)
        except (RequestError, NonFiniteError):  # of a record that the evaluation left out
            continue
        seconds.append(clock() - started)
        sizes.append(edit.nbytes)
        if sum(seconds) > ENOUGH_SECONDS:
            break
    return (statistics.median(seconds[1:] or seconds), sizes[0]) if seconds else (None, None)


def clock() -> float:
    """Return seconds on a clock, once everything that was queued on an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _hop(question: RecordQuestion, index: int) -> Named:
    name = question_name(question.record, question.role, question.index)
    return f"{name}, supporting hop {index}", question.supporting[index].request()
