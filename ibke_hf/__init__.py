"""Correct facts inside language models: IBKE editors, edits as values, training and evaluation.

The public names load lazily; importing the package has no side effects.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.composition import SolvedEdit
    from .core.configuration_ibke import IBKEConfig
    from .core.conflicts import Conflict, conflicts
    from .core.edits import Edit, LowRankEdit
    from .core.modeling_ibke import IBKEEditor
    from .core.records import EditCase, EditRecord, EditRequest
    from .lifelong.library import EditLibrary
    from .loading import load_editor, load_model
    from .training.trainer import IBKETrainer, IBKETrainingArguments

__version__ = "0.1.0"

_HOME = {
    "Conflict": "core.conflicts",
    "Edit": "core.edits",
    "EditCase": "core.records",
    "EditLibrary": "lifelong.library",
    "EditRecord": "core.records",
    "EditRequest": "core.records",
    "IBKEConfig": "core.configuration_ibke",
    "IBKEEditor": "core.modeling_ibke",
    "IBKETrainer": "training.trainer",
    "IBKETrainingArguments": "training.trainer",
    "LowRankEdit": "core.edits",
    "SolvedEdit": "core.composition",
    "conflicts": "core.conflicts",
    "load_editor": "loading",
    "load_model": "loading",
}
__all__ = [
    "Conflict",
    "Edit",
    "EditCase",
    "EditLibrary",
    "EditRecord",
    "EditRequest",
    "IBKEConfig",
    "IBKEEditor",
    "IBKETrainer",
    "IBKETrainingArguments",
    "LowRankEdit",
    "SolvedEdit",
    "__version__",
    "conflicts",
    "load_editor",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
