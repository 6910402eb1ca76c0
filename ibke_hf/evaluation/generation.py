"""Greedy answers of a model in batches of which each row may carry its own edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..core.forward import padding_of
from ..core.layers import input_device
from ..core.records import PLAIN, PromptFormat
from ..core.tokens import context_length, encode_prompt, pad_and_label

MORE_TOKENS = 3  # generated beyond the target's length, so that a longer word is told from the target
Attach = Callable[[Any, Sequence[int]], AbstractContextManager[Any]]


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[int, tuple[str, int]],
    batch_size: int,
    attach: Attach,
    formats: Mapping[int, PromptFormat] | None = None,
) -> dict[int, str]:
    """Continue prompts greedily, up to target length + 3 tokens each.

    Prompts with targets of similar length share a batch; each answer is cut to its own length, so that the batch it is
    in does not matter. Of a model that reads padding as text, prompts of one length share a batch.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer; a missing pad token is no obstacle.
        asked: Prompt and number of target tokens of each question, by index.
        batch_size: Rows of a batch.
        attach: Called with the model and the questions of a batch; edits the model for them.
        formats: How the prompts are put to the model, by index; plain where none is given.
    """
    formats = formats or {}
    prompts = {i: encode_prompt(tokenizer, prompt, formats.get(i, PLAIN)) for i, (prompt, _) in asked.items()}
    texts: dict[int, str] = {}
    for members in _batches(model, asked, prompts, batch_size):
        budgets = [asked[i][1] + MORE_TOKENS for i in members]
        with attach(model, members):
            generated = _generate(model, tokenizer, [prompts[i] for i in members], max(budgets))
        for i, ids, budget in zip(members, generated, budgets, strict=True):
            texts[i] = str(tokenizer.decode(ids[:budget], skip_special_tokens=True))
    return texts


def _batches(
    model: Any, asked: Mapping[int, tuple[str, int]], prompts: Mapping[int, Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Yield questions that are answered together: with targets of similar length, or with prompts of one length."""
    order = sorted(asked, key=lambda i: (asked[i][1], len(prompts[i])))
    if padding_of(model) == "left":
        groups = [order]
    else:
        lengths = sorted({len(prompts[i]) for i in order})
        groups = [[i for i in order if len(prompts[i]) == length] for length in lengths]
    for group in groups:
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], new_tokens: int
) -> list[list[int]]:
    """Greedy continuations of left-padded prompts, whatever sampling the model's own generation config asks for."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = pad_and_label([([*ids, pad], len(ids)) for ids in prompts], pad=pad).to(input_device(model))
    limit = context_length(model)
    if limit is not None:
        new_tokens = min(new_tokens, limit - batch.input_ids.shape[1] + 1)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
    )
    with torch.no_grad():
        ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
    return ids[:, batch.input_ids.shape[1] :].tolist()  # type: ignore[no-any-return]
