"""Where a command writes: checked before the work is done, and nothing that lies there is lost."""

from __future__ import annotations

import os
from pathlib import Path

from ..io import LOCK

CONTENTS = {  # what a folder holds, by a file that every such folder has
    "edit.json": "an edit",
    "adapter_config.json": "an edit",
    "plan.json": "a table",
    "rows.jsonl": "an evaluation",
    "trainer_state.json": "a checkpoint",
    "config.json": "a model",
    "train": "records",
    "adapter.gguf": "an export",
}
MOST_NAMES = 3  # that an error lists


def require_free(folder: str | Path, kind: str, *, force: bool = False) -> Path:
    """Make the folder that a command will write to, and refuse one that holds anything.

    Args:
        folder: What the user named.
        kind: What will be written, one of the values of `CONTENTS` or ``"an editor"``.
        force: Let it replace what it finds, if that is of the same kind.

    Raises:
        ValueError: If it is no folder, cannot be written to, or holds something; says what, and what to do.
    """
    if not str(folder).strip():
        raise ValueError("--out: the name of the folder is empty; give one, or leave the option out")
    path = Path(folder)
    _require_directory(path)
    content = content_of(path)
    if content and not (force and content == kind):
        cure = "give another folder" + (", or --force to replace it" if content == kind else ", or remove it first")
        raise ValueError(f"--out {folder}: holds {content}, which would be lost; {cure}")
    return path


def content_of(folder: Path) -> str:
    """Say what a folder holds, such as ``"a model"``; empty for nothing but a lock."""
    names = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
    known = next((kind for file, kind in CONTENTS.items() if file in names), "")
    if known == "a model":
        return "an editor" if _is_editor(folder / "config.json") else known
    more = f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else ""
    return known or ", ".join(names[:MOST_NAMES]) + more


def _is_editor(file: Path) -> bool:
    from ..editors.catalogue import TRAINED
    from ..io import FileError, read_json

    try:
        return read_json(file).get("model_type") in TRAINED
    except (FileError, OSError):
        return False


def _require_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be written to ({reason}); give another place") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: cannot be written to; give another place")
