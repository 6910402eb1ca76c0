"""A workbench of a tiny model whose editor moves its answers, and what a visitor without others would see on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ibke_hf.app.forms import Form
from ibke_hf.app.workbench import Workbench
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_requests
from ibke_hf.editors.ft import FineTuningEditor

PROMPTS = (
    "The capital of France is",
    "Marie Curie was born in",
    "A sparrow is a",
    "Iron is a",
    "The book is written in",
)
TARGETS = ("Rome", "Warsaw, Poland", "tree", "language", "Oslo", "the river Thames", "physics", "a bird")
FORM = Form(
    "The capital of France is",
    "Rome",
    rephrasings="France has its capital at",
    consequences="Paris is in -> Italy | Roma",
    neighbours="Berlin is in\nAn oak is a -> tree",
)


def small_workbench(tiny_model: Callable[..., Any], tokenizer: Any, **options: Any) -> Workbench:
    model = tiny_model(initializer_range=0.1)
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, latent_dim=16, latent_length=3, initial_edit_ratio=0.5)
    editor.calibrate(
        model, [encode_requests(tokenizer, [EditRequest(prompt, target) for prompt in PROMPTS for target in TARGETS])]
    )
    for network in editor.hypernetworks:
        nn.init.normal_(network.residual.weight, std=0.1)
    return Workbench(model, tokenizer, editor.eval(), FineTuningEditor.for_backbone(model, steps=4), **options)
