"""A router that is trained finds the edits of prompts; it can be cut and gone on with, and says what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_editors import make_editor

from ibke_hf.core.records import EditCase, EditRecord, EditRequest, Hop
from ibke_hf.lifelong.routed import RoutedEditor
from ibke_hf.lifelong.router import Router
from ibke_hf.training.router import RouterTrainer, RouterTraining, train_router
from ibke_hf.training.router_batches import NONE, RouterBatches, routed_records
from ibke_hf.training.router_strength import choose_threshold_by_scores

LAYERS = ["model.layers.2.mlp.down_proj"]
CITIES = ["Paris", "London", "Berlin", "Rome", "Madrid", "Lisbon", "Vienna", "Oslo"]
SMALL = RouterTraining(steps=60, records=8, candidates=0, save_steps=30, width=32, dim=32, heads=2, learning_rate=5e-3)


def hop(city: str, relation: str, tail: str) -> Hop:
    return Hop(f"{city} {relation}", tail, city, relation, tail, subject=city)


def record(city: str) -> EditRecord:
    edit = hop(city, "lies on", "Thames")
    return EditRecord(
        city,
        "toy",
        "places",
        (EditRequest(f"{city} lies on", "Thames", city),),
        (EditCase(f"The river of {city} is", "Thames", facts=(edit,)),),
        (EditCase(f"The author of {city} wrote", "Yes", facts=(hop(city, "wrote", "Yes"),)),),
        (edit,),
        relation="lies on",
    )


RECORDS = [record(city) for city in CITIES]


def test_training_learns_to_route_and_goes_on_where_it_was_cut(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = train_router(model, tiny_tokenizer, LAYERS, RECORDS, RECORDS, tmp_path / "one", SMALL, progress=False)
    assert report["found"]["request"] >= 75 and report["found"]["none"] >= 75
    router = Router.from_pretrained(tmp_path / "one")
    assert router.config.threshold == report["threshold"]
    assert (tmp_path / "one" / "log.json").exists() and not (tmp_path / "one" / "checkpoints").exists()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    class Cut(Exception):
        pass

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= 40:
            raise Cut
        return original(self, *args, **kwargs)

    original = RouterTrainer.compute_loss
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(RouterTrainer, "compute_loss", cut)
        train_router(model, tiny_tokenizer, LAYERS, RECORDS, RECORDS, tmp_path / "two", SMALL, progress=False)
    train_router(model, tiny_tokenizer, LAYERS, RECORDS, RECORDS, tmp_path / "two", SMALL, resume=True, progress=False)
    other = Router.from_pretrained(tmp_path / "two")
    for name, tensor in router.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-2, atol=1e-2)


def test_batches_hold_one_edit_a_fact_and_ignore_what_is_neither_right_nor_wrong(tiny_tokenizer: Any) -> None:
    crossing = EditCase(
        "Paris or London", "Thames", hops=2, facts=(hop("Paris", "lies on", "Thames"), *RECORDS[1].edits)
    )
    records = [*RECORDS, EditRecord("x", "toy", "", RECORDS[0].requests, (crossing,), (), RECORDS[0].edits)]
    routed = routed_records(tiny_tokenizer, records)
    batches = RouterBatches(routed, 20, 8, seed=3)
    assert torch.equal(batches[3].prompts.input_ids, RouterBatches(routed, 20, 8, seed=3)[3].prompts.input_ids)
    for batch in (batches[i] for i in range(20)):
        assert len({tuple(row) for row in batch.requests.input_ids.tolist()}) == len(batch.requests) <= 8
        rows = batch.owner != NONE
        assert not batch.ignored[rows, batch.owner[rows]].any()
    assert any(batches[i].ignored.any() for i in range(20))


def test_some_prompts_stand_without_their_request_beside_requests_that_are_like_it(tiny_tokenizer: Any) -> None:
    routed = routed_records(tiny_tokenizer, RECORDS)
    batches, absent, present = RouterBatches(routed, 20, 8, seed=1), 0, 0
    for batch in (batches[i] for i in range(20)):
        requests = [tuple(row[row != 0].tolist()) for row in batch.requests.input_ids]
        for prompt, owner, ignored in zip(batch.prompts.input_ids, batch.owner, batch.ignored, strict=True):
            asked = tuple(prompt[prompt != 0].tolist())
            mine = [place for place, request in enumerate(requests) if request[: len(asked) - 1] == asked[:-1]]
            if len(mine) == 1:  # the prompt of a request itself
                present += int(owner == mine[0])
                absent += int(owner == NONE and bool(ignored[mine[0]]))
    assert present > absent > 0


def test_the_threshold_is_that_of_the_best_scores(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    torch.manual_seed(0)
    router = Router.for_backbone(model, editor.config.module_names(), width=16, heads=2, dim=16).eval()
    trials = choose_threshold_by_scores(router, editor, model, tiny_tokenizer, RECORDS, (1.0, -1.0), edits=4)
    assert {trial["threshold"] for trial in trials} == {1.0, -1.0}
    assert trials[-1]["avg"] == max(trial["avg"] for trial in trials)
    assert router.config.threshold == trials[-1]["threshold"]
    never = next(trial for trial in trials if trial["threshold"] == 1.0)
    assert never["locality"] == 100  # nothing is picked, so nothing changes
    with pytest.raises(ValueError, match="no threshold to try"):
        choose_threshold_by_scores(router, editor, model, tiny_tokenizer, RECORDS, ())


def test_too_few_records_and_other_backbones_are_refused(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match="1 usable training records are too few"):
        train_router(model, tiny_tokenizer, LAYERS, RECORDS[:1], RECORDS, tmp_path, SMALL)
    router = Router.for_backbone(model, LAYERS, width=8, heads=2, dim=8)
    with pytest.raises(ValueError, match="ibke train-router"):
        router.require_backbone(tiny_model("gpt2"))
    with pytest.raises(ValueError, match="train one for it"):
        router.require_backbone(tiny_model("qwen3", hidden_size=64))
    with pytest.raises(ValueError, match="steps must be between"):
        RouterTraining(steps=0)
    assert RoutedEditor(object(), router).router is router
