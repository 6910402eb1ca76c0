"""What a model answers: the most probable next tokens of a prompt."""

from __future__ import annotations

from typing import Any

import torch

from ..core.layers import input_device
from ..core.records import PLAIN, PromptFormat
from ..core.tokens import RequestError, encode_prompt


@torch.no_grad()
def top_predictions(
    model: Any, tokenizer: Any, prompt: str, k: int = 5, prompt_format: PromptFormat = PLAIN
) -> list[tuple[str, float]]:
    """Return the k most probable next tokens with their probabilities, attached edits included."""
    if not prompt.strip():
        raise RequestError("the prompt is empty; give it at least one word")
    ids = torch.tensor([encode_prompt(tokenizer, prompt, prompt_format)], device=input_device(model))
    probabilities = model(input_ids=ids).logits[0, -1].float().softmax(-1)
    values, indices = probabilities.topk(min(k, len(probabilities)))
    return [(tokenizer.decode([index]), value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 16, prompt_format: PromptFormat = PLAIN
) -> str:
    """Return the greedy continuation of a prompt, up to the end-of-text token."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt, prompt_format)], device=input_device(model))
    mask = torch.ones_like(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generated = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)).strip()
