"""Prompt and target -> ids, labels, masks and positions: PROTOCOL's span rule, padding, special tokens, refusals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from ibke_hf.core.records import PROTOCOL, EditCase, EditRequest
from ibke_hf.core.tokens import (
    IGNORED,
    RequestError,
    TokenBatch,
    context_length,
    encode,
    encode_prompt,
    encode_requests,
    pad_and_label,
    with_leading_space,
)

REQUESTS = [
    EditRequest("The capital of France is", "Paris"),
    EditRequest("Marie Curie was born in", "Warsaw, Poland"),
    EditRequest("An oak is a", "tree"),
]
SCRIPTS = [
    "Paris",
    "東京",
    "Москва",
    "القاهرة",
    "देहली",
    "서울",
    "🗼🇫🇷",
    "e\u0301clair",
    "a\u200bb",
    "Zürich\nBern",
    "½ ≈ 0.5",
]


def special(tokenizer: PreTrainedTokenizerFast, template: str, **names: str) -> PreTrainedTokenizerFast:
    """A copy whose default adds special tokens, such as ``"$A <|end|>"``."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(name, backend.token_to_id(name)) for name in ("<|end|>", "<|pad|>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


@pytest.fixture
def ending(tiny_tokenizer: Any) -> Any:
    """Appends its EOS."""
    return special(tiny_tokenizer, "$A <|end|>", eos_token="<|end|>")


@pytest.fixture
def beginning(tiny_tokenizer: Any) -> Any:
    """Prepends its BOS, which is its EOS too, as GPT-2's would be."""
    return special(tiny_tokenizer, "<|end|> $A", eos_token="<|end|>", bos_token="<|end|>")


# --- the span -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Paris", " Paris"),
        (" Paris", " Paris"),
        ("  Paris", "  Paris"),
        ("\nParis", " \nParis"),  # PROTOCOL: the character itself; a newline or tab does not count
        ("\tParis", " \tParis"),
        ("\u00a0Paris", " \u00a0Paris"),
        ("", " "),
    ],
)
def test_by_protocol_a_target_gets_one_leading_space_unless_it_has_one(target: str, expected: str) -> None:
    assert with_leading_space(target) == expected


@pytest.mark.parametrize("target", ["Paris", " Paris"])
@pytest.mark.parametrize("span", ["prompt", "offsets"])
def test_the_span_starts_behind_the_prompt(tiny_tokenizer: Any, target: str, span: Any) -> None:
    ids, start = encode(tiny_tokenizer, "The capital of France is", target, span=span)
    assert ids == tiny_tokenizer("The capital of France is Paris")["input_ids"]
    assert start == len(tiny_tokenizer("The capital of France is")["input_ids"])
    assert tiny_tokenizer.decode(ids[start:]) == " Paris"


@pytest.mark.parametrize("span", ["prompt", "offsets"])
@pytest.mark.parametrize("target", SCRIPTS)
@pytest.mark.parametrize("prompt", ["Où est", "富士山は🏔️", "Ответ:", "Two spaces  "])
def test_targets_of_every_script_are_found_whole(tiny_tokenizer: Any, prompt: str, target: str, span: Any) -> None:
    ids, start = encode(tiny_tokenizer, prompt, target, span=span, prompt_format=PROTOCOL)
    assert tiny_tokenizer.decode(ids[start:]) == f" {target}"
    assert tiny_tokenizer.decode(ids[:start]) == prompt


def test_a_prompt_that_ends_in_spaces_keeps_them(tiny_tokenizer: Any) -> None:
    ids, start = encode(tiny_tokenizer, "nq question: who wrote it ", "Marie", prompt_format=PROTOCOL)
    assert tiny_tokenizer.decode(ids) == "nq question: who wrote it  Marie"
    assert tiny_tokenizer.decode(ids[start:]).strip() == "Marie"


def merging(full: tuple[str, ...], prompt: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer without word boundaries that merges ``ab c`` across the seam."""
    pieces = ["a", "b", " ", "c", *full, *prompt]
    merges = [("b", " "), ("b ", "c")] if full == ("b ", "b c") else [("a", "b"), ("ab", " "), ("ab ", "c")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges))
    )


def test_an_empty_span_names_the_case_and_a_cure() -> None:
    tokenizer = merging(("b ", "b c"), ())
    assert len(tokenizer("ab c")["input_ids"]) == len(tokenizer("ab")["input_ids"]) == 2
    with pytest.raises(
        RequestError, match=r"record 7, case 2: the tokenizer merges prompt and target.*'ab' -> 'c'.*offsets"
    ):
        encode(tokenizer, "ab", "c", name="record 7, case 2")
    assert encode(tokenizer, "ab", "c", span="offsets") == (tokenizer("ab c")["input_ids"], 1)


@pytest.mark.parametrize("span", ["prompt", "offsets"])
def test_a_text_of_one_token_has_nothing_to_predict_it_from(span: Any) -> None:
    tokenizer = merging(("ab", "ab ", "ab c"), ())
    assert len(tokenizer("ab c")["input_ids"]) == 1
    with pytest.raises(RequestError, match="merges prompt and target"):
        encode(tokenizer, "ab", "c", span=span)


@pytest.mark.parametrize(
    ("prompt", "target", "missing"),
    [("", "x", "prompt"), (" \n", "x", "prompt"), ("x", "", "target"), ("x", "  ", "target")],
)
def test_an_empty_text_names_the_request(tiny_tokenizer: Any, prompt: str, target: str, missing: str) -> None:
    with pytest.raises(RequestError, match=rf"request 1: the {missing} is empty"):
        encode_requests(tiny_tokenizer, [REQUESTS[0], EditRequest(prompt, target)])


def test_no_request_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="no edit request was given"):
        encode_requests(tiny_tokenizer, [])


def test_a_tokenizer_without_vocabulary_is_named() -> None:
    with pytest.raises(RequestError, match="makes no token of 'a b'; its vocabulary files are missing or empty"):
        encode(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), "a", "b")


def test_offsets_need_a_fast_tokenizer(tiny_tokenizer: Any) -> None:
    class Slow:
        is_fast, eos_token_id = False, None

        def __call__(self, text: str) -> Any:
            return tiny_tokenizer(text)

    with pytest.raises(RequestError, match="needs a fast tokenizer"):
        encode(Slow(), "The capital is", "Rome", span="offsets")  # type: ignore[arg-type]
    assert encode(Slow(), "The capital is", "Rome") == encode(tiny_tokenizer, "The capital is", "Rome")  # type: ignore[arg-type]


# --- special tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["prompt", "offsets"])
def test_an_appended_end_is_no_part_of_prompt_or_target(tiny_tokenizer: Any, ending: Any, span: Any) -> None:
    assert ending("An oak")["input_ids"][-1] == ending.eos_token_id
    for request in REQUESTS:
        assert encode(ending, request.prompt, request.target, span=span) == encode(
            tiny_tokenizer, request.prompt, request.target
        )
    assert encode_prompt(ending, "An oak is") == encode_prompt(tiny_tokenizer, "An oak is")


@pytest.mark.parametrize("span", ["prompt", "offsets"])
def test_a_beginning_token_is_part_of_the_prompt(tiny_tokenizer: Any, beginning: Any, span: Any) -> None:
    for request in REQUESTS:
        plain, start = encode(tiny_tokenizer, request.prompt, request.target)
        assert encode(beginning, request.prompt, request.target, span=span) == (
            [beginning.bos_token_id, *plain],
            start + 1,
        )


def test_an_end_that_the_text_itself_holds_stays(tiny_tokenizer: Any) -> None:
    ids, start = encode(tiny_tokenizer, "A turn<|end|>", "Paris")
    assert ids[start - 1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(ids[start:]) == " Paris"
    assert encode_prompt(tiny_tokenizer, "A turn<|end|>")[-1] == tiny_tokenizer.eos_token_id


def test_an_end_in_the_target_is_predicted_and_the_appended_one_is_not(ending: Any, tiny_tokenizer: Any) -> None:
    assert encode(ending, "A", "Paris<|end|>") == encode(tiny_tokenizer, "A", "Paris<|end|>")
    assert encode(tiny_tokenizer, "A", "Paris<|end|>")[0][-1] == tiny_tokenizer.eos_token_id


# --- batches --------------------------------------------------------------------------------------------------------


def positions_and_labels(batch: TokenBatch) -> list[list[tuple[int, int, int]]]:
    """Per row, what stands at each real position, and what is to be predicted there."""
    rows = []
    for ids, mask, labels, positions in zip(
        batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids, strict=True
    ):
        real = mask.bool()
        rows.append(list(zip(positions[real].tolist(), ids[real].tolist(), labels[real].tolist(), strict=True)))
    return rows


def test_the_last_target_token_is_not_fed(tiny_tokenizer: Any) -> None:
    ids, start = encode(tiny_tokenizer, "Marie Curie was born in", "Warsaw, Poland")
    batch = encode_requests(tiny_tokenizer, REQUESTS[1:2])
    assert batch.input_ids.tolist() == [ids[:-1]]
    assert batch.labels.tolist() == [[IGNORED] * (start - 1) + ids[start:]]
    assert batch.attention_mask.all()
    assert batch.kept == len(ids) - start


def test_both_padding_sides_give_the_same_positions_and_labels(tiny_tokenizer: Any) -> None:
    left, right = (encode_requests(tiny_tokenizer, REQUESTS, side=side) for side in ("left", "right"))
    assert positions_and_labels(left) == positions_and_labels(right)
    assert positions_and_labels(left) == [
        positions_and_labels(encode_requests(tiny_tokenizer, [r]))[0] for r in REQUESTS
    ]
    for batch in (left, right):
        assert (batch.labels[~batch.attention_mask.bool()] == IGNORED).all()
    assert left.attention_mask[:, -1].all()
    assert right.attention_mask[:, 0].all()
    assert left.kept < right.kept  # the targets stand together at the end


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_predicts_the_same_with_either_padding(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, family: str
) -> None:
    model, logits_by_side = tiny_model(family), []
    for side in ("left", "right"):
        batch = encode_requests(tiny_tokenizer, REQUESTS, side=side)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            ).logits
        logits_by_side.append(logits[batch.labels != IGNORED])
    torch.testing.assert_close(*logits_by_side, rtol=1e-4, atol=1e-4)


def test_a_missing_pad_token_is_no_obstacle(tiny_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert bare.pad_token_id is None
    assert positions_and_labels(encode_requests(bare, REQUESTS)) == positions_and_labels(
        encode_requests(tiny_tokenizer, REQUESTS)
    )


def test_the_padding_id_is_free(tiny_tokenizer: Any) -> None:
    encoded = [encode(tiny_tokenizer, r.prompt, r.target) for r in REQUESTS]
    one, other = pad_and_label(encoded), pad_and_label(encoded, pad=7)
    assert positions_and_labels(one) == positions_and_labels(other)
    assert set(other.input_ids[~other.attention_mask.bool()].tolist()) == {7}


def test_cases_are_encoded_as_requests_are(tiny_tokenizer: Any) -> None:
    cases = [EditCase(r.prompt, r.target) for r in REQUESTS]
    assert torch.equal(encode_requests(tiny_tokenizer, cases).labels, encode_requests(tiny_tokenizer, REQUESTS).labels)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="case 0: the target is empty"):
        encode_requests(tiny_tokenizer, [EditCase("a", "")], name="case")  # type: ignore[list-item]


def test_batches_of_unequal_lengths_are_stacked(tiny_tokenizer: Any) -> None:
    parts = [encode_requests(tiny_tokenizer, [r]) for r in REQUESTS]
    stacked = TokenBatch.cat(parts)
    whole = encode_requests(tiny_tokenizer, REQUESTS)
    assert len(stacked) == 3
    assert positions_and_labels(stacked) == positions_and_labels(whole)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(stacked, name), getattr(whole, name))
    assert torch.equal(TokenBatch.cat([whole]).input_ids, whole.input_ids)


def test_rows_are_chosen_trimmed_and_moved(tiny_tokenizer: Any) -> None:
    whole = encode_requests(tiny_tokenizer, REQUESTS)
    short = whole[torch.tensor([2])]
    assert short.input_ids.shape == (1, whole.input_ids.shape[1])
    trimmed = short.trimmed()
    assert torch.equal(trimmed.input_ids, encode_requests(tiny_tokenizer, REQUESTS[2:]).input_ids)
    assert positions_and_labels(trimmed) == positions_and_labels(short)
    assert torch.equal(whole.trimmed().input_ids, whole.input_ids)
    assert whole.to("meta").labels.device.type == "meta"


def test_a_batch_that_judges_nothing_keeps_one_column() -> None:
    assert TokenBatch(torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), IGNORED)).kept == 1


# --- the context ----------------------------------------------------------------------------------------------------


def test_a_text_that_does_not_fit_is_refused(tiny_tokenizer: Any) -> None:
    ids, _ = encode(tiny_tokenizer, "The capital of France is", "Paris")
    fed = len(ids) - 1  # the last target token is not fed
    encode(tiny_tokenizer, "The capital of France is", "Paris", max_length=fed)
    with pytest.raises(
        RequestError, match=rf"request 0: {fed} tokens do not fit the model's context of {fed - 1}; shorten"
    ):
        encode_requests(tiny_tokenizer, REQUESTS[:1], max_length=fed - 1)


@pytest.mark.parametrize(
    ("family", "config"), [("gpt2", {"n_positions": 77}), ("qwen3", {"max_position_embeddings": 77})]
)
def test_the_context_is_read_from_the_config(
    tiny_model: Callable[..., Any], family: str, config: dict[str, int]
) -> None:
    assert context_length(tiny_model(family, **config)) == 77


def test_a_model_without_positions_has_no_limit() -> None:
    config = SimpleNamespace(max_position_embeddings=None)
    assert context_length(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))) is None
