"""Rows of an evaluation -> one HTML file to look at them: no network, no server, readable on a phone.

The look and the behaviour are in ``page.html``; this module puts the data into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "__DATA__"
COLUMNS = (
    "record",
    "domain",
    "kind",
    "role",
    "list",
    "criteria",
    "hops",
    "prompt",
    "target",
    "before",
    "after",
    "generated",
    "answer_before",
    "answer",
    "score",
    "top1",
    "exact_match",
    "answered",
    "js_similarity",
    "edited_hops",
)


def write_page(rows: Iterable[Mapping[str, Any]], results: Mapping[str, Any], file: str | Path) -> None:
    """Write the page.

    Args:
        rows: Of :func:`~ibke_hf.evaluation.protocol.evaluate_records`.
        results: Of :func:`~ibke_hf.evaluation.results.results_of`.
        file: Where to write it.
    """
    Path(file).write_text(render_page(rows, results), encoding="utf-8")


def render_page(rows: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Return the HTML text of the page, see :func:`write_page`.

    Rows are embedded as JSON, columns named once; the page writes every text as text, never as HTML.
    """
    data = {
        "results": results,
        "columns": COLUMNS,
        "rows": [[_short(row.get(name)) for name in COLUMNS] for row in rows],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # or a prompt could end the script
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates make browsers fail
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
