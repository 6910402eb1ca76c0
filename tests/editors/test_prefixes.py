"""Subjects in prompts, and the random prefixes before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from located_edits import REQUESTS, TEXTS, setting

from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError
from ibke_hf.editors.locate.prefixes import draw_prefixes
from ibke_hf.editors.locate.texts import ask, subject_end


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("Is art part of the art Art Institute has", "Art Institute", "Is art part of the art Art Institute"),
        ("Romeo saw Rome in Romeo", "Rome", "Romeo saw Rome"),
        ("The IRON ore", "iron", "The IRON"),
        ("Paris or Paris", " Paris ", "Paris or Paris"),
        ("a (b)* c", "(b)*", "a (b)*"),
        ("unparis", "paris", "unparis"),
    ],
)
def test_the_subject_is_the_last_mention_as_whole_words(prompt: str, subject: str, text: str) -> None:
    assert prompt[: subject_end(EditRequest(prompt, "x", subject), "request 0")] == text


def test_subject_columns_hold_the_subjects_last_token(tiny_tokenizer: Any) -> None:
    texts = ask(tiny_tokenizer, REQUESTS, ["Où? 🏔. ", "Paris. "], "It is said: {} is a", 128)
    for asked in (texts.requests, texts.essences):
        columns = asked.columns()
        assert columns.sum(-1).tolist() == [1] * len(columns)
        for row, owner in enumerate(asked.owners.tolist()):
            last, first = int(columns[row].int().argmax()), int(asked.batch.attention_mask[row].argmax())
            upto = asked.batch.input_ids[row, first : last + 1]
            assert tiny_tokenizer.decode(upto).endswith(REQUESTS[owner].subject or "")


@pytest.mark.parametrize("source", ["model", "corpus"])
def test_prefixes_are_seeded(source: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, prefix_source=source, prefixes=8, prefix_tokens=(2, 5))
    state = torch.random.get_rng_state()
    prefixes = draw_prefixes(model, tiny_tokenizer, editor.config, TEXTS)
    assert prefixes == draw_prefixes(model, tiny_tokenizer, editor.config, TEXTS)
    assert prefixes != draw_prefixes(model, tiny_tokenizer, replace(editor.config, seed=1), TEXTS)
    assert 1 < len(prefixes) <= 8
    assert all(prefix.endswith(". ") and len(prefix) > 2 for prefix in prefixes)
    assert torch.equal(state, torch.random.get_rng_state())


def test_prefixes_that_do_not_fit_the_context_are_left_out(tiny_tokenizer: Any) -> None:
    length = len(tiny_tokenizer(f"{REQUESTS[0].prompt} {REQUESTS[0].target}")["input_ids"])
    asked = ask(
        tiny_tokenizer, REQUESTS[:1], ["of. ", "Paris is the capital of France. "], "{} is a", length + 4
    ).requests
    assert len(asked.batch) == 2
    with pytest.raises(RequestError, match=r"request 0: .* do not fit"):
        ask(tiny_tokenizer, REQUESTS[:1], ["of. "], "{} is a", length - 2)
