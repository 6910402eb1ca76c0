"""What one evaluation found, as a table for a terminal: exact match and top 1 first, then the paper's top 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .table_text import number_text, seconds_text
from .tabular import text_table

HEADS = ("", "exact match", "top 1", "in top 5", "cases")
MEANING = (
    "exact match: the model's own greedy answer is the target or an alias. top 1, in top 5: tokens of the target,\n"
    "fed to the model, that are its likeliest, or among its five likeliest (requests, Yes and No: the likeliest), as\n"
    "the paper counts."
)


def score_table(results: Mapping[str, Any]) -> str:
    """Return what ``results.json`` holds as text: scores by role and criterion, what was skipped, an edit's time."""
    overall, cases, settings = results["overall"], results["cases"], results["settings"]
    rows = [
        _row(
            "reliability",
            (overall["reliability_exact_match"], overall["reliability"], overall["reliability"]),
            cases["reliability"],
        )
    ]
    for role, match in (("generality", overall["exact_match"]), ("locality", None)):
        rows.append(_row(role, (match, overall[f"{role}_top1"], overall[role]), cases[role]))
        rows += [
            _row(f"· {name}", (cell["exact_match"], cell["top1"], cell["score"]), cell["cases"])
            for name, cell in results["by_criterion"][role].items()
        ]
    rows += [
        _row(title, values)
        for title, values in (
            ("first token (generality)", (None, overall["first_token"], None)),
            ("JS similarity (locality)", (None, overall["js_similarity"], None)),
            ("F1", (None, None, overall["f1"])),
            ("Average", (None, None, overall["avg"])),
        )
    ]
    lines = [
        f"{settings['editor']} on {settings['dataset']}: {results['records']} records, percent",
        text_table(HEADS, rows),
        MEANING,
        *(f"skipped: {number} × {reason}" for reason, number in results["skipped"].items()),
    ]
    if results["incomplete_group"]:
        requests = f"{results['incomplete_group']} of {settings['sequential']} requests"
        lines.append(f"the last group has {requests}; it is scored, where UniEdit drops it")
    if results["edit_seconds"] is not None:
        at_once, alone = map(seconds_text, (results["edit_seconds"], results.get("edit_seconds_alone")))
        lines.append(f"one edit took {alone} alone, {at_once} of its batch where many were made at once")
    return "\n".join(lines)


def _row(title: str, values: Sequence[float | None], cases: int | None = None) -> list[str]:
    return [title, *map(number_text, values), "" if cases is None else str(cases)]
