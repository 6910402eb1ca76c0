"""Folders of cells that a killed run goes on in and that shards are joined from: `ibke table`'s and `ibke sweep`'s.

The folder of a cell, under ``cells``, holds what was made for it, and ``cell.json``, its line of the results, once it
is done. ``settings.json`` says what all cells of the folder were made with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from ..io import locked, write_json
from .cells import BenchmarkError

CELLS, CELL, SETTINGS = "cells", "cell.json", "settings.json"
FAILURES = (ValueError, ArithmeticError, OSError, ImportError, RuntimeError)  # the last for memory that runs out
logger = logging.get_logger(__name__)
T = TypeVar("T")
Line = dict[str, Any]


def cell_files(folder: str | Path) -> list[Path]:
    """Return the files of all cells of a folder that are done, by name."""
    return sorted((Path(folder) / CELLS).glob(f"*/{CELL}"))


def copy_cells(
    source: Path, target: Path, read: Callable[[Path], Line], result: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Copy the finished cells of a folder into another, each with all its files.

    Args:
        source: Folder of the cells.
        target: Where they are copied to; cells that it has stay as they are.
        read: Reads and checks the line of a cell.
        result: What must be the same of a cell that both folders have.

    Raises:
        BenchmarkError: If both hold different results of one cell.
        FileError: If another process is writing to `target`.
    """
    with locked(target):
        for file in cell_files(source):
            there = target / CELLS / file.parent.name
            if not (there / CELL).exists():
                # the line comes last: a copy that was cut is made again
                shutil.copytree(file.parent, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CELL))
                write_json(there / CELL, read(file))
            elif result(read(there / CELL)) != result(read(file)):
                raise BenchmarkError(
                    f"{file.parent} and {there} hold different results of one cell; remove the folder of the wrong one"
                )


@contextmanager
def noting(failed: dict[T, Exception], cells: Iterable[T], name: Callable[[T], str]) -> Iterator[None]:
    """Note an error as the reason why cells failed, and go on."""
    try:
        yield
    except FAILURES as error:
        for cell in cells:
            logger.warning(f"{name(cell)}: {error}")
            failed[cell] = error


def require_none_failed(failed: Mapping[T, Exception], number: int, name: Callable[[T], str]) -> None:
    """Raise what :func:`noting` has noted.

    Args:
        failed: Errors by cell.
        number: Of all cells that were to be made.
        name: What the error calls a cell.

    Raises:
        BenchmarkError: If a cell failed; tells each reason once.
    """
    if failed:
        reasons = "; ".join(dict.fromkeys(f"{name(cell)}: {error}" for cell, error in failed.items()))
        raise BenchmarkError(f"{len(failed)} of {number} cells failed: {reasons}")
