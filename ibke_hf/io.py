"""Files as they are written and read everywhere: whole or not at all, checked before anyone uses what they hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from .core.files import (
    REMAKE,
    FileError,
    json_kind,
    parse_json,
    read_json,
    read_text,
    require_characters,
    written_file,
)

__all__ = [
    "FileError",
    "locked",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_json_list",
    "read_text",
    "read_yaml",
    "require_writable",
    "write_json",
    "write_text",
    "written_file",
]

CORRECT = "correct it"  # the cure for what a user wrote
MOST_VALUES = 100_000  # of a YAML file; an alias may repeat others until there is no end of them
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


def read_json_list(file: str | Path, *, cure: str = REMAKE, error: type[FileError] = FileError) -> list[Any]:
    """Read a JSON array of UTF-8 text; else as :func:`read_json`."""
    value = parse_json(read_text(file, cure=cure, error=error), name=str(file), cure=cure, error=error)
    if not isinstance(value, list):
        raise error(f"{file}: expected a JSON array, found {json_kind(value)}; {cure}")
    return value


def read_yaml(file: str | Path, *, cure: str = CORRECT) -> dict[str, Any]:
    """Read a YAML file of values by name, as JSON has them; an empty one holds none.

    Args:
        file: The file, in UTF-8.
        cure: What the error tells the user to do.

    Raises:
        FileError: If it holds something else, see :func:`parse_yaml`.
        OSError: If it cannot be read.
    """
    return parse_yaml(read_text(file, cure="save it in UTF-8"), name=str(file), cure=cure)


def parse_yaml(text: str, *, name: str, cure: str = CORRECT) -> dict[str, Any]:
    """Return the values by name that a YAML text holds.

    Args:
        text: The text.
        name: What the error calls it, such as its file.
        cure: What the error tells the user to do.

    Raises:
        FileError: If it is no YAML, no mapping, names a value twice, is nested too deeply, holds what JSON cannot hold
            (a date, a key that is no text, half of a character), or has more than `MOST_VALUES` values.
    """
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  derives from the safe one
    except yaml.YAMLError as error:
        raise FileError(f"{name}: not valid YAML ({' '.join(str(error).split())}); {cure}") from error
    except RecursionError as error:
        raise FileError(f"{name}: lists and mappings nested too deeply to be read; {cure}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # what the library's constructors raise for a tagged or huge value, such as `!!bool x`
        raise FileError(f"{name}: holds a value that cannot be read ({error}); {cure}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FileError(f"{name}: expected values by name, found {type(values).__name__}; {cure}")
    _require_json_values(values, name, cure)
    require_characters(values, name=name, cure=cure)
    return values


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses a name that comes twice: the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in names:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} comes twice", problem_mark=key.start_mark)
                names.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _require_json_values(values: Any, name: str, cure: str) -> None:
    pending, number = [values], 0
    while pending:
        part, number = pending.pop(), number + 1
        if number > MOST_VALUES:
            raise FileError(f"{name}: holds more than {MOST_VALUES:,} values, or an alias of itself; {cure}")
        if isinstance(part, dict):
            for key in part:
                if not isinstance(key, str):
                    raise FileError(f"{name}: {key!r} is no name; put it in quotes, or {cure}")
            pending += part.values()
        elif isinstance(part, list):
            pending += part
        elif not (part is None or isinstance(part, str | bool | int | float)):
            raise FileError(f"{name}: {part!s:.80} is a {type(part).__name__}; put it in quotes, or {cure}")


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
