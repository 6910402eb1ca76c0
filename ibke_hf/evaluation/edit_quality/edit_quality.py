"""``edit_quality``: reliability, generality and locality of knowledge edits, from predictions and reference ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from ibke_hf.evaluation.scores import CASES, ROLES, TEACHER_FORCED, case_scores, ranks_among, summarise

COLUMNS = ("predictions", "references", "role", "criterion", "top_k")
RETURNED = (*TEACHER_FORCED, "first_token")
CELLS = ("score", "top1", "cases")
DEFAULT_TOP_K = {"reliability": 1, "generality": 5, "locality": 5}

DESCRIPTION = """\
Scores edits of facts in language models, teacher-forced, in percent. A target token is a hit if it is among the
first `top_k` predictions at its position. Reliability is the mean over edit requests of the fraction of their
target tokens that are hits, generality the same over cases that should follow from the edit, locality over cases
that should not move, whose references are what the unedited model predicts. F1 is the harmonic mean of generality
and locality, avg the mean of those of the three that there are."""
INPUTS = """
Args:
    predictions: For each case and each of its target tokens the predicted ids, best first, at least `top_k` of them.
    references: For each case the ids of its target tokens (locality: the top-1 ids of the unedited model).
    role: `reliability`, `generality` or `locality`.
    criterion: What the case tests, such as `Rephrase`; several by commas or as a list, `""` or None for none.
    top_k: Predictions that count; None: 1 for reliability, 5 for the other roles. PROTOCOL: 1 for Yes/No cases.
Returns:
    reliability, generality_top1, locality_top1, generality, locality, avg, f1, first_token (of generality), in
    percent, None where there is no such case; by_criterion: for generality and locality the top1, score and number of
    cases of each criterion. The names without _top1 count the first `top_k` predictions.
"""


class EditQuality(evaluate.Metric):
    """Checks columns of ids and hands them to the formulas of :mod:`ibke_hf.evaluation.scores`."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.List(datasets.Value("int64"))
        features = {
            "predictions": datasets.List(ids),
            "references": ids,
            "role": datasets.Value("string"),
            "criterion": datasets.Value("string"),
            "top_k": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """Add cases, see the class's ``inputs_description``.

        Raises:
            ValueError: If there is no case, a column is longer than another, or a case cannot be scored; names the
                case.
        """
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"edit_quality has no column {unknown[0]!r}; its columns are {', '.join(COLUMNS)}")
        super().add_batch(**_checked({"predictions": predictions, "references": references, **columns}))

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Add one case, see :meth:`add_batch`."""
        self.add_batch(
            predictions=[prediction], references=[reference], **{name: [value] for name, value in columns.items()}
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> dict[str, Any] | None:
        """Score the cases that are given here and those added before.

        Raises:
            ValueError: If there is no case at all, or one cannot be scored.
        """
        columns |= {"predictions": predictions, "references": references}
        if any(values is not None for values in columns.values()):
            self.add_batch(**columns)
        elif not len(self):
            raise ValueError("edit_quality was given no case; pass predictions, references and role of at least one")
        result: dict[str, Any] | None = super().compute()
        return result

    def _compute(self, **columns: Any) -> dict[str, Any]:
        cases = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        summary = summarise([_row(str(i), case) for i, case in enumerate(cases)])
        cells = {role: summary["by_criterion"][role].items() for role in CASES}
        by_criterion = {
            role: {name: {key: cell[key] for key in CELLS} for name, cell in named} for role, named in cells.items()
        }
        return {**{name: summary[name] for name in RETURNED}, "by_criterion": by_criterion}


def _row(name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the formulas know of a case: one list of cases for each role."""
    ranks = ranks_among(case["predictions"], case["references"])
    criteria = [part.strip() for part in case["criterion"].split(",") if part.strip()]
    return {
        "record": name,
        "dataset": "",
        "domain": "",
        "role": case["role"],
        "list": case["role"],
        "criteria": criteria,
        "hops": 1,
        **case_scores(ranks < case["top_k"], ranks < 1),
        "exact_match": None,
        "js_similarity": None,
    }


def _checked(columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return all columns in one form, after refusing what cannot be scored."""
    for name in ("predictions", "references", "role"):
        if columns.get(name) is None:
            raise ValueError(f"edit_quality needs the column {name}; predictions, references and role have no default")
    number = len(columns["predictions"])
    if not number:
        raise ValueError("edit_quality was given no case; pass predictions, references and role of at least one")
    filled = {name: columns[name] if columns.get(name) is not None else [None] * number for name in COLUMNS}
    for name, values in filled.items():
        if not hasattr(values, "__len__"):
            raise ValueError(f"edit_quality: the column {name} has one value a case, found {values!r}")
        if len(values) != number:
            raise ValueError(
                f"edit_quality: {number} predictions but {len(values)} values of {name}; every column has one "
                f"value a case"
            )
    cases = [_case(i, *values) for i, values in enumerate(zip(*filled.values(), strict=True))]
    return {name: [case[name] for case in cases] for name in COLUMNS}


def _case(index: int, predictions: Any, references: Any, role: Any, criterion: Any, top_k: Any) -> dict[str, Any]:
    if role not in ROLES:
        raise ValueError(f"case {index}: role must be one of {', '.join(ROLES)}, found {role!r}")
    top_k = DEFAULT_TOP_K[role] if top_k is None else int(top_k)
    best, references = [_ids(index, ids) for ids in predictions], _ids(index, references)
    if top_k < 1:
        raise ValueError(f"case {index}: top_k must be at least 1, found {top_k}")
    if not references:
        raise ValueError(f"case {index}: no reference id; a case has at least one target token")
    if len(best) != len(references):
        raise ValueError(
            f"case {index}: predictions for {len(best)} target tokens but {len(references)} reference ids; "
            f"give as many"
        )
    for token, ids in enumerate(best):
        if len(ids) < top_k:
            few = f"{len(ids)} predicted ids make no top {top_k}; give at least {top_k}, or a smaller top_k"
            raise ValueError(f"case {index}, target token {token}: {few}")
    criteria = criterion if isinstance(criterion, str) else ", ".join(criterion or ())
    return {"predictions": best, "references": references, "role": role, "criterion": criteria, "top_k": top_k}


def _ids(index: int, values: Any) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or not all(isinstance(value, int) for value in values)
    ):
        raise ValueError(f"case {index}: a list of token ids is wanted, found {values!r:.80}")
    return list(values)
