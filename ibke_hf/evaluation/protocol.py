"""The procedure of PROTOCOL: records + editor + model -> a row for every request and case, and their summary.

Clause by clause: unedited predictions first; groups of whole records; requests one after another; reliability;
generality, with unknown supporting hops edited in for one case; locality; undo, which is nothing but the end of a
`with` block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.capture import evaluating
from ..core.configuration_ibke import require_choice
from ..core.records import EditRecord
from ..core.tokens import Span, context_length
from .editing import Editing, GroupMode
from .judging import Judge, LocalityMatch, Row
from .questions import Group, Reader, RecordQuestion, fact_keys, fill_groups, fill_lots, number_of_requests
from .scores import summarise

CollisionScope = Literal["set", "group"]
CHOICES: dict[str, Any] = {
    "mode": GroupMode,
    "collision_scope": CollisionScope,
    "locality_match": LocalityMatch,
    "span": Span,
}
RowKey = tuple[str, str, str, int]
NAMED = 5  # unusable requests and cases that the log names; all of them are counted
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: One dict for each request and case, in the order of the records. It is JSON-able: record, domain,
            dataset, kind, role (reliability, generality, locality), list, case (its index in the record), criteria,
            hops, prompt, target; score, top1 and first_token as fractions; exact_match (requests and generality, None
            if not generated); js_similarity (locality); before and after, the teacher-forced top-1 text at the target
            positions; generated, the answer that exact_match judges; answer, what the model answers freely,
            answer_before, what it did before the edit (locality), and answered, whether that is right or unmoved (None
            if not asked freely); and edited_hops, the number of supporting hops that were edited in.
        summary: The scores in percent, see :func:`~ibke_hf.evaluation.scores.summarise`.
        skipped: Number of cases that were not scored, by reason.
        edit_seconds: Mean editing time of a request in seconds; None where nothing was edited.
        incomplete_group: Number of requests of a last group that has fewer than asked for, 0 if there is none.
    """

    rows: tuple[Row, ...]
    summary: dict[str, Any]
    skipped: dict[str, int] = field(default_factory=dict)
    edit_seconds: float | None = None
    incomplete_group: int = 0


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """What PROTOCOL's procedure leaves open.

    Attributes:
        sequential: n, the number of requests that a group is filled up to with whole records.
        mode: ``"sequential"``, or ``"joint"`` for one edit of all requests of a group.
        batch_size: Rows of a forward pass.
        supporting_hops: Edit in the supporting hops of a generality case that the model does not know.
        collision_scope: Drop locality cases that match an edit of the whole ``"set"`` or of their ``"group"``.
        locality_match: Compare token ids, or decoded strings as UniEdit does.
        span: Where the target span starts, see :func:`ibke_hf.core.tokens.encode`.
        generate: Generate answers greedily, for exact match.
        free: Let the model answer every question freely as well, without the target's length (PROTOCOL, Free
            generation); in the format, chat or plain, that a request or case has.
        strict: Raise for a request or case that cannot be edited or asked, before anything is run. By default it is
            left out, named and counted: a record by one unusable request, else the case alone.
    """

    sequential: int = 1
    mode: GroupMode = "sequential"
    batch_size: int = 64
    supporting_hops: bool = True
    collision_scope: CollisionScope = "set"
    locality_match: LocalityMatch = "ids"
    span: Span = "prompt"
    generate: bool = True
    free: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuse an option that is out of range; the ValueError names it and what is allowed."""
        for name in ("sequential", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            require_choice(name, getattr(self, name), get_args(allowed))


def evaluate_records(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[EditRecord],
    *,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
    on_skip: Callable[[dict[str, Any]], None] | None = None,
    finished: Iterable[Row] = (),
    **procedure: Any,
) -> Evaluation:
    """Score an editor on records; the model is bit-identical afterwards.

    Args:
        editor: Has ``edit(model, tokenizer, requests, *, mode, previous) -> Edit``. Unless it says
            ``supports_independent = False``, up to `batch_size` edits are made and asked at once, for which its edits
            need ``select(rows)`` (every :class:`~ibke_hf.core.edits.WeightEdit` has it). None: the unedited model.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The selection; for locality collisions it counts as a whole.
        progress: Show a progress bar.
        on_row: Called with each row as it is made, in the order of the records within each lot of groups.
        on_skip: Called with a dict (record, dataset, domain, role, list, case, prompt, reason) for each case that is
            dropped, before anything is run, and again when a run is resumed; with a ``detail`` where it is unusable.
        finished: Rows of a run that was killed. Lots of groups of which every row is among them are not run again, and
            `on_row` is called for missing rows only; the result holds all of them.
        procedure: Fields of :class:`Procedure`, such as ``sequential=10``.

    Raises:
        RequestError: If a text is empty, too long or has no target token, or the editor cannot edit it, and `strict`,
            or if no record is usable; names record and case; nothing is run then.
        NonFiniteError: If an edit is not finite; names record and request.
        ValueError: For an option out of range.
    """
    how = Procedure(**procedure)
    check = getattr(editor, "check_request", None)
    reader = Reader(tokenizer, how.span, context_length(model), how.supporting_hops, how.strict, check)
    selection = _Selection(list(records), how.sequential, how.collision_scope, reader)
    skipped = selection.leave_out(on_skip)
    earlier = {row_key(row): row for row in finished}
    editing = Editing(editor, model, tokenizer, how.mode, how.batch_size)
    judge = Judge(model, tokenizer, how.batch_size, how.locality_match, how.generate, how.free)
    rows: list[Row] = []
    with evaluating(model), tqdm(total=len(selection.records), unit="record", disable=not progress) as bar:
        # The same lots after a kill: what shares a batch moves the last bits of a score.
        for lot in selection.lots(how.batch_size):
            rows += _rows_of_lot(lot, editing, judge, earlier, on_row)
            bar.update(sum(len(group.records) for group in lot))
    seconds = editing.seconds / editing.requests if editing.requests else None
    return Evaluation(tuple(rows), summarise(rows), skipped, seconds, selection.incomplete)


def _rows_of_lot(
    lot: Sequence[Group],
    editing: Editing,
    judge: Judge,
    earlier: Mapping[RowKey, Row],
    on_row: Callable[[Row], None] | None,
) -> list[Row]:
    """Return the rows of a lot, those of an earlier run as they are; the lot is run again if any is missing."""
    questions = [question for group in lot for question in group.questions]
    if all(question.key in earlier for question in questions):
        return [earlier[question.key] for question in questions]
    rows = []
    for row in _run(lot, questions, editing, judge):
        if on_row is not None and row_key(row) not in earlier:
            on_row(row)
        rows.append(earlier.get(row_key(row), row))
    return rows


def row_key(row: Row) -> RowKey:
    """What tells a row apart from all others: dataset, record, role and index of the case."""
    return row["dataset"], row["record"], row["role"], row["case"]


def _run(lot: Sequence[Group], questions: Sequence[RecordQuestion], editing: Editing, judge: Judge) -> list[Row]:
    """Take a lot of groups, each with an edit of its own, through the procedure; return their rows in order."""
    group_of = [i for i, group in enumerate(lot) for _ in group.questions]
    before = judge.predictions(questions)
    rows: dict[int, Row] = {}
    for edited in editing.edit_groups(lot):
        carried = edited.spread({i: group for i, group in enumerate(group_of) if group in edited.rows})
        edited_hops: Counter[int] = Counter()
        for part in editing.edit_in_hops(judge, carried, questions, edited_hops):
            rows |= judge.rows(questions, before, part, edited_hops)
    return [rows[i] for i in range(len(questions))]


class _Selection:
    """The records of an evaluation in groups, which become questions a lot at a time and are forgotten after it.

    Attributes:
        records: Those whose requests can all be edited and asked.
        incomplete: Number of requests of a last group that has fewer than asked for, 0 if there is none.
    """

    def __init__(self, records: Sequence[EditRecord], sequential: int, scope: CollisionScope, reader: Reader) -> None:
        """Fill the groups; say so if the last one is incomplete.

        Raises:
            ValueError: If a record was given more than once.
            RequestError: If no record is usable, or in a strict evaluation one is not.
        """
        numbers = Counter((record.dataset, record.id) for record in records)
        repeated = [key for key, number in numbers.items() if number > 1]
        if repeated:
            dataset, record_id = repeated[0]
            raise ValueError(
                f"record {record_id!r} of {dataset!r} was given more than once; give each record an id of its own"
            )
        self.records, self._unusable = reader.usable(records)
        self._reader, self._groups = reader, list(fill_groups(self.records, sequential))
        self._edited = fact_keys(self.records) if scope == "set" else None
        last = number_of_requests(self._groups[-1]) if self._groups else sequential
        self.incomplete = last if last < sequential else 0
        if self.incomplete:
            logger.warning(f"the last group has {last} of {sequential} requests; it is scored, where UniEdit drops it")

    def leave_out(self, on_skip: Callable[[dict[str, Any]], None] | None) -> dict[str, int]:
        """Tokenise everything once and keep nothing, so that what cannot be asked is known in the first minute.

        Returns:
            The number of records and cases that are left out, by reason; `on_skip` is called with each, and the log
            names the first few that are unusable.

        Raises:
            RequestError: In a strict evaluation, for the first that is unusable; names record and case.
        """
        numbers: Counter[str] = Counter()
        unusable = 0
        for case in chain(self._unusable, (case for records in self._groups for case in self._read(records).dropped)):
            numbers[case["reason"]] += 1
            if "detail" in case:
                unusable += 1
                if unusable <= NAMED:
                    logger.warning(f"left out: {case['detail']}")
            if on_skip is not None:
                on_skip(case)
        if unusable > NAMED:
            logger.warning(f"left out: {unusable - NAMED} more of the kind")
        return dict(numbers)

    def lots(self, requests: int) -> Iterator[list[Group]]:
        """Yield lots of groups as questions, see :func:`fill_lots`."""
        for lot in fill_lots(self._groups, requests):
            yield [self._read(records) for records in lot]

    def _read(self, records: list[EditRecord]) -> Group:
        return self._reader.group(records, fact_keys(records) if self._edited is None else self._edited)
