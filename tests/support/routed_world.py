"""A router that knows prompts word for word, and the edits that it routes them to: exact, and without a training."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from small_editors import make_editor
from torch import Tensor

from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_prompt, pad_and_label
from ibke_hf.lifelong.reading import read_states
from ibke_hf.lifelong.routed import RoutedEdit
from ibke_hf.lifelong.router import Router

REQUESTS = (
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditRequest("An oak is", "metal"),
)
UNRELATED = "Berlin lies on"
NEAR = 0.9995  # a cosine that equal prompts have, however they are padded, and no others do


def prompt_vectors(model: Any, tokenizer: Any, router: Router, prompts: Sequence[str]) -> Tensor:
    """What the router makes of prompts, each read alone."""
    rows = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        states, mask = read_states(model, router.sources, pad_and_label([([*ids, 0], len(ids))]))
        with torch.no_grad():
            rows.append(router(states, mask)[0])
    return torch.stack(rows)


def routed_world(model: Any, tokenizer: Any, requests: Sequence[EditRequest] = REQUESTS) -> SimpleNamespace:
    """Model, tokenizer, router, single edits of the requests, and the routed edit of all of them."""
    editor = make_editor(model, tokenizer, composition="solve")
    torch.manual_seed(0)
    router = Router.for_backbone(model, editor.config.module_names(), width=16, heads=2, dim=16, threshold=NEAR).eval()
    edits: list[LowRankEdit] = list(editor.edit(model, tokenizer, requests, mode="independent"))
    vectors = prompt_vectors(model, tokenizer, router, [request.prompt for request in requests])
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        editor=editor,
        router=router,
        requests=tuple(requests),
        edits=edits,
        routed=RoutedEdit.of(edits, vectors, router),
    )
