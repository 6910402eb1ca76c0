"""Greedy answers of a model in batches of which each row may carry its own edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..core.forward import padding_of
from ..core.layers import input_device
from ..core.prompts import end_of_turn
from ..core.records import PLAIN, PromptFormat
from ..core.tokens import context_length, encode_prompt, pad_and_label

MORE_TOKENS = 3  # generated beyond the target's length, so that a longer word is told from the target
FREE_TOKENS = 32  # of a free answer, at most (PROTOCOL, Free generation)
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

    Args:
        model: See :func:`generate_ids`, as of the others.
        tokenizer: Likewise.
        asked: Prompt and number of target tokens of each question, by index.
        batch_size: Rows of a batch.
        attach: Edits the model for the questions of a batch.
        formats: How the prompts are put to the model.
    """
    budgets = {i: (prompt, tokens + MORE_TOKENS) for i, (prompt, tokens) in asked.items()}
    generated = generate_ids(model, tokenizer, budgets, batch_size, attach, formats)
    return {i: answer_text(tokenizer, ids) for i, ids in generated.items()}


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return generated ids as text, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[int, tuple[str, int]],
    batch_size: int,
    attach: Attach,
    formats: Mapping[int, PromptFormat] | None = None,
) -> dict[int, list[int]]:
    """Continue prompts greedily until the model stops by itself, or at a number of new tokens; return these.

    Questions with similar numbers share a batch; each answer is cut to its own length, and ends before the token that
    ends it (:func:`stop_ids`), so that the batch it is in does not matter. Of a model that reads padding as text,
    prompts of one length share a batch.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer; a missing pad token is no obstacle.
        asked: Prompt and largest number of new tokens of each question, by index; where the model's context ends
            before, so does the answer.
        batch_size: Rows of a batch.
        attach: Called with the model and the questions of a batch; edits the model for them.
        formats: How the prompts are put to the model, by index; plain where none is given.
    """
    formats, limit, stops = formats or {}, context_length(model), stop_ids(model, tokenizer)
    prompts = {i: encode_prompt(tokenizer, prompt, formats.get(i, PLAIN)) for i, (prompt, _) in asked.items()}
    budgets = {i: tokens for i, (_, tokens) in asked.items()}
    if limit is not None:
        budgets = {i: min(tokens, limit - len(prompts[i]) + 1) for i, tokens in budgets.items()}
    answers: dict[int, list[int]] = {}
    for members in _batches(model, budgets, prompts, batch_size, limit):
        with attach(model, members):
            rows = [prompts[i] for i in members]
            generated = _generate(model, tokenizer, rows, max(budgets[i] for i in members), stops)
        for i, ids in zip(members, generated, strict=True):
            kept = ids[: budgets[i]]
            answers[i] = kept[: next((place for place, token in enumerate(kept) if token in stops), len(kept))]
    return answers


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: the model's and the tokenizer's, and what ends a turn of a chat."""
    config = getattr(model, "generation_config", None)
    named = [getattr(part, "eos_token_id", None) for part in (config, model.config, tokenizer)]
    stops = [token for one in (*named, end_of_turn(tokenizer)) for token in (one if isinstance(one, list) else [one])]
    return frozenset(token for token in stops if token is not None)


def _batches(
    model: Any,
    budgets: Mapping[int, int],
    prompts: Mapping[int, Sequence[int]],
    batch_size: int,
    limit: int | None,
) -> Iterator[list[int]]:
    """Yield questions that are answered together: with similar numbers of new tokens, or with prompts of one length.

    The longest prompt and the longest answer of a batch together fit the model's context.
    """
    order = sorted(budgets, key=lambda i: (budgets[i], len(prompts[i])))
    padded = padding_of(model) == "left"
    members: list[int] = []
    for i in order if padded else sorted(order, key=lambda i: len(prompts[i])):
        widths = [len(prompts[other]) for other in (*members, i)]
        apart = not padded and min(widths) < max(widths)
        full = limit is not None and max(widths) + max(budgets[other] for other in (*members, i)) - 1 > limit
        if members and (apart or full or len(members) == batch_size):
            yield members
            members = []
        members = [*members, i]
    if members:
        yield members


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stops: frozenset[int],
) -> list[list[int]]:
    """Greedy continuations of left-padded prompts, whatever sampling the model's own generation config asks for."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = pad_and_label([([*ids, pad], len(ids)) for ids in prompts], pad=pad).to(input_device(model))
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
    )
    with torch.no_grad():
        ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
    return ids[:, batch.input_ids.shape[1] :].tolist()  # type: ignore[no-any-return]
