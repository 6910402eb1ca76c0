"""Requests in front of the prompt: the true ones, those that a router finds, and what an evaluation makes of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from routed_world import REQUESTS, UNRELATED, prompt_vectors, routed_world

from ibke_hf.core.records import PLAIN, EditCase, EditRecord, EditRequest, Hop
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.lifelong.context import ContextEdit, ContextEditor
from ibke_hf.lifelong.routed import RoutedEditor

HOP = Hop("Rome lies on", "the river", "Rome", "lies", "river")


@pytest.fixture
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    return routed_world(tiny_model("qwen3"), tiny_tokenizer)


def in_front(world: SimpleNamespace, edit: ContextEdit, prompts: list[str], own: Any) -> list[str]:
    asked = [(prompt, PLAIN) for prompt in prompts]
    return edit.in_front(world.model, world.tokenizer, asked, [0] * len(prompts), own)


def test_the_true_request_stands_in_front_with_what_came_on_top(world: SimpleNamespace) -> None:
    edit = ContextEditor().edit(world.model, world.tokenizer, REQUESTS)
    own = [REQUESTS[:1], REQUESTS[2:]]
    assert in_front(world, edit, ["Paris?", "Oak?"], own) == [
        "The capital of France is Rome. Paris?",
        "An oak is metal. Oak?",
    ]
    more = ContextEditor().edit(world.model, world.tokenizer, [HOP.request()], mode="sequential", previous=edit)
    assert in_front(world, more, ["Paris?"], own[:1]) == [
        "The capital of France is Rome. Rome lies on the river. Paris?"
    ]
    assert more.nbytes > edit.nbytes > 0 and len(edit) == 1


def test_a_router_puts_the_nearest_in_front_and_nothing_before_the_others(world: SimpleNamespace) -> None:
    prompts = [REQUESTS[1].prompt, UNRELATED]
    vectors = prompt_vectors(world.model, world.tokenizer, world.router, [request.prompt for request in REQUESTS])
    edit = ContextEdit(REQUESTS, ((0, 1, 2),), world.router, vectors)
    nothing: Any = [(), ()]
    assert in_front(world, edit, prompts, nothing) == [
        f"{REQUESTS[1].prompt} Lisbon in Europe. {REQUESTS[1].prompt}",
        UNRELATED,
    ]
    without = ContextEdit(REQUESTS, ((0, 2),), world.router, vectors)
    assert in_front(world, without, prompts, nothing) == prompts


def test_an_evaluation_scores_routed_edits_and_requests_in_front(world: SimpleNamespace) -> None:
    records = [
        EditRecord(
            str(place),
            "toy",
            "",
            (EditRequest(request.prompt, request.target),),
            (EditCase(f"{request.prompt} now", request.target, hops=2, supporting=(HOP,)),),
            (EditCase(UNRELATED, "the river"),),
        )
        for place, request in enumerate(REQUESTS)
    ]
    editors = (RoutedEditor(world.editor, world.router), ContextEditor(), ContextEditor(world.router))
    for number in (1, 3):
        for editor in editors:
            found = evaluate_records(editor, world.model, world.tokenizer, records, sequential=number, progress=False)
            assert len(found.rows) == 9 and [row["prompt"] for row in found.rows[:2]] == [
                REQUESTS[0].prompt,
                f"{REQUESTS[0].prompt} now",
            ]
            if editor is not editors[1]:  # no request is near enough to the unrelated prompt to change it
                assert found.summary["locality"] == 100
