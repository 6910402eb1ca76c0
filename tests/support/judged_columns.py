"""Columns that the edit_quality metric takes."""

from __future__ import annotations

GOOD = {
    "predictions": [[[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]], [[1], [2]]],
    "references": [[3, 8], [1, 9]],
    "role": ["generality", "reliability"],
    "criterion": ["Rephrase, Multi-Hop", ""],
    "top_k": [5, 1],
}
