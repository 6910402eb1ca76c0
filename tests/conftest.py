"""Shared fixtures: tiny decoders of several families and a byte-level tokenizer. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopback_hub import HUB, TOKEN, LoopbackHub

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# frozen when the client is imported: no test can reach the Hub itself
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
os.environ["HF_DATASETS_CACHE"] = (
    tempfile.mkdtemp()
)  # removed at the end: what tests read is not kept in the user's cache

import pytest
import torch
from paths import SHARED
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ibke_hf

if os.environ.get("CI") and "site-packages" not in str(ibke_hf.__file__):
    raise RuntimeError(f"CI must test the installed wheel, found {ibke_hf.__file__}")

pytest_plugins = ["command_runs", "fuzzing", "training_runs"]  # fixtures that several rooms use

WORDS = (
    "The capital of France is Paris and London lies on the river Thames in England. Marie Curie was born in "
    "Warsaw, Poland, "
    "and worked in physics and chemistry. Berlin, Rome, Madrid, Lisbon, Vienna and Oslo are cities in Europe. A "
    "sparrow is a bird, "
    "an oak is a tree, iron is a metal; the author of the book wrote it in the language of the country. Yes or "
    "No: the answer is Yes. "
)
VOCABULARY = 320
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 128, "n_inner": 48},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 128, "n_inner": 48, "rotary_dim": 8},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
    "gemma": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
}


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def native_data() -> Callable[[str], Path]:
    """Find a sample file of a native format, which lie beside this checkout; skip the test where it is absent."""

    def find(name: str) -> Path:
        file = SHARED / "data" / name
        if not file.exists():
            pytest.skip(f"the sample of real records is not beside this checkout: {file}")
        return file

    return find


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` ids, 62 of them pairs and words of `WORDS`; no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a model: ``tiny_model(family="qwen3", seed=0, **config)``; families are those of `FAMILIES`.

    Weights are drawn wide, so that predictions vary. The model is in fp32 and in eval mode, new at every call.
    """

    def build(family: str = "qwen3", seed: int = 0, **config: Any) -> PreTrainedModel:
        settings = {
            "vocab_size": VOCABULARY,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **{**settings, **FAMILIES[family], **config})
            ).eval()

    return build


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty stand-in for the Hub, which the client of this process talks to as its writer, with an empty cache."""
    from huggingface_hub import constants

    HUB.start()
    HUB.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return HUB
