"""The `evaluate` metric: the same numbers as an evaluation, from package and folder, and clear refusals."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judged_columns import GOOD
from naive import make_records

import ibke_hf.evaluation
from ibke_hf import EditCase, IBKEEditor
from ibke_hf.core.tokens import encode, encode_requests
from ibke_hf.evaluation import load_metric, scores
from ibke_hf.evaluation.protocol import evaluate_records

evaluate = pytest.importorskip("evaluate", reason="the extra eval is not installed")
FOLDER = Path(ibke_hf.evaluation.__file__).parent / "edit_quality"


@pytest.fixture(params=["package", "folder"])
def metric(request, tmp_path, monkeypatch):
    if request.param == "package":
        return load_metric(cache_dir=str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path))


def columns_of(records, editor, model, tokenizer, k=5):
    """Ask one case at a time, without padding, and return the metric's columns."""

    def predict(case):
        ids, start = encode(tokenizer, case.prompt, case.target)
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :]
        return scores.top_ids(logits, k).tolist(), ids[start:]

    columns = {name: [] for name in ("predictions", "references", "role", "criterion", "top_k")}
    for record in records:
        roles = ("reliability", record.requests), ("generality", record.generality), ("locality", record.locality)
        cases = [(role, case) for role, some in roles for case in some]
        before = [predict(case) for _, case in cases]
        with editor.edit(model, tokenizer, record.requests).attached(model):
            after = [predict(case)[0] for _, case in cases]
        for (role, case), (old, target), new in zip(cases, before, after, strict=True):
            reference = [best[0] for best in old] if role == "locality" else target
            values = new, reference, role, *((case.criteria, case.top_k) if isinstance(case, EditCase) else ((), 1))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    return columns


def test_agrees_with_the_summary_of_an_evaluation(metric, tiny_model, tiny_tokenizer):
    model = tiny_model()
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, latent_dim=16, latent_length=3, initial_edit_ratio=0.5)
    editor.calibrate(
        model,
        [encode_requests(tiny_tokenizer, [r for record in make_records(20, 1, seed=7) for r in record.requests])],
    )
    records = [
        replace(record, edits=(), generality=tuple(replace(case, name="gen") for case in record.generality))
        for record in make_records(12, 1)
    ]
    summary = evaluate_records(
        editor, model, tiny_tokenizer, records, supporting_hops=False, generate=False, progress=False
    ).summary
    result = metric.compute(**columns_of(records, editor, model, tiny_tokenizer))
    names = result.keys() - {"by_criterion"}
    assert names >= {"reliability", "generality", "locality", "f1", "avg", "generality_top1", "locality_top1"}
    assert {name: result[name] for name in names} == {name: pytest.approx(summary[name]) for name in names}
    assert 0 < result["generality_top1"] < result["generality"] < 100
    assert 0 < result["locality_top1"] < result["locality"] < 100
    for role in ("generality", "locality"):
        expected = {
            name: {key: cell[key] for key in ("score", "top1", "cases")}
            for name, cell in summary["by_criterion"][role].items()
        }
        assert result["by_criterion"][role] == {name: pytest.approx(cell) for name, cell in expected.items()}


def test_by_hand(metric):
    quality = metric.compute(**GOOD)
    assert quality["reliability"] == 50
    assert quality["generality"] == 100
    assert quality["generality_top1"] == quality["first_token"] == 0
    assert quality["avg"] == 75
    assert quality["locality"] is quality["f1"] is quality["locality_top1"] is None  # no locality case
    cell = {"score": 100, "top1": 0, "cases": 1}
    assert quality["by_criterion"] == {"generality": {"Multi-Hop": cell, "Rephrase": cell}, "locality": {}}
    assert all(type(value) in (float, type(None)) for name, value in quality.items() if name != "by_criterion")


def test_criterion_and_top_k_may_be_missing_and_tensors_are_ids(metric):
    columns = {**GOOD, "references": [torch.tensor([3, 8]), torch.tensor([1, 9])], "criterion": None}
    assert metric.compute(**columns)["generality"] == 100
    del columns["criterion"], columns["top_k"]
    assert metric.compute(**columns)["generality"] == 100
    assert metric.compute(**{**GOOD, "top_k": [1, 1]})["generality"] == 0
    assert metric.compute(**{**GOOD, "criterion": [["Rephrase"], None]})["by_criterion"]["generality"].keys() == {
        "Rephrase"
    }


def test_cases_may_come_one_by_one(metric):
    metric.add(prediction=[[4]], reference=[4], role="reliability")
    metric.add_batch(predictions=[[[5]]], references=[[6]], role=["reliability"])
    assert metric.compute()["reliability"] == 50
    metric.add(prediction=[[4]], reference=[4], role="reliability")
    assert metric.compute(predictions=[[[5]]], references=[[6]], role=["reliability"])["reliability"] == 50
    assert (
        metric.compute(predictions=[[[5]]], references=[[5]], role=["reliability"])["reliability"] == 100
    )  # nothing is left over


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({name: [] for name in GOOD}, "was given no case"),
        (dict.fromkeys(GOOD), "was given no case"),
        ({"role": None}, "needs the column role"),
        ({"references": None}, "needs the column references"),
        ({"references": [[3, 8]]}, "2 predictions but 1 values of references"),
        ({"criterion": ["Rephrase"]}, "2 predictions but 1 values of criterion"),
        ({"top_k": 5}, "the column top_k has one value a case, found 5"),
        (
            {"predictions": [[[1, 2, 3, 4, 5]], [[1], [2]]]},
            "case 0: predictions for 1 target tokens but 2 reference ids",
        ),
        ({"references": [[3, 8], [1]]}, "case 1: predictions for 2 target tokens but 1 reference ids"),
        (
            {"predictions": [[[1, 2, 3, 4, 5], [7, 8]], [[1], [2]]]},
            "case 0, target token 1: 2 predicted ids make no top 5",
        ),
        (
            {"predictions": [[[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]], []], "references": [[3, 8], []]},
            "case 1: no reference id",
        ),
        ({"predictions": [[1, 2], [[1], [2]]]}, "case 0: a list of token ids is wanted, found 1"),
        ({"references": [["yes", "no"], [1, 9]]}, r"case 0: a list of token ids is wanted, found \['yes', 'no'\]"),
        (
            {"role": ["generality", "portability"]},
            "case 1: role must be one of reliability, generality, locality, found 'portability'",
        ),
        ({"top_k": [0, 1]}, "case 0: top_k must be at least 1, found 0"),
        ({"weight": [1, 1]}, "no column 'weight'; its columns are predictions, references, role, criterion, top_k"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, change, what):
    with pytest.raises(ValueError, match=what):
        metric.compute(**{**GOOD, **change})
    assert metric.compute(**GOOD)["reliability"] == 50  # nothing of it is left


def test_metric_describes_itself(metric):
    assert set(metric.features) == set(GOOD)
    assert "Reliability" in metric.description
    assert "by_criterion" in metric.inputs_description


def test_formulas_are_imported_by_one_line():
    """The Space swaps this line for a relative import."""
    source = (FOLDER / "edit_quality.py").read_text(encoding="utf-8")
    ours = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and "ibke_hf" in (node.module or "")
    ]
    assert [node.lineno for node in ours] == [node.end_lineno for node in ours]
    assert [node.module for node in ours] == ["ibke_hf.evaluation.scores"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "ibke_hf.evaluation.edit_quality.edit_quality", raising=False)
    with pytest.raises(
        ImportError, match=r'the edit_quality metric needs the extra "eval": pip install "ibke-hf\[eval\]"'
    ):
        load_metric()


def test_ranks_among_ordered_ids_are_those_among_logits():
    torch.manual_seed(0)
    logits = torch.randn(30, 12).round(decimals=1)
    ids = torch.randint(12, (30,))
    ranks = scores.ranks_among(scores.top_ids(logits, 5).tolist(), ids.tolist())
    assert torch.equal(ranks, scores.token_ranks(logits, ids).clamp(max=5))
