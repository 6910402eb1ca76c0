"""The files of a table's folder, read and checked: whatever is wrong with one is named with the file and the cure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..editors.catalogue import COMPARED
from ..evaluation.report.table import CellError, require_cell
from ..io import FileError, read_json

PLAN = "plan.json"
REMAKE_CELL = "remove its folder, and `ibke table` makes the cell again"
REMAKE_FOLDER = "choose another --out, or remove the folder and make the table again"
Group = tuple[str, str, int]


def read_cell(file: Path) -> dict[str, Any]:
    """Read the line of a cell.

    Raises:
        FileError: If it is not one.
    """
    line = read_json(file, cure=REMAKE_CELL)
    for name, types in (("split", str), ("edits", str), ("sequential", int), ("seed", int), ("editor", str)):
        if not isinstance(line.get(name), types) or isinstance(line[name], bool):
            raise FileError(f"{file}: {name} must be {_said(types)}, found {line.get(name)!r}; {REMAKE_CELL}")
    try:
        require_cell(line)
    except CellError as error:
        raise FileError(f"{file}: {error}; {REMAKE_CELL}") from error
    return line


def read_plan(file: Path) -> tuple[list[str], list[Group]]:
    """Read the editors, and the (split, edits, sequential) of a folder's table.

    Raises:
        FileError: If the file does not hold them.
    """
    plan = read_json(file, cure=REMAKE_FOLDER)
    editors, groups = plan.get("editors"), plan.get("groups")
    if not isinstance(editors, list) or not all(isinstance(name, str) and name in COMPARED for name in editors):
        raise FileError(f"{file}: editors must be some of {', '.join(COMPARED)}, found {editors!r}; {REMAKE_FOLDER}")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise FileError(
            f"{file}: groups must be lists of split, edits and a number, found {groups!r}; {REMAKE_FOLDER}"
        )
    return editors, [(split, edits, number) for split, edits, number in groups]


def _is_group(group: Any) -> bool:
    if not isinstance(group, list) or [type(part) for part in group] != [str, str, int]:
        return False
    return bool(group[2] >= 1)


def read_settings(file: Path) -> dict[str, Any]:
    """Read the settings that the cells of a folder were made with.

    Raises:
        FileError: If the file does not hold them.
    """
    settings = read_json(file, cure=REMAKE_FOLDER)
    if not isinstance(settings.get("given"), Mapping):
        raise FileError(f"{file}: given must be editors by id, found {settings.get('given')!r}; {REMAKE_FOLDER}")
    return settings


def _said(types: type) -> str:
    return "a whole number" if types is int else "a text"
