"""`ibke atlas tune`: hyper-parameters of the editors without weights, by as many trials each on validation records.

An editor that keeps one edit apart from everything else need not carry a hundred: how far a value may go, and how much
of the space is left to the corpus, are chosen anew for each number of edits that the model carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..benchmark.tuning import Settings, TrialBench, choose_settings
from . import RIVALS, atlas_statistics, load_backbone, load_records
from .editors import LAYERS

TUNING_RECORDS = 100
EDITS = (1, 10, 100)  # that the model carries at once
# ROME's and AlphaEdit's search for a value: the papers' 20 steps end before a model this small says the target. What
# keeps the value small matters as much, since keys of 512 dimensions are alike enough that a large change shows at
# other tokens too. Texts in front of the prompts gain less generality here than they cost reliability: the model has
# seen single sentences alone.
VALUE = {"prefixes": 0, "learning_rate": 0.5, "clamp": 4.0}
# With many edits each value has to stay smaller still: jointly, AlphaEdit says 3 of 100 targets and keeps 25 of 100
# neighbours at a clamp of 4, λ = 0.001 and a threshold of 0.3, but 49 and 90 at 1.5, 0.1 and 3.
SMALL_VALUE = {"prefixes": 0, "learning_rate": 0.5, "clamp": 1.5, "steps": 30, "weight_decay": 0.1}
PAPER_VALUE = {**SMALL_VALUE, "clamp": 0.75}
TRIALS: Mapping[str, tuple[Settings, ...]] = {
    "ft": tuple({"layers": LAYERS, "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)),
    "rome": (
        {"layers": [0], **VALUE, "steps": 20, "weight_decay": 0.02},
        {"layers": [0], **VALUE, "steps": 100, "weight_decay": 0.1},
        {"layers": [0], **VALUE, "steps": 200, "weight_decay": 0.02},
        {"layers": [1], **VALUE, "steps": 50, "weight_decay": 0.1},
    ),
    "alphaedit": (
        {"layers": [0, 1, 2], **VALUE, "steps": 20, "weight_decay": 0.02, "regularisation": 1e-3},
        {"layers": [0, 1], **VALUE, "steps": 100, "weight_decay": 0.1, "regularisation": 1e-3},
        {"layers": [0, 1], **VALUE, "steps": 200, "weight_decay": 0.02, "regularisation": 1e-3, "null_threshold": 0.3},
        {"layers": [0, 1], **VALUE, "steps": 50, "weight_decay": 0.1, "regularisation": 1e-3, "null_threshold": 0.3},
    ),
    "t_patcher": (
        {"layers": [5], "memory_weight": 10.0},
        {"layers": [5], "memory_weight": 1.0},
        {"layers": [5], "memory_weight": 0.1},
        {"layers": [5], "memory_weight": 0.1, "activation_threshold": -1.0, "activation_margin": -1.0},
    ),
    "lemoe": (
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.15},
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.25},
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.4},
        {"layers": [3], "learning_rate": 3e-3, "routing_threshold": 0.25},
    ),
    "grace": tuple(
        {"layers": [layer], "initial_radius": radius} for layer, radius in ((2, 0.75), (2, 1.0), (0, 0.75), (0, 1.0))
    ),
}
TRIALS_OF_MANY: Mapping[str, tuple[Settings, ...]] = {
    **TRIALS,
    "rome": (
        {"layers": [0], **SMALL_VALUE},
        {"layers": [0], **SMALL_VALUE, "clamp": 2.5},
        {"layers": [0], **PAPER_VALUE},
        {"layers": [1], **SMALL_VALUE},
    ),
    "alphaedit": (
        {"layers": [0, 1], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 3.0},
        {"layers": [0, 1], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 1.0},
        {"layers": [0, 1, 2, 3], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 1.0},
        {"layers": [0, 1], **PAPER_VALUE, "regularisation": 0.01, "null_threshold": 1.0},
    ),
}


def trials_of(name: str, edits: int) -> tuple[Settings, ...]:
    """Return the settings that are tried for an editor where the model carries so many edits."""
    return (TRIALS if edits == 1 else TRIALS_OF_MANY)[name]


def tune(
    out: str | Path, names: Sequence[str] = RIVALS, edits: Sequence[int] = EDITS, number: int = TUNING_RECORDS
) -> dict[str, Any]:
    """Try the settings of each editor on the first validation records; keep those with the best Avg, and all trials.

    Args:
        out: Folder, made if it is missing; see :func:`~ibke_hf.benchmark.tuning.choose_settings`.
        names: The editors.
        edits: Numbers of edits that the model carries at once, each tuned for itself.
        number: How many validation records; the first ones.

    Returns:
        The chosen settings by number of edits (as text, as JSON has it) and editor.

    Raises:
        ValueError: If an editor has no trials, a number of edits is out of range, or `out` holds trials on another
            number of records.
    """
    unknown = [name for name in names if name not in TRIALS]
    if unknown or not names:
        raise ValueError(f"editors without weights are {', '.join(TRIALS)}; found {', '.join(unknown) or 'none'}")
    trials = {count: {name: trials_of(name, count) for name in names} for count in edits}
    return choose_settings(out, trials, _AtlasTrials(load_records("validation")[:number]), order=tuple(TRIALS))


class _AtlasTrials(TrialBench):
    """The embedded backbone and its records."""

    def load(self) -> tuple[Any, Any]:
        return load_backbone()

    @cached_property
    def statistics(self) -> Any:
        return atlas_statistics(*self.loaded)
