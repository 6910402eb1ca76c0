"""What the tests of ROME and AlphaEdit share: requests, a model that ROME edits with ease, and whether it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ibke_hf.core.capture import target_logits
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_requests
from ibke_hf.editors.locate.key_statistics import KeyStatistics
from ibke_hf.editors.rome import ROMEEditor

# short ways from the subject to the target, of one token each: random models pass little on from token to token
REQUESTS = (
    EditRequest("The capital of France", "is", "France"),
    EditRequest("In physics, Marie Curie", "the", "Marie Curie"),
    EditRequest("An oak", "and", "oak"),
)
TEXTS = [
    f"{name} {what} {place}."
    for name in ("Paris", "Marie Curie", "A sparrow", "The author", "iron")
    for what in ("is in", "was born in", "lies on", "wrote", "of")
    for place in ("France", "a tree", "Europe")
]


def setting(
    tiny_model: Callable[..., Any], tokenizer: Any, family: str = "qwen3", **config: Any
) -> tuple[Any, ROMEEditor]:
    """A model that edits are easy in, with an editor of its second layer."""
    model = tiny_model(family, initializer_range=0.15)
    statistics = KeyStatistics.of(model, tokenizer, TEXTS, [1], progress=False)
    settings = {
        "prefixes": 2,
        "prefix_tokens": (2, 4),
        "prefix_source": "corpus",
        "clamp": 50.0,
        "steps": 30,
        "kl_factor": 0.0,
    }
    return model, ROMEEditor.for_backbone(model, statistics=statistics, **{**settings, **config})


def hits(model: Any, tokenizer: Any, edit: Any, requests: Any = REQUESTS) -> list[bool]:
    """Whether every target token is the top prediction, for each request."""
    with torch.no_grad(), edit.attached(model):
        logits, labels = target_logits(model, encode_requests(tokenizer, requests))
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).tolist()
