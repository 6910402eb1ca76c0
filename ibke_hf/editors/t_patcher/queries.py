"""What reaches the patched FFN: of requests, and of the texts that patches must stay silent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import hooked
from ...core.capture import require_finite, target_logits
from ...core.tokens import (
    TokenBatch,
    context_length,
    pad_and_label,
)

SAMPLED_TEXTS, SAMPLED_LENGTH = 64, 32  # what the model writes itself where no memory is given


def sampled_texts(model: Any) -> list[list[int]]:
    """Let the model write texts of its own, each from a random token on, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.get_text_config().vocab_size, (SAMPLED_TEXTS, 1), generator=generator)
    for _ in range(min(SAMPLED_LENGTH, context_length(model) or SAMPLED_LENGTH) - 1):
        with torch.no_grad():
            logits = target_logits(model, prompts(texts.tolist()))[0][:, -1].float().cpu()
        require_finite(logits.sum(-1), "the model's prediction", [f"its own text {k}" for k in range(SAMPLED_TEXTS)])
        texts = torch.cat([texts, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return texts.tolist()  # type: ignore[no-any-return]


def prompts(texts: Sequence[Sequence[int]]) -> TokenBatch:
    """Pad texts of which every token is fed; the label, which nobody reads, keeps the last column's logits."""
    return pad_and_label([([*ids, 0], len(ids)) for ids in texts])


def run(model: Any, ffn: Mapping[str, nn.Module], batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return input (b, l, d) and output (b, l, d_out) of the FFN, fp32, and the logits where labels are."""
    seen: dict[str, Tensor] = {}

    def record(x: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x, y=y)
        return y

    with torch.no_grad(), hooked(ffn, dict.fromkeys(ffn, record)):
        logits = target_logits(model, batch)[0]
    x, y = (seen[part].float().reshape(*batch.labels.shape, -1) for part in "xy")
    return x, y, logits
