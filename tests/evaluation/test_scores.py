"""The formulas of scores, against numbers done by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ibke_hf.evaluation import scores


def test_ranks_break_ties_by_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert [int(scores.token_ranks(logits, torch.tensor([i]))) for i in range(5)] == [4, 0, 1, 3, 2]
    assert scores.top_ids(logits, 4).tolist() == [[1, 2, 4, 3]]
    assert scores.top_ids(logits, 9).tolist() == [[1, 2, 4, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ranks_agree_with_a_stable_sort(dtype):
    torch.manual_seed(0)
    logits = torch.randn(40, 300).to(dtype).round(decimals=1)
    order = logits.float().sort(descending=True, stable=True).indices
    for rank in (0, 1, 4, 5, 299):
        assert torch.equal(scores.token_ranks(logits, order[:, rank]), torch.full((40,), rank))
    assert torch.equal(scores.top_ids(logits, 7), order[:, :7])


def test_nan_logits_score_nothing():
    logits = torch.full((2, 6), math.nan)
    logits[1, 3] = 0.5
    assert (scores.token_ranks(logits, torch.tensor([2, 3])) >= 5).all()
    assert scores.js_similarity(logits, torch.zeros(2, 6)).tolist() == [0, 0]


def test_js_similarity_by_hand():
    one = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).log()
    two = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).log()
    half = 1 - (0.75 * math.log2(1 / 0.75) + 0.25 * 2 - 0.5)  # H(3/4, 1/4) - (H(1) + H(1/2, 1/2)) / 2
    assert scores.js_similarity(one, two).tolist() == pytest.approx([1, 0, half], abs=1e-6)
    same = torch.randn(5, 50)
    assert scores.js_similarity(same, same).tolist() == [1] * 5


def test_f1_and_average():
    assert scores.f1(60, 30) == 40
    assert scores.f1(0, 0) == 0
    assert scores.f1(None, 50) is scores.f1(50, None) is None
    assert scores.average(90, None, 30) == 60
    assert scores.average(None, None, None) is None


def a_row(role, score, top1=0.0, name="a", criteria=(), hops=1, domain="art", record="r", **other):
    return {
        "record": record,
        "dataset": "made",
        "domain": domain,
        "role": role,
        "list": name,
        "criteria": list(criteria),
        "hops": hops,
        "score": score,
        "top1": top1,
        "first_token": top1,
        "exact_match": None,
        "js_similarity": None,
    } | other


def test_summary_by_hand():
    rows = [
        a_row("reliability", 1.0),
        a_row("reliability", 0.5, record="s"),
        a_row("reliability", 0.0, record="s"),
        a_row("generality", 1.0, 1.0, criteria=["Rephrase"], exact_match=True),
        a_row("generality", 0.0, 0.0, criteria=["Multi-Hop"], hops=2, exact_match=False),
        a_row("generality", 0.5, 0.5, criteria=["Multi-Hop", "Rephrase"], hops=3, exact_match=False),
        a_row("generality", 0.25, 0.0, name="b", record="s", domain="food", exact_match=True),
        a_row("locality", 0.5, 0.25, name="loc", js_similarity=0.9),
        a_row("locality", 1.0, 0.75, name="loc", js_similarity=0.7),
    ]
    summary = scores.summarise(rows)
    assert summary["reliability"] == 50
    assert summary["generality"] == pytest.approx((50 + 25) / 2)  # three cases of list a, one of list b
    assert summary["locality"] == 75
    assert summary["f1"] == 50
    assert summary["avg"] == pytest.approx((50 + 37.5 + 75) / 3)
    assert summary["generality_top1"] == summary["first_token"] == 25
    assert summary["locality_top1"] == 50
    assert summary["exact_match"] == pytest.approx((100 / 3 + 100) / 2)
    assert summary["js_similarity"] == pytest.approx(80)
    assert (summary["records"], summary["cases"]) == (2, {"reliability": 3, "generality": 4, "locality": 2})
    assert summary["by_criterion"] == {
        "generality": {
            "Multi-Hop": {"score": 25, "top1": 25, "exact_match": 0, "cases": 2},
            "Rephrase": {"score": 75, "top1": 75, "exact_match": 50, "cases": 2},
        },
        "locality": {},
    }
    assert {hops: cell["cases"] for hops, cell in summary["by_hops"]["generality"].items()} == {"1": 2, "2": 1, "3": 1}
    assert summary["by_hops"]["generality"]["3"]["score"] == 50
    assert summary["by_domain"]["food"]["generality"] == 25
    assert summary["by_domain"]["food"]["reliability"] is None
    assert summary["by_domain"]["art"]["generality"] == 50


def test_summary_of_nothing_is_none_and_json():
    summary = scores.summarise([])
    assert summary["reliability"] is summary["generality"] is summary["f1"] is summary["avg"] is None
    assert summary["records"] == 0
    only = scores.summarise([a_row("reliability", 1.0), a_row("generality", 0.5)])
    assert (only["locality"], only["f1"], only["avg"]) == (None, None, 75)
    json.dumps([summary, only], allow_nan=False)
