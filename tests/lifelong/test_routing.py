"""An attached library: each row carries its own prompt's edits alone, to its last token, and no trace stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATE
from routed_world import NEAR, REQUESTS, UNRELATED, routed_world
from torch import Tensor
from transformers import DynamicCache, pipeline

from ibke_hf.core.composition import SolvedEdit
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.forward import target_logits
from ibke_hf.core.layers import BackboneError
from ibke_hf.core.tokens import IGNORED, encode_requests
from ibke_hf.lifelong.routed import RoutedEdit
from ibke_hf.lifelong.router import Router

FAMILIES = ("qwen3", "gpt2", "gptj", "llama", "gemma")
PROMPTS = [*(request.prompt for request in REQUESTS), UNRELATED]
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}


@pytest.fixture
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    return routed_world(tiny_model("qwen3", eos_token_id=None), tiny_tokenizer)


def padded(tokenizer: Any, prompts: list[str], side: str = "left") -> dict[str, Tensor]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    batch.pop("token_type_ids", None)
    return dict(batch)


def generated(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    batch = padded(tokenizer, prompts)
    ids = model.generate(**batch, **{**OPTIONS, **options})
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def alone(world: SimpleNamespace, **options: Any) -> list[list[int]]:
    """What each prompt is answered with under its own edit, the unrelated one under none."""
    answers = []
    for prompt, edit in zip(PROMPTS, [*world.edits, None], strict=True):
        if edit is None:
            answers += generated(world.model, world.tokenizer, [prompt], **options)
            continue
        with edit.attached(world.model):
            answers += generated(world.model, world.tokenizer, [prompt], **options)
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unlike_prompts_each_carry_their_own_edit(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    world = routed_world(tiny_model(family, eos_token_id=None), tiny_tokenizer)
    expected = alone(world)
    assert expected != generated(world.model, world.tokenizer, PROMPTS)  # the edits do something
    with world.routed.attached(world.model):
        assert generated(world.model, world.tokenizer, PROMPTS) == expected
        assert [generated(world.model, world.tokenizer, [prompt])[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_pass_of_either_padding_is_that_of_each_edit_alone(world: SimpleNamespace, side: Any) -> None:
    batch = encode_requests(world.tokenizer, REQUESTS, side=side)
    with torch.no_grad(), world.routed.attached(world.model):
        logits, labels = target_logits(world.model, batch)
    for row, edit in enumerate(world.edits):
        with torch.no_grad(), edit.attached(world.model):
            other, other_labels = target_logits(world.model, encode_requests(world.tokenizer, REQUESTS[row : row + 1]))
        kept = logits[row][labels[row] != IGNORED]
        torch.testing.assert_close(kept, other[0][other_labels[0] != IGNORED], rtol=1e-4, atol=1e-4)


def test_beams_and_repeated_rows_keep_their_prompt(world: SimpleNamespace) -> None:
    expected = alone(world, num_beams=3)
    with world.routed.attached(world.model):
        assert generated(world.model, world.tokenizer, PROMPTS, num_beams=3) == expected
        twice = generated(world.model, world.tokenizer, PROMPTS, num_beams=3, num_return_sequences=2)
    assert twice[::2] == expected


def test_generation_without_a_cache_keeps_the_prompt_s_choice(world: SimpleNamespace) -> None:
    expected = alone(world, use_cache=False)
    with world.routed.attached(world.model):
        assert generated(world.model, world.tokenizer, PROMPTS, use_cache=False) == expected
        beams = generated(world.model, world.tokenizer, PROMPTS, use_cache=False, num_beams=3)
    assert beams == alone(world, use_cache=False, num_beams=3)


def test_a_prompt_that_is_given_as_embeddings_is_routed_too(world: SimpleNamespace) -> None:
    picks: list[Any] = []
    ids = torch.tensor([world.tokenizer(PROMPTS[1])["input_ids"]])
    with torch.no_grad(), world.routed.attached(world.model, on_route=picks.append):
        embeddings = world.model.get_input_embeddings()(ids)
        given = world.model(inputs_embeds=embeddings).logits
        torch.testing.assert_close(given, world.model(ids).logits)
    assert picks == [((1,),)] * 2


def test_a_longer_text_than_by_one_token_is_another_prompt_without_a_cache(world: SimpleNamespace) -> None:
    picks: list[Any] = []
    ids = torch.tensor([world.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad(), world.routed.attached(world.model, on_route=picks.append):
        for more in (0, 1, 3):
            world.model(torch.cat([ids, ids[:, :more]], 1), use_cache=False)
    assert picks == [((0,),), ((),)]


def test_two_conversations_take_turns_on_caches_of_their_own(world: SimpleNamespace) -> None:
    expected = alone(world)
    caches = [DynamicCache() for _ in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]
    given = [torch.tensor([world.tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    with torch.no_grad(), world.routed.attached(world.model):
        for _ in range(OPTIONS["max_new_tokens"]):
            for row, cache in enumerate(caches):
                logits = world.model(given[row], past_key_values=cache, use_cache=True).logits
                given[row] = logits[:, -1:].argmax(-1)
                answers[row].append(int(given[row]))
    assert answers == expected


def test_a_prompt_that_comes_in_parts_is_read_as_a_whole(world: SimpleNamespace) -> None:
    ids = torch.tensor([world.tokenizer(PROMPTS[1])["input_ids"]])
    picks: list[Any] = []
    with torch.no_grad(), world.routed.attached(world.model, on_route=picks.append):
        cache = DynamicCache()
        for part in ids.split(4, 1):
            world.model(part, past_key_values=cache, use_cache=True)
    assert picks[-1] == ((1,),)
    assert all(pick == ((),) for pick in picks[:-1])


def test_another_turn_on_a_cache_is_routed_anew_and_a_copied_cache_keeps_its_rows(world: SimpleNamespace) -> None:
    picks: list[Any] = []
    first, second = (torch.tensor([world.tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS[:2])
    with torch.no_grad(), world.routed.attached(world.model, on_route=picks.append):
        cache = DynamicCache()
        world.model(first, past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(2)
        step = world.model(torch.full((2, 1), 5), past_key_values=copied, use_cache=True).logits
    assert picks == [((0,),)]  # the copy's step was no prompt
    with torch.no_grad(), world.edits[0].attached(world.model):
        cache = DynamicCache()
        world.model(first, past_key_values=cache, use_cache=True)
        alone_step = world.model(torch.full((1, 1), 5), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step, alone_step.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), world.routed.attached(world.model, on_route=picks.append):
        world.model(second, past_key_values=cache, use_cache=True)
    assert len(picks) == 2


def test_pipelines_and_chats_are_routed(world: SimpleNamespace) -> None:
    answering = pipeline("text-generation", model=world.model, tokenizer=world.tokenizer)
    with world.routed.attached(world.model):
        texts = answering(PROMPTS, batch_size=2, return_full_text=False, max_new_tokens=5, do_sample=False)
    expected = [world.tokenizer.decode(ids) for ids in alone(world)]
    assert [text[0]["generated_text"] for text in texts] == expected
    chatting = copy.deepcopy(world.tokenizer)
    chatting.chat_template = TEMPLATE
    picks: list[Any] = []
    with world.routed.attached(world.model, threshold=-1.0, on_route=picks.append):
        pipeline("text-generation", model=world.model, tokenizer=chatting)(
            [{"role": "user", "content": PROMPTS[0]}], max_new_tokens=2
        )
    assert len(picks) == 1 and len(picks[0][0]) == world.router.config.most_edits


def test_undo_is_exact_and_a_row_without_edits_is_the_plain_model_s(world: SimpleNamespace) -> None:
    model, batch = world.model, padded(world.tokenizer, PROMPTS)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(**batch).logits
        with world.routed.attached(model):
            routed = model(**batch).logits
            single = model(**padded(world.tokenizer, [UNRELATED])).logits
        assert torch.equal(single, model(**padded(world.tokenizer, [UNRELATED])).logits)
        assert torch.equal(routed[-1], before[-1])
        assert not torch.equal(routed[0], before[0])
        assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_threads_with_libraries_of_their_own_are_apart(world: SimpleNamespace) -> None:
    expected = alone(world)
    plain = [generated(world.model, world.tokenizer, [prompt])[0] for prompt in PROMPTS]
    sets = [RoutedEdit.of([edit], world.routed.vectors[i : i + 1], world.router) for i, edit in enumerate(world.edits)]

    def run(place: int) -> list[list[int]]:
        with sets[place].attached(world.model):
            return [generated(world.model, world.tokenizer, [prompt])[0] for prompt in PROMPTS]

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(run, range(3)))
    for place, of_thread in enumerate(answers):
        assert of_thread == [*plain[:place], expected[place], *plain[place + 1 :]]


def test_several_edits_of_one_row_are_solved_together(world: SimpleNamespace) -> None:
    batch = padded(world.tokenizer, PROMPTS[:1])
    with torch.no_grad(), world.routed.attached(world.model, threshold=-1.0, most_edits=3):
        routed = world.model(**batch).logits
    with torch.no_grad(), SolvedEdit.of(world.edits).attached(world.model):
        torch.testing.assert_close(routed, world.model(**batch).logits, rtol=1e-3, atol=1e-3)


def test_rows_may_pick_from_sets_of_their_own(world: SimpleNamespace) -> None:
    expected = alone(world)
    plain = [generated(world.model, world.tokenizer, [prompt])[0] for prompt in PROMPTS]
    sets = RoutedEdit(tuple(world.edits), world.routed.vectors, world.router, ((0, 1), (2,)))
    with sets.attached(world.model, rows=torch.tensor([0, 1, 1, 0])):
        assert generated(world.model, world.tokenizer, PROMPTS) == [expected[0], plain[1], expected[2], plain[3]]
    with sets.attached(world.model), pytest.raises(ValueError, match="2 rows of edits were attached to a batch of 4"):
        generated(world.model, world.tokenizer, PROMPTS)
    assert len(sets.select([1, 1, 0])) == 3
    assert world.routed.compose(sets[1]).views == ((0, 1, 2, 3),)


def test_an_edit_below_the_router_s_states_is_refused_by_name(world: SimpleNamespace) -> None:
    low = LowRankEdit(
        {"model.layers.0.mlp.down_proj": torch.ones(1, 1, 48)}, {"model.layers.0.mlp.down_proj": torch.ones(1, 1, 32)}
    )
    layers = [f"model.layers.{layer}.mlp.down_proj" for layer in (2, 3)]
    router = Router.for_backbone(world.model, layers, width=16, heads=2, dim=16)
    library = RoutedEdit.of([low], world.routed.vectors[:1], router)
    batch = padded(world.tokenizer, PROMPTS)
    with (
        library.attached(world.model, threshold=NEAR),
        pytest.raises(BackboneError, match=r"layers\.0.* is run before"),
    ):
        world.model(**batch)
