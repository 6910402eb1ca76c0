"""Record files, read item by item: JSON objects, lists and lines, gzipped or not, never whole in memory."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, get_args

from ..core.records import EditRecord, LeadingSpace
from .fields import Field, RecordError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
CHUNK = 1 << 18  # characters read at once
BLANK = re.compile(r"[ \t\n\r]*")
CUT = 16  # a scan that fails this close to the end of what was read may have met a word or an escape cut in two
Top = Literal["object", "list"]
Key = str | int


def stem(file: str | Path) -> str:
    """Return a file's name up to its first dot: UniEdit's domain, and the start of ids where records have none."""
    return Path(file).name.split(".")[0]


def record_files(folder: str | Path) -> list[Path]:
    """Return the record files of a folder, those with one of `SUFFIXES`, by name."""
    return sorted(file for suffix in SUFFIXES for file in Path(folder).glob(f"*{suffix}"))


def read_each(
    file: str | Path, top: Top, name: str, parse: Callable[[Any, str], EditRecord | None]
) -> Iterator[EditRecord]:
    """Yield what `parse` makes of each value and key of a file of the format `name`, but for None.

    Targets follow their prompts by PROTOCOL's rule, as in the benchmarks' own evaluators, unless a record has another
    rule under ``leading_space``, which records of a user's own facts do.

    Raises:
        RecordError: If the file is broken, is no JSON `top`, or `parse` finds a record unreadable; names the file.
    """
    for key, value in json_items(file, top, name):
        try:
            record = parse(value, str(key))
            rule = value.get("leading_space", "protocol") if record is not None else ""
            if record is not None and rule not in get_args(LeadingSpace):
                raise Field(rule, "leading_space", record.id).error(f"is none of {', '.join(get_args(LeadingSpace))}")
        except RecordError as error:
            raise RecordError(f"{file}: {error}") from error
        except RecursionError as error:
            raise RecordError(f"{file}: record {str(key)!r} is nested too deeply") from error
        if record is not None:
            yield record.formatted(leading_space=rule)


def json_items(file: str | Path, top: Top | None = None, name: str = "record") -> Iterator[tuple[Key, Any]]:
    """Yield the keys and values of a JSON object, or the positions and parts of a JSON list or of JSON lines.

    No more of the file is in memory than `CHUNK` characters and one item.

    Args:
        file: A file with one of `SUFFIXES`.
        top: What the file must be, where only one will do; JSON lines count as a list.
        name: What errors call the format.

    Raises:
        RecordError: If the file is no valid JSON, no complete gzip file, or not what `top` says; names the file and
            the line.
        OSError: If it cannot be opened.
    """
    path = Path(file)
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    try:
        with opener(path, "rt", encoding="utf-8-sig") as handle:  # a byte order mark is no part of the first key
            lines = path.name.removesuffix(".gz").endswith(".jsonl")
            window = _Window(path, handle)
            kind: Top = "list" if lines or window.next() == "[" else "object"
            if kind != (top or kind):
                raise RecordError(
                    f"{path}: a {name} file is one JSON {top} of records, found "
                    f"{'list' if top == 'object' else 'dict'}"
                )
            yield from _lines(window) if lines else _list(window) if kind == "list" else _object(window)
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: not a complete gzip file ({error})") from error


class _Window:
    """The part of a text file that was read and not yet used; `at` is where the next value begins."""

    def __init__(self, path: Path, handle: IO[str]) -> None:
        self.path, self.handle = path, handle
        self.text, self.at = "", 0
        self.line, self.column = 1, 0  # where the window begins
        self.scan = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Forget what was used and read on, doubling what is left; tell whether there was more."""
        chunk = self.handle.read(max(CHUNK, len(self.text) - self.at))
        if chunk:
            self.line, self.column = self.position(self.at)
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def next(self) -> str:
        """Go to the next character that is not blank and return it, or "" at the end of the file."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, characters: str) -> str:
        """Go past the next character, which must be one of these, and return it."""
        character = self.next()
        if not character or character not in characters:
            raise self.error(f"expecting {' or '.join(characters)}", self.at)
        self.at += 1
        return character

    def value(self) -> Any:
        """Go past the next JSON value and return it."""
        self.next()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - CUT or error.msg.startswith("Unterminated string")
                if not cut or not self.more():
                    raise self.error(error.msg, error.pos) from error
                continue
            except RecursionError as error:
                raise self.error("nested too deeply", self.at) from error
            except ValueError as error:  # a number of more digits than Python reads
                raise self.error(str(error), self.at) from error
            if end + CUT < len(self.text) or not self.more():  # a number this close to the window's end may go on
                self.at = end
                return value

    def end(self) -> None:
        """Raise unless nothing but blanks is left."""
        if self.next():
            raise self.error("extra data", self.at)

    def position(self, at: int) -> tuple[int, int]:
        """Return the line of an index of the window, from 1, and its column, from 0."""
        begin = self.text.rfind("\n", 0, at) + 1
        return self.line + self.text.count("\n", 0, at), at - begin + (0 if begin else self.column)

    def error(self, what: str, at: int) -> RecordError:
        line, column = self.position(at)
        return RecordError(f"{self.path}: not valid JSON ({what}: line {line} column {column + 1})")


def _object(window: _Window) -> Iterator[tuple[Key, Any]]:
    window.take("{")
    if window.next() == "}":
        window.at += 1
    else:
        separator = ","
        while separator == ",":
            if window.next() != '"':
                raise window.error("expecting a key in double quotes", window.at)
            key = window.value()
            window.take(":")
            yield key, window.value()
            separator = window.take(",}")
    window.end()


def _list(window: _Window) -> Iterator[tuple[Key, Any]]:
    window.take("[")
    if window.next() == "]":
        window.at += 1
    else:
        index, separator = 0, ","
        while separator == ",":
            yield index, window.value()
            index, separator = index + 1, window.take(",]")
    window.end()


def _lines(window: _Window) -> Iterator[tuple[Key, Any]]:
    index = 0
    while window.next():
        yield index, window.value()
        index += 1
