"""What one evaluation found, as a table for a terminal: what the model says first, then the paper's top 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..scores import ANSWERED
from .table_text import number_text, seconds_text
from .tabular import text_table

FREE = "free answer"
HEADS = ("", FREE, "exact match", "top 1", "in top 5", "cases")
FREE_MEANING = (
    "free answer: what the model writes until it stops by itself, asked {}, contains the target or an alias as\n"
    "whole words (of locality: is what it wrote before the edit)."
)
MEANING = (
    "exact match: the model's own greedy answer is the target or an alias. top 1, in top 5: tokens of the target,\n"
    "fed to the model, that are its likeliest, or among its five likeliest (requests, Yes and No: the likeliest), as\n"
    "the paper counts."
)


def score_table(results: Mapping[str, Any]) -> str:
    """Return what ``results.json`` holds as text: scores by role and criterion, what was skipped, an edit's time."""
    overall, settings = results["overall"], results["settings"]
    free = any(overall.get(name) is not None for name in ANSWERED)
    heads, rows = list(HEADS), _rows(results)
    if not free:
        heads, rows = [head for head in HEADS if head != FREE], [[row[0], *row[2:]] for row in rows]
    lines = [
        f"{settings['editor']} on {settings['dataset']}: {results['records']} records, percent",
        text_table(heads, rows),
        *([FREE_MEANING.format("in a chat" if settings.get("chat") else "in plain text")] if free else []),
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


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    overall, cases = results["overall"], results["cases"]
    forced = (overall["reliability_exact_match"], overall["reliability"], overall["reliability"])
    rows = [_row("reliability", (overall.get("answered_reliability"), *forced), cases["reliability"])]
    for role, match in (("generality", overall["exact_match"]), ("locality", None)):
        scores = (overall.get(f"answered_{role}"), match, overall[f"{role}_top1"], overall[role])
        rows.append(_row(role, scores, cases[role]))
        for name, cell in results["by_criterion"][role].items():
            scores = (cell.get("answered"), cell["exact_match"], cell["top1"], cell["score"])
            rows.append(_row(f"· {name}", scores, cell["cases"]))
    return rows + [
        _row(title, (None, None, *values))
        for title, values in (
            ("first token (generality)", (overall["first_token"], None)),
            ("JS similarity (locality)", (overall["js_similarity"], None)),
            ("F1", (None, overall["f1"])),
            ("Average", (None, overall["avg"])),
        )
    ]


def _row(title: str, values: Sequence[float | None], cases: int | None = None) -> list[str]:
    return [title, *map(number_text, values), "" if cases is None else str(cases)]
