"""A folder of results: settings, rows as they are made, scores, and a page of the rows.

``settings.json`` comes first, ``rows.jsonl`` grows row by row, ``skipped.jsonl`` names the cases that were not asked,
and ``results.json`` and ``rows.html`` come last. A killed run goes on where it stopped when it is called once more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..core.fingerprints import digest_of, weights_digest
from ..core.records import EditRecord
from ..io import FileError, locked, parse_json, read_json, write_json, written_file
from .editing import EDITS_ALONE, edit_alone
from .judging import Row
from .protocol import Evaluation, RowKey, evaluate_records, row_key
from .report.page import write_page

SETTINGS, ROWS, SKIPPED, RESULTS, PAGE = "settings.json", "rows.jsonl", "skipped.jsonl", "results.json", "rows.html"
# How fast rows are made, or whether any are, not which: a resumed run may change them.
EFFORT = ("edit_seconds", "edit_seconds_alone", "edit_bytes")  # what one edit takes
NOT_SETTINGS = ("batch_size", "progress", "strict")


class ResultsError(FileError):
    """A folder that cannot take the results; the message names it and says what to do."""


class ResultsFolder:
    """The files of one evaluation, to be used as a context manager.

    Attributes:
        rows: The rows that an earlier run left, in their order.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Open a new folder, or one of the same settings; drop a last row that was cut off when the run was killed.

        Args:
            folder: Made if it is missing.
            settings: What decides the rows, as JSON values.

        Raises:
            ResultsError: If the folder holds results of other settings (each difference is named), results without
                settings, or rows that cannot be read.
        """
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier_settings()
        self.rows: tuple[Row, ...] = tuple(_read_rows(self.folder / ROWS))
        # Without a row there is nothing that other settings would spoil.
        if earlier is None or not (self.rows or (self.folder / RESULTS).exists()):
            write_json(self.folder / SETTINGS, self.settings)
        else:
            require_same(self.folder, earlier, self.settings)
        self._rows: TextIO | None = None
        self._skipped: TextIO | None = None

    def __enter__(self) -> ResultsFolder:
        self._rows = (self.folder / ROWS).open("a", encoding="utf-8")
        self._skipped = (self.folder / SKIPPED).open("w", encoding="utf-8")  # all of them are named again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._rows, self._skipped):
            if file is not None:
                file.close()

    def add(self, row: Row) -> None:
        """Append a row; it is with the operating system when this returns, so that no kill of the process loses it."""
        _append(self._rows, row)

    def skip(self, case: Mapping[str, Any]) -> None:
        """Append a case that is not asked."""
        _append(self._skipped, case)

    def finish(
        self, evaluation: Evaluation, unread: Mapping[str, int], edit: Mapping[str, float | None] | None = None
    ) -> dict[str, Any]:
        """Write ``results.json`` and the page; return the results.

        Args:
            evaluation: With all rows, also those of an earlier run.
            unread: Number of records and cases that were skipped on reading, by reason.
            edit: What one edit takes alone: ``edit_seconds_alone`` and ``edit_bytes``.
        """
        results = results_of(evaluation, unread, self.settings, edit) | (self.earlier_effort(evaluation) or {})
        write_json(self.folder / RESULTS, results)
        with written_file(self.folder / PAGE) as temporary:
            write_page(evaluation.rows, results, temporary)
        return results

    def earlier_effort(self, evaluation: Evaluation) -> dict[str, Any] | None:
        """Return what an edit took in the run that finished the folder; None unless nothing was left to be edited."""
        if evaluation.edit_seconds is not None or not (self.folder / RESULTS).exists():
            return None
        earlier = read_json(self.folder / RESULTS, error=ResultsError)
        return {name: earlier.get(name) for name in EFFORT}

    def _earlier_settings(self) -> dict[str, Any] | None:
        """Return the settings of an earlier run; None in a new folder."""
        if (self.folder / SETTINGS).exists():
            return read_json(self.folder / SETTINGS, error=ResultsError)
        others = [name for name in (ROWS, SKIPPED, RESULTS, PAGE) if (self.folder / name).exists()]
        if others:
            raise ResultsError(
                f"{self.folder}: holds {others[0]} but no {SETTINGS}, so it is not of this command; choose "
                f"another folder"
            )
        return None


def evaluate_to_folder(
    folder: str | Path,
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[EditRecord],
    *,
    settings: Mapping[str, Any],
    unread: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score an editor on records by PROTOCOL's procedure, in a folder in which a killed run goes on.

    Args:
        folder: Where the results lie.
        editor: See :func:`~ibke_hf.evaluation.protocol.evaluate_records`.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The selection.
        settings: Names of dataset, model, editor and what else tells this evaluation from others, as JSON values. The
            options below and fingerprints of records, model and editor are added to them.
        unread: Number of records and cases that were skipped on reading, by reason.
        options: Further arguments of :func:`~ibke_hf.evaluation.protocol.evaluate_records`.

    Returns:
        What ``results.json`` holds: ``overall``, ``by_criterion``, ``by_hops``, ``by_domain`` (see
        :func:`~ibke_hf.evaluation.scores.summarise`), ``records``, ``cases`` by role, ``skipped`` by reason,
        ``incomplete_group``, ``edit_seconds`` (of a request, many at once), ``edit_seconds_alone``, ``edit_bytes`` and
        ``settings``.

    Raises:
        ResultsError: If the folder holds results of other settings, or no record is selected.
        FileError: If another process is writing to the folder.
        RequestError: If a text of a record is unusable.
        NonFiniteError: If an edit is not finite.
    """
    records = list(records)
    if not records:
        raise ResultsError("no record is selected; widen the selection, or look at the dataset")
    deciding = _deciding_settings(settings, options, records, model, editor)
    with locked(folder), ResultsFolder(folder, deciding) as results:
        evaluation = evaluate_records(
            editor,
            model,
            tokenizer,
            records,
            on_row=results.add,
            on_skip=results.skip,
            finished=results.rows,
            **options,
        )
        alone: dict[str, float | None] = {}
        if results.earlier_effort(evaluation) is None:
            requests = [record.requests[0] for record in records[:EDITS_ALONE]]
            alone["edit_seconds_alone"], alone["edit_bytes"] = edit_alone(editor, model, tokenizer, requests)
        return results.finish(evaluation, unread or {}, alone)


def _deciding_settings(
    settings: Mapping[str, Any], options: Mapping[str, Any], records: Sequence[EditRecord], model: Any, editor: Any
) -> dict[str, Any]:
    """Return all that decides the rows: a run goes on only where each of these is the same."""
    return {
        "ibke_hf": __version__,
        **settings,
        **{name: value for name, value in options.items() if name not in NOT_SETTINGS},
        "records": fingerprint_of_records(records),
        "model_weights": fingerprint_of(model),
        "editor_weights": fingerprint_of(editor),
    }


def results_of(
    evaluation: Evaluation,
    unread: Mapping[str, int],
    settings: Mapping[str, Any],
    edit: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Return what ``results.json`` holds, see :func:`evaluate_to_folder`."""
    summary = dict(evaluation.summary)
    parts = {name: summary.pop(name) for name in ("by_criterion", "by_hops", "by_domain", "records", "cases")}
    return {
        "overall": summary,
        **parts,
        "skipped": dict(Counter(unread) + Counter(evaluation.skipped)),
        "incomplete_group": evaluation.incomplete_group,
        "edit_seconds": evaluation.edit_seconds,
        "edit_seconds_alone": None,
        "edit_bytes": None,
        **(edit or {}),
        "settings": dict(settings),
    }


def fingerprint_of(thing: Any) -> str | None:
    """Tell a model or editor from one of other weights or hyper-parameters, such as the same one trained again.

    Weights are summed as integers: exact on any device and in any order, and quick.
    """
    if thing is None:
        return None
    if not isinstance(thing, nn.Module):
        corpus = getattr(getattr(thing, "statistics", None), "corpus", "")
        return digest_of([repr(getattr(thing, "config", type(thing).__name__)), corpus], length=12)
    threshold = getattr(getattr(thing, "config", None), "threshold", None)  # SERAC's, which is set after training
    return weights_digest(thing, *([] if threshold is None else [str(threshold)]))


def fingerprint_of_records(records: Sequence[EditRecord]) -> str:
    """Tell a selection of records from any other."""
    return f"{len(records)} ({digest_of(map(repr, records), length=12)})"


def _append(file: TextIO | None, value: Mapping[str, Any]) -> None:
    assert file is not None, "a ResultsFolder takes rows inside its `with` block"
    file.write(
        json.dumps(value, allow_nan=False) + "\n"
    )  # ASCII, so that neither odd line ends nor lone surrogates matter
    file.flush()


def _read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file, after cutting off a last line that was not written to its end.

    Raises:
        ResultsError: If any other line is no row, or one comes twice.
    """
    content = file.read_bytes() if file.exists() else b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with file.open("r+b") as handle:
            handle.truncate(complete)
    seen: set[RowKey] = set()
    for number, line in enumerate(content[:complete].split(b"\n")[:-1], start=1):
        try:
            row: Row = parse_json(line.decode("utf-8"), name=f"{file}: line {number}", error=ResultsError, halves=True)
            key = row_key(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"{file}: line {number} is not a row of results; remove the folder and run again"
            ) from error
        if key in seen:
            raise ResultsError(
                f"{file}: line {number} repeats a row, as when two runs write at once; remove the folder and run again"
            )
        seen.add(key)
        yield row


def require_same(folder: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose results were made with other settings.

    Raises:
        ResultsError: Names each difference.
    """
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(
            f"{name} was {json.dumps(earlier.get(name))}, now {json.dumps(settings.get(name))}" for name in names
        )
        raise ResultsError(
            f"{folder}: holds an evaluation of other settings ({changes}); repeat those settings, choose another "
            f"folder or remove this one"
        )
