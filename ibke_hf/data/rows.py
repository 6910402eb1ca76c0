"""Records as rows of a `datasets` dataset, and back, without loss."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.records import EditCase, EditRecord, EditRequest, Hop
from .chat import as_asked
from .fields import RecordError
from .sources import find_source, read_records

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
Row = dict[str, Any]
SCHEMA = 2  # of the columns; counted up so that a dataset on disk of other columns is not found


def record_features() -> datasets.Features:
    """Return the columns of :func:`record_row`, explicit, since empty lists would leave them to chance.

    Raises:
        ImportError: If `datasets` is not installed.
    """
    datasets = _datasets()
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    prompt_format = {"chat": datasets.Value("bool"), "chat_options": text, "leading_space": text}
    request = {"prompt": text, "target": text, "subject": text, "format": prompt_format}
    hop = {
        "prompt": text,
        "target": text,
        "head": text,
        "property": text,
        "tail": text,
        "tail_is_item": datasets.Value("bool"),
        "subject": text,
        "format": prompt_format,
    }
    number, hops = datasets.Value("int32"), datasets.List(hop)
    case = {
        "prompt": text,
        "target": text,
        "criteria": texts,
        "hops": number,
        "top_k": number,
        "aliases": texts,
        "supporting": hops,
        "facts": hops,
        "name": text,
        "format": prompt_format,
    }
    cases = datasets.List(case)
    columns = {
        "id": text,
        "dataset": text,
        "domain": text,
        "requests": datasets.List(request),
        "generality": cases,
        "locality": cases,
        "edits": hops,
        "kind": text,
        "relation": text,
        "metadata": datasets.List({"key": text, "value": text}),
    }
    return datasets.Features(columns)


def record_row(record: EditRecord) -> Row:
    """Return a record as a row: plain lists and dicts, the metadata as a list of keys and values."""
    return {**_plain(record), "metadata": [{"key": key, "value": value} for key, value in record.metadata.items()]}


def _plain(value: Any) -> Any:
    """Return a record, or a part of one, as lists and dicts, chat options as JSON text; without the metadata."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    names = getattr(value, "__dataclass_fields__", None)
    if names is None:
        return value
    parts: Row = {name: getattr(value, name) for name in names if name != "metadata"}
    return {name: json.dumps(part) if name == "chat_options" else _plain(part) for name, part in parts.items()}


def _with_options(value: Any) -> Any:
    """Read the chat options of every format in a row, which are JSON text in a column and a mapping in a record."""
    if isinstance(value, Mapping):
        return {key: json.loads(part) if key == "chat_options" else _with_options(part) for key, part in value.items()}
    return [_with_options(part) for part in value] if isinstance(value, list | tuple) else value


def record_from_row(row: Mapping[str, Any]) -> EditRecord:
    """Return the record that a row was made of."""
    parts: dict[str, Any] = {"requests": EditRequest, "generality": _case, "locality": _case, "edits": Hop}
    parts_of_record: Row = {
        name: tuple(make(**_with_options(part)) for part in row[name]) for name, make in parts.items()
    }
    texts: Row = {name: row[name] for name in ("id", "dataset", "domain", "kind", "relation")}
    return EditRecord(**texts, **parts_of_record, metadata={pair["key"]: pair["value"] for pair in row["metadata"]})


def records_dataset(
    source: str | Path, *, streaming: bool = False, cache_dir: str | Path | None = None, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the records of a source as a `datasets` dataset of :func:`record_row`s.

    Args:
        source: As for :func:`~ibke_hf.data.sources.read_records`.
        streaming: Return an ``IterableDataset``, which reads as it is read; else a ``Dataset``, which is written to
            disk once and found there again while source, options and the version of this package are the same.
        cache_dir: Where Hub files and the dataset on disk are kept.
        options: Format, filters, limit and seed, as for :func:`~ibke_hf.data.sources.read_records`.

    What is left out is logged by reason when it is read.

    Raises:
        ImportError: If `datasets` is not installed.
        TypeError: If an option is unknown.
        RecordError: As :func:`~ibke_hf.data.sources.read_records` does; of a streamed dataset, while it is read. Also
            if no record is left to be written to disk.
    """
    datasets = _datasets()
    read_records(
        source, cache_dir=cache_dir, **options
    )  # reads nothing yet: refuses wrong options before anything is written
    settings = {
        name: sorted(value) if isinstance(value, set | frozenset) else value for name, value in options.items()
    }
    arguments: Row = {"source": str(source), "options": {**settings, "cache_dir": cache_dir}}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, features=record_features(), gen_kwargs=arguments)
    if next(read_records(source, cache_dir=cache_dir, **{**options, "limit": 1, "seed": None}), None) is None:
        raise RecordError(f"no record in {source}, or none that the filters leave")
    arguments["stamp"] = _stamp(source, cache_dir, options)
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=record_features(),
            gen_kwargs=arguments,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, RecordError) else error from None


class StoredRecords:
    """The records of a ``datasets.Dataset`` of rows, made one at a time, so that memory does not grow.

    Args:
        rows: The dataset.
        changes: Fields of :class:`~ibke_hf.core.records.PromptFormat` that the records are put in.
    """

    def __init__(self, rows: datasets.Dataset, changes: Mapping[str, Any] | None = None) -> None:
        self.rows, self.changes = rows, changes or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EditRecord:
        return as_asked(record_from_row(self.rows[index]), **self.changes)


def _stamp(source: str | Path, cache_dir: str | Path | None, options: Mapping[str, Any]) -> str:
    """Return what the dataset on disk is found by beside source and options: state of the files and readers."""
    where = {name: options.get(name) for name in ("split", "domains", "revision", "token")}
    return f"{version('ibke-hf')} {SCHEMA} {find_source(source, cache_dir=cache_dir, **where).stamp}"


def _rows(source: str, options: dict[str, Any], stamp: str = "") -> Iterator[Row]:
    """Yield rows; `stamp` is there for the cache alone, which is keyed on the arguments."""
    skipped: Counter[str] = Counter()
    for record in read_records(source, skipped=skipped, **options):
        yield record_row(record)
    for reason, number in skipped.items():
        logger.warning(f"{source}: left out {number}: {reason}")


def _case(**row: Any) -> EditCase:
    hops = {name: tuple(Hop(**hop) for hop in row[name]) for name in ("supporting", "facts")}
    return EditCase(**{**row, **hops, "criteria": tuple(row["criteria"]), "aliases": tuple(row["aliases"])})


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('records as a dataset need the extra "train": pip install "ibke-hf[train]"') from error
    return datasets
