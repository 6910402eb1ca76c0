"""Second moments of keys over a corpus: measured in batches, cached, and refused on another backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.editors.locate import key_statistics
from ibke_hf.editors.locate.key_statistics import KeyStatistics, default_layers

PLACES = ("France", "Europe", "E", "Italy.")
TEXTS = [f"{name} lies in {place}" for name in ("Paris", "Rome", "the river Thames", "Oslo") for place in PLACES]


def naive_moment(model: Any, tokenizer: Any, name: str, max_length: int = 1000) -> torch.Tensor:
    """E[k kᵀ] from one text at a time, in fp64, read by a hook of its own."""
    keys: list[torch.Tensor] = []
    handle = modules_to_edit(model, [name])[name].register_forward_hook(
        lambda _, args, __: keys.append(args[0][0].double())
    )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer(text)["input_ids"][:max_length]]))
    handle.remove()
    rows = torch.cat(keys)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "qwen3", "llama", "gemma"])
def test_moments_equal_those_of_single_texts(family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    statistics = KeyStatistics.of(model, tiny_tokenizer, TEXTS, [0, 2], batch_tokens=64, progress=False)
    assert statistics.tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in TEXTS)
    assert len(statistics.moments) == 2
    for name, moment in statistics.moments.items():
        torch.testing.assert_close(moment.double(), naive_moment(model, tiny_tokenizer, name), rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_long_texts_are_cut_and_16_bit_models_are_summed_in_fp32(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    statistics = KeyStatistics.of(model, tiny_tokenizer, TEXTS, [1], max_length=4, progress=False)
    assert statistics.tokens == 4 * len(TEXTS)
    ((name, moment),) = statistics.moments.items()
    assert moment.dtype == torch.float32
    torch.testing.assert_close(
        moment.double(), naive_moment(model, tiny_tokenizer, name, 4), rtol=0.05, atol=0.02 * float(moment.max())
    )


def test_the_cache_is_read_for_the_same_corpus_and_weights_alone(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = key_statistics._measure
    monkeypatch.setattr(key_statistics, "_measure", lambda *arguments: measured.append(1) or measure(*arguments))
    model = tiny_model("qwen3")

    def of(model: Any = model, texts: Any = TEXTS, layers: Any = (1,)) -> KeyStatistics:
        return KeyStatistics.of(model, tiny_tokenizer, texts, layers, cache=tmp_path, progress=False)

    first, again = of(), of()
    assert len(measured) == 1
    assert (again.tokens, again.corpus, again.openings) == (first.tokens, first.corpus, first.openings)
    assert set(again.openings) <= set(TEXTS)
    assert all(torch.equal(again.moments[name], moment) for name, moment in first.moments.items())
    of(texts=TEXTS[:-1])
    of(texts=["".join(TEXTS[:2]), *TEXTS[2:]])
    of(layers=(2,))
    of(tiny_model("qwen3", seed=1))
    assert len(measured) == 5
    assert len(list(tmp_path.glob("keys-*.safetensors"))) == 5
    for file in tmp_path.glob("keys-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete it"):
        KeyStatistics.load(file)
    of()
    of()
    assert len(measured) == 6


def test_statistics_refuse_what_they_cannot_be_of(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    twice = "gone through twice"
    for texts, complaint in (
        (iter(TEXTS), twice),
        ("a text", twice),
        ([], "is empty"),
        ([{"text": "a"}], "text column"),
    ):
        with pytest.raises(ValueError, match=complaint):
            KeyStatistics.of(model, tiny_tokenizer, texts, [1], progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no token"):
        KeyStatistics.of(model, tiny_tokenizer, ["", ""], [1], progress=False)
    with pytest.raises(ValueError, match="batch_tokens"):
        KeyStatistics.of(model, tiny_tokenizer, TEXTS, [1], batch_tokens=0, progress=False)
    with pytest.raises(BackboneError, match="layers must be between"):
        KeyStatistics.of(model, tiny_tokenizer, TEXTS, [9], progress=False)
    statistics = KeyStatistics.of(model, tiny_tokenizer, TEXTS, [1], progress=False)
    name = "model.layers.{}.mlp.down_proj"
    with pytest.raises(ValueError, match=r"lack model\.layers\.2"):
        statistics.require(modules_to_edit(model, [name.format(2)]))
    for other in (tiny_model("qwen3", seed=1), tiny_model("qwen3", intermediate_size=64)):
        with pytest.raises(BackboneError, match="another backbone"):
            statistics.require(modules_to_edit(other, [name.format(1)]))
    statistics.require(modules_to_edit(tiny_model("qwen3"), [name.format(1)]))


def test_default_layers_end_at_the_papers_relative_depth(tiny_model: Callable[..., Any]) -> None:
    assert default_layers(tiny_model("qwen3", num_hidden_layers=4)) == [0, 1]
    assert default_layers(tiny_model("gpt2", n_layer=48, n_embd=4)) == [13, 14, 15, 16, 17]  # AlphaEdit's in GPT-2 XL
    assert default_layers(tiny_model("gpt2", n_layer=48, n_embd=4), 1) == [17]  # ROME's
