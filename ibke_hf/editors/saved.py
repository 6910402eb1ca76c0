"""Saved edits of every kind, read as what they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.adapter_files import CONFIG, AdapterError, MissingFileError, read_info
from ..core.composition import SolvedEdit
from ..core.edits import LowRankEdit, WeightEdit
from ..core.hub_files import find_file

CLASSES = {  # by the kind that edit.json states
    "dense": (".dense", "DenseEdit"),
    "grace": (".grace.codebook", "GRACEEdit"),
    "t_patcher": (".t_patcher.patches", "TPatcherEdit"),
    "lemoe": (".lemoe.mixture", "LEMoEEdit"),
    "serac": (".serac.memory", "SERACEdit"),
}


def load_edit(name_or_path: str | Path, **hub_arguments: Any) -> Any:
    """Load a saved edit of any kind, or any LoRA adapter, from a folder or the Hub.

    Raises:
        AdapterError: If a file is missing or damaged, or the kind is unknown.
    """
    try:
        find_file(name_or_path, CONFIG, hub_arguments)
    except MissingFileError as error:
        try:
            kind = read_info(name_or_path, hub_arguments)[1]["kind"]
        except MissingFileError:
            raise error from None
        if kind not in CLASSES:
            raise AdapterError(
                f"{name_or_path}: holds an edit of kind {kind!r}; kinds are {', '.join(CLASSES)}"
            ) from error
        module, name = CLASSES[kind]
        return getattr(import_module(module, __package__), name).from_pretrained(name_or_path, **hub_arguments)
    return load_low_rank_edit(name_or_path, **hub_arguments)


def load_low_rank_edit(name_or_path: str | Path, **hub_arguments: Any) -> LowRankEdit | SolvedEdit:
    """Load a saved low-rank edit, edits that were solved together with their parts, or any LoRA adapter.

    Raises:
        AdapterError: If a file is missing or damaged.
    """
    try:
        solved = read_info(name_or_path, hub_arguments)[1].get("solved")
    except MissingFileError:  # a LoRA adapter of others
        solved = None
    return (SolvedEdit if solved else LowRankEdit).from_pretrained(name_or_path, **hub_arguments)


def load_weight_edit(name_or_path: str | Path, **hub_arguments: Any) -> WeightEdit:
    """Load a saved edit that can be merged into weights: a low-rank or dense one, or any LoRA adapter.

    Raises:
        AdapterError: If it is a memory, which cannot be merged, or cannot be read.
    """
    edit = load_edit(name_or_path, **hub_arguments)
    if not isinstance(edit, WeightEdit):
        raise AdapterError(f"{name_or_path}: {unmergeable(edit.kind)}")
    return edit


def unmergeable(kind: str) -> str:
    """Say why an edit of a kind cannot be merged, and what to do."""
    name = CLASSES[kind][1] if kind in CLASSES else "its class"
    return (
        f"holds a {kind} edit, a memory beside the model that no weight can hold: it can be neither merged nor "
        f"published as a LoRA adapter; load it with {name}.from_pretrained and attach it, and share the folder with "
        "`hf upload`"
    )
