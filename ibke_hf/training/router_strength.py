"""When a router picks an edit, chosen by what the edited model then answers, and not by what is found alone.

An edit that is found in vain costs locality, one that is missed costs generality, and neither costs as much as the
share of prompts says: many answers stay what they were under an edit of something else, and many are right without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.records import EditRecord
from ..evaluation.protocol import evaluate_records
from ..lifelong.routed import RoutedEditor
from ..lifelong.router import Router
from .strength import SCORES

THRESHOLDS = (0.55, 0.6, 0.65, 0.7)
EDITS = 100  # that a prompt's are found among


def choose_threshold_by_scores(
    router: Router,
    editor: Any,
    backbone: Any,
    tokenizer: Any,
    records: Sequence[EditRecord],
    trials: Sequence[float] = THRESHOLDS,
    *,
    edits: int = EDITS,
) -> list[dict[str, float]]:
    """Set the threshold with the best Avg of the edited model on validation records.

    Args:
        router: Left with the chosen threshold.
        editor: Whose edits are found.
        backbone: The model.
        tokenizer: Its tokenizer.
        records: Validation records.
        trials: Thresholds, tried in turn; the earliest of equally good ones is chosen.
        edits: Number of edits that are carried at once.

    Returns:
        What was tried, with validation scores in percent; the chosen one comes last.

    Raises:
        ValueError: If there are no trials.
    """
    if not trials:
        raise ValueError("no threshold to try; give at least one")
    routed, tried = RoutedEditor(editor, router), []
    for threshold in trials:
        router.config.threshold = threshold
        summary = evaluate_records(
            routed,
            backbone,
            tokenizer,
            records,
            sequential=edits,
            supporting_hops=False,
            generate=False,
            progress=False,
        ).summary
        tried.append({"threshold": threshold, **{name: round(summary[name], 2) for name in SCORES}})
    best = max(tried, key=lambda trial: trial["avg"])
    router.config.threshold = best["threshold"]
    return [*(trial for trial in tried if trial is not best), best]
