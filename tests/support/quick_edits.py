"""A low-rank edit that works, made in a few steps on its own factors, without an editor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ibke_hf.core.edit_values import describe
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import dimensions, layers_to_edit, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import IGNORED, encode_requests


def quick_edit(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    *,
    rank: int = 2,
    steps: int = 12,
    size: float = 0.1,
) -> LowRankEdit:
    """Descend on the targets' loss with Adam, the inner factors drawn and the outer ones from zero."""
    template, chosen = layers_to_edit(model, layers)
    modules = modules_to_edit(model, [template.format(i=layer) for layer in chosen])
    generator = torch.Generator().manual_seed(0)
    widths = {name: dimensions(module) for name, module in modules.items()}
    inputs = {
        name: torch.randn(1, rank, width[0], generator=generator).div(width[0] ** 0.5).requires_grad_()
        for name, width in widths.items()
    }
    outputs = {name: torch.zeros(1, rank, width[1], requires_grad=True) for name, width in widths.items()}
    edit = LowRankEdit(inputs, outputs, describe(model, modules, requests, editor="quick"))
    batch = encode_requests(tokenizer, requests)
    optimizer = torch.optim.Adam([*inputs.values(), *outputs.values()], lr=size)
    for _ in range(steps):
        with edit.attached(model):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward(inputs=[*inputs.values(), *outputs.values()])
        optimizer.step()
    return replace(
        edit,
        inputs={name: factor.detach() for name, factor in inputs.items()},
        outputs={name: factor.detach() for name, factor in outputs.items()},
    )
