"""How much a trained editor moves, chosen by trials on validation records; and editors saved in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..core.modeling_ibke import GradientEditor
from ..core.records import EditRecord
from ..editors.serac import SERACEditor
from ..evaluation.protocol import evaluate_records

STEP_FACTORS = (1.0, 0.85, 0.7, 0.5, 1.2)  # of η as trained, which comes first and stays where none is better
THRESHOLDS = (0.5, 0.3, 0.7, 0.9)  # of SERAC's scope, its default first
SCORES = ("reliability", "generality", "locality", "avg")


def trials_for(editor: GradientEditor | SERACEditor) -> tuple[float, ...]:
    """Return what :func:`choose_strength` tries of an editor unless told otherwise."""
    return THRESHOLDS if isinstance(editor, SERACEditor) else STEP_FACTORS


def choose_strength(
    editor: GradientEditor | SERACEditor,
    backbone: Any,
    tokenizer: Any,
    records: Sequence[EditRecord],
    trials: Sequence[float] | None = None,
    locality_floor: float | None = None,
    *,
    edits: int = 1,
    rounded: bool = True,
) -> list[dict[str, float]]:
    """Set how much an editor moves, by trials on validation records: a factor of η, or SERAC's threshold.

    A smaller step, like a higher threshold, moves less of everything.

    Args:
        editor: Left with the chosen one.
        backbone: The model that it was trained for.
        tokenizer: Its tokenizer.
        records: Validation records.
        trials: Factors or thresholds, tried in turn; by default :func:`trials_for`.
        locality_floor: Locality in percent that ends the trials; the best Avg of all is chosen where none reaches it.
            None: no floor.
        edits: Number of edits that the model carries at once.
        rounded: Round the weights first, to what :func:`save_in_16_bit` stores.

    Returns:
        What was tried, with validation scores in percent; the chosen one comes last.
    """
    if rounded:
        for parameter in stored_in_16_bit(editor).parameters():
            parameter.data = parameter.data.half().float()
    editor.eval()
    name, use = _strength(editor)
    tried: list[dict[str, float]] = []
    for value in trials_for(editor) if trials is None else trials:
        use(value)
        summary = evaluate_records(
            editor, backbone, tokenizer, records, sequential=edits, progress=False, generate=False
        ).summary
        tried.append({name: value, **{score: summary[score] for score in SCORES}})
        if locality_floor is not None and summary["locality"] >= locality_floor:
            return tried
    best = max(tried, key=lambda trial: trial["avg"])
    use(best[name])
    return [*tried, best]


def set_strength(editor: GradientEditor | SERACEditor, trial: dict[str, float]) -> None:
    """Set how much an editor, loaded as it was saved, moves: to what a trial of :func:`choose_strength` tried."""
    name, use = _strength(editor)
    use(trial[name])


def _strength(editor: GradientEditor | SERACEditor) -> tuple[str, Callable[[float], None]]:
    """Return the name of the setting that is chosen after training, and what sets it."""
    if isinstance(editor, SERACEditor):
        return "threshold", lambda value: setattr(editor.config, "threshold", value)
    sizes, trained = editor.log_step_sizes, editor.log_step_sizes.data.clone()
    return "factor", lambda value: setattr(sizes, "data", trained + math.log(value))


def stored_in_16_bit(editor: GradientEditor | SERACEditor) -> nn.Module:
    """Return the part of an editor that is stored in fp16; statistics and η stay in fp32."""
    return editor if isinstance(editor, SERACEditor) else editor.hypernetworks


@contextmanager
def in_16_bit(editor: GradientEditor | SERACEditor) -> Iterator[None]:
    """Hold most of an editor in fp16, such as while it is saved."""
    halved = stored_in_16_bit(editor)
    halved.half()
    try:
        yield
    finally:
        halved.float()


def save_in_16_bit(editor: GradientEditor | SERACEditor, folder: str | Path) -> None:
    """Save an editor, most of it in fp16."""
    with in_16_bit(editor):
        editor.save_pretrained(folder)
