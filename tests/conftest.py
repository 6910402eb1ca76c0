"""Shared fixtures: tiny decoders of several families, built from configs, and a byte-level tokenizer. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ibke_hf

if os.environ.get("CI") and "site-packages" not in str(ibke_hf.__file__):
    raise RuntimeError(f"CI must test the installed wheel, found {ibke_hf.__file__}")

WORDS = (
    "The capital of France is Paris and London lies on the river Thames in England. Marie Curie was born in Warsaw, Poland, "
    "and worked in physics and chemistry. Berlin, Rome, Madrid, Lisbon, Vienna and Oslo are cities in Europe. A sparrow is a bird, "
    "an oak is a tree, iron is a metal; the author of the book wrote it in the language of the country. Yes or No: the answer is Yes. "
)
VOCABULARY = 320
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 128, "n_inner": 48},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 128, "n_inner": 48, "rotary_dim": 8},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 16, "max_position_embeddings": 128},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
              "max_position_embeddings": 128},
    "gemma": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 16, "max_position_embeddings": 128},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` ids, of which 62 are pairs and words of `WORDS`; it adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a model: ``tiny_model(family="qwen3", seed=0, **config)``; families are those of `FAMILIES`.

    Weights are drawn wide, so that predictions vary. The model is in fp32 and in eval mode, new at every call.
    """

    def build(family: str = "qwen3", seed: int = 0, **config: Any) -> PreTrainedModel:
        settings = {"vocab_size": VOCABULARY, "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, **FAMILIES[family], **config})).eval()

    return build
