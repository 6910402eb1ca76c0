"""A GGUF file of a tiny Llama with a byte-level tokenizer, as the tools of llama.cpp would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf


def write_gguf(model: Any, tokenizer: Any, file: Path) -> None:
    """Write a model of the Llama family and its tokenizer, unquantised."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary.get(i, f"<unused{i}>") for i in range(config.vocab_size)])
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for i in range(config.vocab_size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        number = {"q_proj": heads, "k_proj": kv}.get(name.split(".")[-2], 0)
        halves = tensor.view(number, 2, -1, tensor.shape[-1]).transpose(1, 2) if number else tensor
        weights = halves.reshape(tensor.shape).float().numpy().copy()  # llama.cpp pairs the halves of a head otherwise
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
