"""What a library costs is measured in one run, with what it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from small_editors import make_editor

from ibke_hf.benchmark.library_speed import library_ratios


def test_each_ratio_says_what_it_is_of(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    rows = library_ratios(model, tiny_tokenizer, make_editor(model, tiny_tokenizer), edits=5000)
    assert [set(row) for row in rows] == [{"name", "shape", "ours", "reference", "unit", "ratio"}] * 3
    assert all(row["ratio"] == row["ours"] / row["reference"] > 0 for row in rows)
    assert [row["unit"] for row in rows] == ["CPU s", "CPU s", "bytes"]
    assert [row["name"] for row in rows] == ["library_find", "library_add", "library_row_memory"]
    assert len(library_ratios(model, tiny_tokenizer, edits=10)) == 1
