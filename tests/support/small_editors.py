"""A calibrated IBKE editor of a tiny model, and requests for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_requests

REQUESTS = (
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditRequest("Où est Zürich? 富士山 🏔️ Ответ:", "東京 🗼"),
)


SMALL = {"latent_dim": 16, "latent_length": 3}


def make_editor(model: Any, tokenizer: Any, **config: Any) -> IBKEEditor:
    """A calibrated editor whose adaptation is no longer at its start, so that every part of it matters."""
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, **{**SMALL, **config})
    editor.calibrate(model, [encode_requests(tokenizer, REQUESTS)])
    for network in editor.hypernetworks:
        nn.init.normal_(network.residual.weight, std=0.1)
    return editor.eval()
