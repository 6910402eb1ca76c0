"""What figures measure, against naive references: readings of targets, scale factors, pruning, latents, summaries."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import make_records
from small_editors import REQUESTS, make_editor

from ibke_hf import EditCase, EditRecord, EditRequest
from ibke_hf.analysis.latents import edit_latents, frequent_relations, plane, silhouette
from ibke_hf.analysis.pruning import MEASURES, pruned, pruning_curves
from ibke_hf.analysis.readings import read_targets
from ibke_hf.analysis.scale_factors import gate_statistics, scale_factors, sparsity
from ibke_hf.analysis.summaries import scores_by_combination, scores_of_training
from ibke_hf.core.tokens import encode_requests
from ibke_hf.editors.mend import MENDEditor

CASES = (
    EditRequest("The capital of France is", "Rome"),
    EditCase("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditCase("Oslo is a", "city"),
)


@pytest.fixture(scope="module")
def setup(tiny_model: Any, tiny_tokenizer: Any) -> tuple[Any, Any, Any]:
    model = tiny_model()
    editor = make_editor(model, tiny_tokenizer, initial_edit_ratio=0.5)
    for network in editor.hypernetworks:
        torch.nn.init.normal_(network.gate.weight)  # gates that tell tokens apart
    return model, tiny_tokenizer, editor


def records_of(number: int) -> list[EditRecord]:
    """Records with a request, cases of both roles, and one without any locality case."""
    records = make_records(number, 1, seed=3)
    plain = [
        replace(record, generality=tuple(replace(case, supporting=()) for case in record.generality))
        for record in records
    ]
    return [replace(plain[0], locality=()), *(record for record in plain[1:] if record.locality)]


# --- naive references ---------------------------------------------------------------------------------------------


def with_update(model: Any, edit: Any, row: int) -> Any:
    """Copy a model and add the ΔW of one row of an edit to its weights."""
    changed = copy.deepcopy(model)
    for name in edit.inputs:
        with torch.no_grad():
            changed.get_submodule(name).weight += (edit.inputs[name][row].T @ edit.outputs[name][row]).T
    return changed


def naive_reading(model: Any, tokenizer: Any, case: Any) -> tuple[float, float, bool, torch.Tensor]:
    """One text alone: probability and place of each target token, from full sorts."""
    ids = tokenizer(case.prompt + " " + case.target)["input_ids"]
    start = len(tokenizer(case.prompt)["input_ids"])
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, start - 1 : -1].softmax(-1)
    targets = ids[start:]
    best = probabilities.sort(-1, descending=True).indices.tolist()
    places = [row.index(token) + 1 for row, token in zip(best, targets, strict=True)]
    confidence = sum(float(p[token]) for p, token in zip(probabilities, targets, strict=True)) / len(targets)
    return confidence, sum(places) / len(places), all(place == 1 for place in places), probabilities


def naive_similarity(p: torch.Tensor, q: torch.Tensor) -> float:
    middle = (p + q) / 2
    divergence = ((p * (p / middle).log2()).sum(-1) + (q * (q / middle).log2()).sum(-1)) / 2
    return float((1 - divergence).mean())


# --- readings -----------------------------------------------------------------------------------------------------


def test_readings_are_those_of_each_text_alone_under_its_own_edit(setup: Any) -> None:
    model, tokenizer, editor = setup
    edit = editor.edit(model, tokenizer, REQUESTS[:2], mode="independent")
    rows = [1, 0, 1]
    readings = read_targets(model, tokenizer, CASES, edit, rows, similar=True, batch_size=2)
    for i, (case, row) in enumerate(zip(CASES, rows, strict=True)):
        confidence, rank, first, after = naive_reading(with_update(model, edit, row), tokenizer, case)
        assert float(readings.confidence[i]) == pytest.approx(confidence, abs=1e-5)
        assert float(readings.rank[i]) == pytest.approx(rank)
        assert bool(readings.first[i]) == first
        similarity = naive_similarity(after, naive_reading(model, tokenizer, case)[3])
        assert float(readings.similarity[i]) == pytest.approx(similarity, abs=1e-4)
        assert similarity < 0.999
    unedited = read_targets(model, tokenizer, CASES, similar=True)
    assert unedited.similarity.tolist() == [1, 1, 1]
    assert unedited.confidence.tolist() == pytest.approx(
        [naive_reading(model, tokenizer, c)[0] for c in CASES], abs=1e-5
    )
    assert len(read_targets(model, tokenizer, []).rank) == 0


# --- scale factors ------------------------------------------------------------------------------------------------


def test_sparsity_is_none_of_equal_values_and_one_of_a_single_one() -> None:
    assert sparsity(torch.full((5,), 0.3)) == pytest.approx(0, abs=1e-6)
    assert sparsity(torch.tensor([0.0, 0.7, 0.0])) == pytest.approx(1)
    assert sparsity(torch.tensor([0.2, 0.4])) == sparsity(torch.tensor([0.1, 0.2])) > 0
    assert sparsity(torch.tensor([0.5])) == sparsity(torch.zeros(4)) == 0


def test_statistics_of_scale_factors_are_means_over_requests(setup: Any) -> None:
    model, tokenizer, editor = setup
    found = gate_statistics(editor, model, tokenizer, REQUESTS)
    for name in editor.config.module_names():
        values = [torch.tensor(scale_factors(editor, model, tokenizer, one)["layers"][name]) for one in REQUESTS]
        everything = torch.cat(values).tolist()
        assert found[name]["mean"] == pytest.approx(sum(everything) / len(everything))
        assert found[name]["below_half"] == pytest.approx(sum(v < 0.5 for v in everything) / len(everything))
        assert found[name]["sparsity"] == pytest.approx(sum(map(sparsity, values)) / len(values))
    plain = make_editor(model, tokenizer, use_scale_factor=False)
    assert gate_statistics(plain, model, tokenizer, REQUESTS) is None


# --- pruning ------------------------------------------------------------------------------------------------------


def test_the_smallest_factors_of_each_edit_are_pruned_over_all_layers_and_never_padding() -> None:
    gates = [torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, -9.0]]), torch.tensor([[2.0, -1.0, 7.0], [6.0, 0.5, -9.0]])]
    masks = [torch.tensor([[True, True, True], [True, True, False]])] * 2
    half = pruned(gates, masks, torch.tensor([0, 1]), 0.5)
    assert torch.isinf(half[0]).tolist() == [[True, False, True], [False, True, False]]
    assert torch.isinf(half[1]).tolist() == [[False, True, False], [False, True, False]]
    joint = pruned(gates, masks, torch.tensor([0, 0]), 0.2)  # 2 of 10 factors of one edit of two requests
    assert [torch.isinf(gate).sum().item() for gate in joint] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(pruned(gates, masks, torch.tensor([0, 1]), 0.0), gates, strict=True))
    assert all(not torch.isinf(gate).any() for gate in gates)  # the gates that were given stay


def test_pruning_curves_are_those_of_edits_that_are_pruned_one_by_one(setup: Any) -> None:
    model, tokenizer, editor = setup
    records, fractions = records_of(4), (0.0, 0.4, 1.0)
    curves = pruning_curves(editor, model, tokenizer, records, fractions, batch_size=3)
    assert {*curves.values} == {*MEASURES}
    for i, record in enumerate(records):
        captured = editor.capture(model, encode_requests(tokenizer, record.requests))
        gates = [factors.gates for factors in editor(captured)]
        order = torch.cat(gates, 1).flatten().argsort()
        for k, fraction in enumerate(fractions):
            everything = torch.cat(gates, 1).detach().clone()
            everything[0, order[: round(fraction * len(order))]] = -torch.inf
            parts = everything.split([gate.shape[1] for gate in gates], 1)
            with torch.no_grad():
                edit = editor.as_edit(editor(captured, gates=parts))
            changed = with_update(model, edit, 0)
            for role, cases in (("reliability", record.requests), ("generality", record.generality)):
                naive = [naive_reading(changed, tokenizer, case) for case in cases]
                for place, name in enumerate(("confidence", "rank")):
                    mean = sum(one[place] for one in naive) / len(naive)
                    assert float(curves.values[f"{role}_{name}"][k, i]) == pytest.approx(mean, rel=1e-3, abs=1e-4)
                if role == "reliability" and k == 0:
                    assert bool(curves.successful[i]) == all(one[2] for one in naive)
            similar = [
                naive_similarity(naive_reading(changed, tokenizer, c)[3], naive_reading(model, tokenizer, c)[3])
                for c in record.locality
            ]
            value = float(curves.values["locality_similarity"][k, i])
            assert (value == pytest.approx(sum(similar) / len(similar), abs=1e-3)) if similar else value != value
    assert torch.isnan(curves.values["locality_similarity"][:, 0]).all()
    everyone = torch.ones(len(records), dtype=torch.bool)
    assert curves.means(everyone)["locality_similarity"][2] == pytest.approx(1)  # nothing of the edit is left
    assert curves.means(~everyone)["reliability_rank"] == [None, None, None]


def test_pruning_refuses_what_it_cannot_prune(setup: Any) -> None:
    model, tokenizer, editor = setup
    records = records_of(2)
    with pytest.raises(ValueError, match="no record is given"):
        pruning_curves(editor, model, tokenizer, [])
    with pytest.raises(ValueError, match=r"fractions must be between 0 and 1, found 1\.5"):
        pruning_curves(editor, model, tokenizer, records, (0.5, 1.5))
    with pytest.raises(ValueError, match="has no scale factor to prune"):
        pruning_curves(make_editor(model, tokenizer, use_scale_factor=False), model, tokenizer, records)


# --- latents ------------------------------------------------------------------------------------------------------


def test_latents_are_the_means_of_each_request_alone(setup: Any) -> None:
    model, tokenizer, editor = setup
    latents = edit_latents(editor, model, tokenizer, REQUESTS, batch_size=2)
    for i, request in enumerate(REQUESTS):
        adapted = editor(editor.capture(model, encode_requests(tokenizer, [request])))
        for name, factors in zip(editor.config.module_names(), adapted, strict=True):
            assert torch.allclose(latents.layers[name][i], factors.mean[0].flatten(), atol=1e-4)
        edit = editor.edit(model, tokenizer, [request])
        confidence = naive_reading(with_update(model, edit, 0), tokenizer, request)[0]
        assert float(latents.confidence[i]) == pytest.approx(confidence, abs=1e-4)
    mend = MENDEditor.for_backbone(model, hidden_dim=4)
    with pytest.raises(ValueError, match="a MENDEditor has no latent"):
        edit_latents(mend, model, tokenizer, REQUESTS)


def test_clusters_that_are_apart_score_higher_and_their_map_comes_out_the_same() -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    labels = ["a"] * 6 + ["b"] * 6
    apart = torch.randn(12, 5) + 8 * torch.tensor([0.0] * 6 + [1.0] * 6).unsqueeze(1)
    mixed = torch.randn(12, 5)
    distances = torch.cdist(apart, apart)
    own = torch.tensor(
        [distances[i, [j for j in range(12) if j != i and labels[j] == labels[i]]].mean() for i in range(12)]
    )
    other = torch.tensor([distances[i, [j for j in range(12) if labels[j] != labels[i]]].mean() for i in range(12)])
    naive = float(((other - own) / torch.maximum(own, other)).mean())
    assert silhouette(apart, labels) == pytest.approx(naive, abs=1e-4)
    assert silhouette(mixed, labels) < 0.3 < naive
    assert silhouette(apart, ["a"] * 12) is None
    assert torch.equal(plane(apart), plane(apart))
    assert plane(apart).shape == (12, 2)
    with pytest.raises(ValueError, match="at least four points, found 3"):
        plane(apart[:3])


def test_a_missing_extra_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for need in (lambda: plane(torch.zeros(5, 2)), lambda: silhouette(torch.zeros(5, 2), ["a"] * 5)):
        with pytest.raises(ImportError, match=r'pip install "ibke-hf\[figures\]"'):
            need()


def test_the_most_frequent_relations() -> None:
    records = [replace(record, relation=name) for record, name in zip(make_records(6, 1), "bbaac ", strict=True)]
    records[5] = replace(records[5], relation="")
    assert [record.relation for record in frequent_relations(records, 2)] == ["b", "b", "a", "a"]


# --- summaries ----------------------------------------------------------------------------------------------------


def a_row(role: str, score: float, **fields: Any) -> dict[str, Any]:
    plain = {
        "record": "r",
        "dataset": "d",
        "domain": "film",
        "kind": "unknown",
        "list": role,
        "criteria": [],
        "hops": 1,
    }
    return {**plain, "role": role, "score": score, "top1": score, **fields}


def test_a_training_is_summed_up_whole_and_in_parts() -> None:
    rows = [
        a_row("reliability", 1.0),
        a_row("generality", 0.5, criteria=["Rephrase"]),
        a_row("generality", 1.0, criteria=["Subject Alias", "Multi-Hop"], hops=2),
        a_row(
            "generality", 0.0, criteria=["Multi-Hop", "Subject Alias"], hops=3, domain="music", kind="counterfactual"
        ),
        a_row("reliability", 0.0, domain="music", kind="counterfactual", record="s"),
        a_row("locality", 1.0),
    ]
    summary = scores_of_training(rows, {"music"})
    assert summary["scores"]["generality"] == 50
    assert summary["parts"]["test"]["reliability"] == 100
    assert summary["parts"]["held_out"]["reliability"] == summary["parts"]["counterfactual"]["reliability"] == 0
    assert {*summary["by_domain"]} == {"film", "music"}
    assert summary["by_combination"] == scores_by_combination([row for row in rows if row["role"] == "generality"])
    assert summary["by_combination"]["Multi-Hop + Subject Alias"] == {"score": 50, "top1": 50, "cases": 2}
    assert {hops: part["score"] for hops, part in summary["by_hops"].items()} == {"1": 50, "2": 100, "3": 0}
