"""Files as they are written and read everywhere: whole or not at all, and checked before anyone uses them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REMAKE = "remove it and make it again"  # the cure for what a command wrote


class FileError(ValueError):
    """A file that does not hold what it should; the message names it, what was found and the cure."""


@contextmanager
def written_file(file: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name that becomes its own at the end, so that no reader finds half of it.

    Args:
        file: What is replaced once the block has ended; an exception leaves it as it was.
    """
    target = Path(file)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def written_together(folder: str | Path) -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder`, each by one rename, once all are written."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        yield Path(scratch)
        give_usual_mode(Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            path.replace(target / path.name)


def give_usual_mode(folder: Path, pattern: str = "*") -> None:
    """Let those read the files of a folder who may read any new file there: safetensors writes for the owner alone.

    Without it a server that runs as another user finds an edit's description and not its weights.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        usual = Path(scratch) / "usual"
        usual.touch()
        mode = usual.stat().st_mode
    for path in folder.glob(pattern):
        if path.is_file():
            path.chmod(mode)


def read_json(
    file: str | Path, *, cure: str = REMAKE, name: str | None = None, error: type[FileError] = FileError
) -> dict[str, Any]:
    """Read a JSON object of UTF-8 text.

    Args:
        file: The file.
        cure: What the error tells the user to do.
        name: What the error calls the file, such as an id on the Hub; by default its path.
        error: What is raised.

    Raises:
        FileError: If the file holds something else, see :func:`parse_json`.
        OSError: If it cannot be read.
    """
    name = str(file) if name is None else name
    value = parse_json(read_text(file, cure=cure, name=name, error=error), name=name, cure=cure, error=error)
    if not isinstance(value, dict):
        raise error(f"{name}: expected a JSON object, found {json_kind(value)}; {cure}")
    return value


def read_text(
    file: str | Path, *, cure: str = REMAKE, name: str | None = None, error: type[FileError] = FileError
) -> str:
    """Read a text, with the arguments and errors of :func:`read_json`."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        raise error(
            f"{file if name is None else name}: not a text in UTF-8 ({reason.reason} at byte {reason.start}); {cure}"
        ) from reason


def parse_json(
    text: str, *, name: str, cure: str = REMAKE, error: type[FileError] = FileError, halves: bool = False
) -> Any:
    """Return the value that a JSON text holds.

    Args:
        text: The text.
        name: What the error calls it, such as its file.
        cure: What the error tells the user to do.
        error: What is raised.
        halves: Take halves of characters (lone surrogates), which a tokenizer of bytes may generate.

    Raises:
        FileError: If the text is no JSON, is nested too deeply to be read, or holds half of a character.
    """
    try:
        value = json.loads(text)
    except RecursionError as reason:
        raise error(f"{name}: lists and objects nested too deeply to be read; {cure}") from reason
    except ValueError as reason:
        raise error(f"{name}: not valid JSON ({reason}); {cure}") from reason
    if not halves and "\\ud" in text.lower():  # the only way to write one
        require_characters(value, name=name, cure=cure, error=error)
    return value


def json_kind(value: Any) -> str:
    """Return what a JSON value is called."""
    return "null" if value is None else type(value).__name__


def require_characters(value: Any, *, name: str, cure: str = REMAKE, error: type[FileError] = FileError) -> None:
    """Check that every text of a JSON value can be written; the arguments are those of :func:`parse_json`.

    Raises:
        FileError: If one holds half of a character.
    """
    surrogate = next((part for part in _strings(value) if not _is_text(part)), None)
    if surrogate is not None:
        raise error(f"{name}: {surrogate!r} holds half of a surrogate pair, which is no character; {cure}")


def _strings(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value, keys too."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            pending += [*part, *part.values()]
        elif isinstance(part, list):
            pending += part


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
