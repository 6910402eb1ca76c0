"""The index of a library: an append-only file of lines, which a killed process leaves readable at any moment.

One line for each edit that was added, one for each that was taken out; the last line about an edit is what holds.
A line that a killed process has left half written is no line: it was not reported, readers pass it over, and the next
writer closes it. Ten thousand edits are a file of some megabytes, which is read in a fraction of a second.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy
import torch
from filelock import FileLock
from torch import Tensor

from ..core.records import EditRequest
from ..io import FileError, written_file

INDEX, LOCK = "index.jsonl", ".lock"
WAIT = 60.0  # seconds that a writer waits for another


class LibraryError(FileError):
    """A library that cannot be read or written; the message names the file, what was found and the cure."""


@dataclass(frozen=True)
class Entry:
    """What the index says of one edit.

    Attributes:
        id: Digest of its content, by which its file is named.
        requests: What it was made for.
        editor: What made it.
        backbone: What it was made on.
        layers: The layers that it changes.
        nbytes: Size of its file.
        router: Digest of the router that made the vectors, empty where none did.
        vectors: (requests, dim) what that router knows of the requests, in 16 bit; None where none did.
    """

    id: str
    requests: tuple[EditRequest, ...]
    editor: str = ""
    backbone: str = ""
    layers: tuple[str, ...] = ()
    nbytes: int = 0
    router: str = ""
    vectors: Tensor | None = None

    def with_vectors(self, router: str, vectors: Tensor) -> Entry:
        """Return the entry with what a router knows of its requests."""
        return replace(self, router=router, vectors=vectors.half())

    def line(self) -> dict[str, Any]:
        """Return the entry as the values of a line."""
        coded = {} if self.vectors is None else {"router": self.router, "vectors": _encoded(self.vectors)}
        return {
            "add": self.id,
            "requests": [request.to_json() for request in self.requests],
            "editor": self.editor,
            "backbone": self.backbone,
            "layers": list(self.layers),
            "nbytes": self.nbytes,
            **coded,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Entry:
        """Read the values of a line.

        Raises:
            LibraryError: If they are no entry; names `where`.
        """
        try:
            vectors = _decoded(values["vectors"]) if "vectors" in values else None
            return cls(
                _digest(values["add"]),
                tuple(EditRequest(**request) for request in values["requests"]),
                str(values["editor"]),
                str(values["backbone"]),
                tuple(map(str, values["layers"])),
                int(values["nbytes"]),
                str(values.get("router", "")),
                vectors,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LibraryError(
                f"{where}: is no entry of a library ({type(error).__name__}: {error}); restore the file, or remove "
                f"the line, and add the edit again"
            ) from error


def _digest(value: Any) -> str:
    """Refuse what is no digest: it names a file."""
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{value!r} is no digest")
    return value


def _encoded(vectors: Tensor) -> list[str]:
    return [base64.b64encode(row.half().cpu().numpy().tobytes()).decode() for row in vectors]


def _decoded(rows: list[str]) -> Tensor:
    values = [numpy.frombuffer(base64.b64decode(row), dtype=numpy.float16) for row in rows]
    return torch.from_numpy(numpy.stack(values).copy())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Own the index of a folder: one writer at a time, the others wait.

    Raises:
        LibraryError: If another process holds it for too long.
    """
    lock = FileLock(folder / LOCK, timeout=WAIT)
    try:
        lock.acquire()
    except TimeoutError as error:
        raise LibraryError(
            f"{folder}: another process has been writing there for {WAIT:.0f} s; wait until it ends"
        ) from error
    try:
        yield
    finally:
        lock.release()


def append(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to the index, within :func:`writing`; once this returns, a kill takes none of them."""
    file = folder / INDEX
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    with file.open("ab") as index:
        if index.tell() and not _ends_a_line(file):
            index.write(b"\n")  # what a killed process has left of its line
        index.write(text.encode())
        index.flush()
        os.fsync(index.fileno())


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as index:
        index.seek(-1, os.SEEK_END)
        return index.read(1) == b"\n"


def rewrite(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace the index by these lines, whole or not at all, within :func:`writing`."""
    with written_file(folder / INDEX) as temporary:
        temporary.write_text(
            "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines),
            encoding="utf-8",
        )


class Index:
    """The entries of a folder as they were read last; :meth:`refresh` reads on what was appended since.

    Attributes:
        entries: By id, in the order in which they were added.
        removed: Ids of edits that were taken out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.removed: set[str] = set()
        self._read, self._inode = 0, 0
        self._lock = Lock()
        self.refresh()

    def refresh(self) -> bool:
        """Read what other processes have written since; return whether there was anything.

        Raises:
            LibraryError: If a whole line is no entry.
        """
        with self._lock:
            return self._read_on()

    def _read_on(self) -> bool:
        file = self.folder / INDEX
        if not file.exists():
            return False
        with file.open("rb") as index:
            status = os.fstat(index.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:  # it was written anew
                self.entries, self.removed, self._read, self._inode = {}, set(), 0, status.st_ino
            index.seek(self._read)
            content = index.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for number, line in enumerate(whole.splitlines()):
            self._take(line, f"{file}, line {number + 1}" if self._read == len(whole) else str(file))
        return bool(whole)

    def _take(self, line: bytes, where: str) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return  # what a killed process has left of a line, closed by the next writer
        if not isinstance(values, dict):
            raise LibraryError(f"{where}: is no entry of a library; restore the file, or remove the line")
        if "remove" in values:
            self.entries.pop(_digest(values["remove"]), None)
            self.removed.add(values["remove"])
        elif "add" in values:
            entry = Entry.of(values, where)
            self.entries[entry.id] = entry
            self.removed.discard(entry.id)
