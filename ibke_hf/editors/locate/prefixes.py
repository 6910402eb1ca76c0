"""Random texts in front of a prompt, behind which the value that ROME and AlphaEdit search for has to hold too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...core.layers import input_device

if TYPE_CHECKING:
    from .config import LocateConfig


def draw_prefixes(model: Any, tokenizer: Any, config: LocateConfig, openings: Sequence[str]) -> list[str]:
    """Return random texts x_j to put in front of prompts, each ending in ``". "``; fewer if some are empty or alike.

    Raises:
        ValueError: If they are to come from a corpus of which no text was kept.
    """
    if not config.prefixes:
        return []
    generator = torch.Generator().manual_seed(config.seed)
    low, high = config.prefix_tokens
    lengths = torch.randint(low, high + 1, (config.prefixes,), generator=generator).tolist()
    if config.prefix_source == "model":
        rows = _sampled(model, tokenizer, config.prefixes, max(lengths), generator)
    elif openings:
        chosen = torch.randint(len(openings), (config.prefixes,), generator=generator).tolist()
        rows = [tokenizer(openings[i], add_special_tokens=False)["input_ids"] for i in chosen]
    else:
        raise ValueError('the key statistics hold no texts to draw prefixes from; use prefix_source="model"')
    texts = [
        tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        for ids, length in zip(rows, lengths, strict=True)
    ]
    return [f"{text}. " for text in dict.fromkeys(texts) if text]


def _sampled(model: Any, tokenizer: Any, number: int, length: int, generator: torch.Generator) -> list[list[int]]:
    """Sample token ids from the model, from its beginning-of-text token on, without special tokens."""
    begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((number, 1), begin)
    with torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits[:, -1].float().cpu()
            logits[:, [i for i in tokenizer.all_special_ids if i < logits.shape[1]]] = -torch.inf
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    return ids[:, 1:].tolist()
