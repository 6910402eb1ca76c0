"""Files as they are written and read everywhere: whole or not at all, checked before anyone uses what they hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .core.files import FileError, read_json, written_file

__all__ = ["FileError", "locked", "read_json", "require_writable", "write_json", "write_text", "written_file"]

LOCK = ".lock"  # the file of :func:`locked`; it stays, since removing it would let two processes hold two locks


def require_writable(file: str | Path) -> None:
    """Check that a file can be written, before the work that it is to hold.

    Raises:
        FileError: If it is a folder, or its folder does not exist or cannot be written to.
    """
    target = Path(file)
    if target.is_dir():
        raise FileError(f"{file}: is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise FileError(f"{file}: there is no folder {target.parent}; make it, or give another file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise FileError(f"{file}: cannot be written ({error.strerror}); give another file") from error


@contextmanager
def locked(folder: str | Path, *, lock: str = LOCK) -> Iterator[Path]:
    """Own a folder: until the block ends, another process (or thread) that asks for it gets an error at once.

    The thread that owns a folder may ask for it again, so a command and what it calls can both do so. The lock goes
    with the process, however that ends.

    Args:
        folder: Made if it is missing; removed again if nothing was written to it.
        lock: Name of the lock's file in it; several owners of one folder, each of a file in it, use one each.

    Yields:
        The folder.

    Raises:
        FileError: If another process owns it; names it.
        OSError: If it cannot be written to.
    """
    path = Path(folder)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    owner = FileLock(path.resolve() / lock, timeout=0, is_singleton=True)  # one object a path, counted by each thread
    try:
        owner.acquire()
    except Timeout as error:
        raise FileError(
            f"{path}: another process is writing there; wait until it ends, or give each a folder of its own"
        ) from error
    try:
        yield path
    finally:
        if is_new and [file.name for file in path.iterdir()] == [lock]:
            (path / lock).unlink()
            path.rmdir()
        owner.release()


def write_text(file: str | Path, text: str, *, newline: str | None = None) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with written_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline=newline)


def write_json(
    file: str | Path, value: Any, *, indent: int | None = 1, compact: bool = False, ensure_ascii: bool = True
) -> None:
    """Write a JSON value, whole or not at all.

    Raises:
        ValueError: If a number is not finite.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(
        value, indent=None if compact else indent, allow_nan=False, ensure_ascii=ensure_ascii, separators=separators
    )
    write_text(file, text if compact else f"{text}\n")
