"""What the tasks of this folder call; lm-eval loads this file by its path."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from ibke_hf.delivery.tasks import questions


def reliability(**_: Any) -> DatasetDict:
    """Return the edited facts themselves."""
    return _test(questions.questions("reliability"))


def generality(**_: Any) -> DatasetDict:
    """Return the facts in other words, and what follows from them."""
    return _test(questions.questions("generality"))


def locality(**_: Any) -> DatasetDict:
    """Return what an edit must not change."""
    return _test(questions.questions("locality"))


def common_facts(**_: Any) -> DatasetDict:
    """Return facts to choose the object of."""
    return _test(questions.common_facts())


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Judge the generated text of a question."""
    return {"said": float(questions.said(doc, results[0]))}


def _test(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})
