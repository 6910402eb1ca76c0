"""Scale factors σ(W_s s̃) of each token at each edited layer (Eq. 32): what they are, and how sparse (Fig. 7a)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.edit_values import Edit
from ..core.records import EditRequest
from ..core.tokens import IGNORED, context_length, encode_requests


@torch.no_grad()
def scale_factors(
    editor: Any, model: Any, tokenizer: PreTrainedTokenizerBase, request: EditRequest, previous: Edit | None = None
) -> dict[str, Any] | None:
    """Return the scale factor σ(W_s s̃) of each token of a request at each edited layer (Eq. 32), between 0 and 1.

    Args:
        editor: Any editor; one without a scale factor gives None.
        model: The backbone.
        tokenizer: Its tokenizer.
        request: The fact.
        previous: The edit that the model carries already.

    Returns:
        ``tokens``, the l_e texts that were read (the last target token is not); ``judged``, whether the token after
        each is part of the target; ``layers``, l_e values by module name.
    """
    if not hasattr(editor, "capture"):
        return None
    batch = encode_requests(tokenizer, [request], max_length=context_length(model))
    adapted = editor(editor.capture(model, batch, previous))
    if any(factors.gates is None for factors in adapted):
        return None
    values = [torch.sigmoid(factors.gates[0].float()).tolist() for factors in adapted]
    return {
        "tokens": token_texts(tokenizer, batch.input_ids[0].tolist()),
        "judged": (batch.labels[0] != IGNORED).tolist(),
        "layers": dict(zip(editor.config.module_names(), values, strict=True)),
    }


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token; a character that several tokens share stands at the last of them, ``·`` at the others."""
    texts, pending = [], []
    for i in ids:
        pending.append(i)
        text = str(tokenizer.decode(pending))
        whole = not text.endswith("\ufffd")
        texts.append(text if whole else "·")
        pending = [] if whole else pending
    return texts


def sparsity(values: Tensor) -> float:
    """Return how unequal non-negative values are: 0 where all are equal, 1 where one alone is not zero.

    Hoyer's measure, (√n - Σv / √Σv²) / (√n - 1); 0 for a single value or where all are zero.

    Args:
        values: (n,), such as the scale factors of an edit at one layer.
    """
    number, length = values.numel(), float(values.float().norm())
    if number < 2 or not length:
        return 0.0
    return (math.sqrt(number) - float(values.float().sum()) / length) / (math.sqrt(number) - 1)


def gate_statistics(
    editor: Any, model: Any, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> dict[str, dict[str, float]] | None:
    """Summarise the scale factors of many requests, by edited layer.

    Args:
        editor: Any editor; one without a scale factor gives None.
        model: The backbone.
        tokenizer: Its tokenizer.
        requests: The facts.

    Returns:
        By module name ``mean`` of all factors, ``below_half``, the share of them under 0.5, and ``sparsity``, the mean
        over requests of :func:`sparsity`.
    """
    by_layer: dict[str, list[Tensor]] = {}
    for request in requests:
        factors = scale_factors(editor, model, tokenizer, request)
        if factors is None:
            return None
        for name, values in factors["layers"].items():
            by_layer.setdefault(name, []).append(torch.tensor(values))
    return {
        name: {
            "mean": float(torch.cat(values).mean()),
            "below_half": float((torch.cat(values) < 0.5).float().mean()),
            "sparsity": sum(map(sparsity, values)) / len(values),
        }
        for name, values in by_layer.items()
    }
