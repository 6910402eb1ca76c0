"""The files of runs that figures and claims are made of, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io import FileError, read_json, read_json_list
from .figures import FIGURES, read_figure
from .trainings import PAPER, Line

SWEEP, TABLE, DRAWN = "sweep.json", "table.json", "figures"


@dataclass(frozen=True)
class Evidence:
    """What claims are held against; what is not there is empty.

    Attributes:
        lines: Of a sweep.
        cells: Of a table.
        figures: Data by figure.
    """

    lines: list[Line] = field(default_factory=list)
    cells: list[Mapping[str, Any]] = field(default_factory=list)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_sweep(place: str | Path) -> list[Line]:
    """Read the lines of a sweep from its folder or from ``sweep.json``.

    Raises:
        FileError: If it holds no lines; names what is wrong.
    """
    file = Path(place) / SWEEP if Path(place).is_dir() else Path(place)
    lines = read_json(file, cure="name the folder of `ibke sweep`").get("cells")
    if not isinstance(lines, list):
        raise FileError(f"{file}: has no list of cells; name the folder of `ibke sweep`")
    for line in lines:
        missing = [name for name in (*PAPER, "seed", "scores") if not isinstance(line, dict) or name not in line]
        if missing:
            raise FileError(f"{file}: a cell has no {missing[0]!r}; make the file again with `ibke sweep`")
    return lines


def kept_editors(place: str | Path) -> dict[str, dict[int, Path]]:
    """Return the folders of the editors that a sweep kept, the paper's with and without IB, by label and seed."""
    switches = {"with IB": True, "without IB": False}
    kept = {label: _kept(place, use_information_bottleneck=switch) for label, switch in switches.items()}
    return {label: folders for label, folders in kept.items() if folders}


def kept_by_rank(place: str | Path) -> dict[int, dict[int, Path]]:
    """Return the folders of the editors that a sweep kept, the paper's, by the rank of their edits and seed."""
    return {
        rank: folders
        for rank in sorted({int(line["edit_rank"]) for line in read_sweep(place)})
        if (folders := _kept(place, edit_rank=rank))
    }


def _kept(place: str | Path, **fields: Any) -> dict[int, Path]:
    """Return the folders of editors that a sweep kept, by seed: their fields are the paper's but for those named."""
    folder, wanted = Path(place) if Path(place).is_dir() else Path(place).parent, {**PAPER, **fields}
    kept = {}
    for line in read_sweep(place):
        editor = folder / "cells" / str(line.get("name")) / "editor"
        if all(line[name] == value for name, value in wanted.items()) and (editor / "config.json").exists():
            kept[int(line["seed"])] = editor
    return dict(sorted(kept.items()))


def read_evidence(folder: str | Path) -> Evidence:
    """Read what a folder holds of table, sweep and figures.

    Raises:
        FileError: If there is no such folder, or a file of it cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileError(f"{folder}: there is no such folder; name one with table.json, sweep.json or figures")
    drawn = {name: data for name in FIGURES if (data := read_figure(root / DRAWN, name)) is not None}
    return Evidence(
        read_sweep(root / SWEEP) if (root / SWEEP).exists() else [],
        read_json_list(root / TABLE) if (root / TABLE).exists() else [],
        drawn,
    )
