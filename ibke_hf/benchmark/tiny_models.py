"""Decoders of any family of transformers at toy size: its default config, shrunk by the names of the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LARGEST = 5_000_000  # parameters of what counts as tiny
SEED = 0
DEPTH = 4
SPREAD = 0.2  # standard deviation of the weights: wide enough that predictions vary between prompts

KV_HEADS = r"(num|n)_(kv_heads|key_value_heads|query_groups)|kv_n_heads|swa_num_key_value_heads"
# what a field's whole name means -> its size; the first pattern that fits decides, and a size of 0 stays
SIZES: tuple[tuple[str, int], ...] = (
    (KV_HEADS, 2),
    (r"mamba_(n|num)_?heads|n_mamba_heads", 8),
    (r"linear_num_key_heads|index_n_heads", 2),
    (r".*num_(hidden|decoder|encoder|lstm)?_?layers|n_layers?|(en|de)coder_layers|depth|num_blocks", DEPTH),
    (r".*(num|n)_(attention_|linear_)?heads?|.*attention_heads|linear_num_(value_)?heads", 4),
    (r"qk_head_dim", 16),
    (r".*head_(dim|size)|d_head|dim_head|mamba_d_head|mamba_headdim|d_kv|kv_channels|rotary_dim", 8),
    (r".*lora_rank|.*_rank|time_step_rank|hc_lowrank|d_rel", 8),
    (r".*(intermediate|ffn|mlp|feed_forward)_?(hidden_)?(dim|size|size_mlp)|dff|dim_ff|d_ff|d_inner|n_inner", 48),
    (r"hidden_size_per_layer_input|ple_embed_dim", 8),
    (r"mamba_d_ssm", 64),
    (r"lru_width|(en|de)coder_embed_dim|hidden_size.*|attention_hidden_size|backbone_hidden_size", 32),
    (r"d_model|n_embd|emb(ed(ding)?)?_(dim|size)|dim_model|model_dim|router_hidden_size|embedding_size", 32),
    (r".*put_embedding_size|word_embed_proj_dim|.*_embed_dim|embedding_dim", 32),
    (r".*(experts_per_tok(en)?|moe_top_?k|moe_k|experts_top_k)", 2),
    (r".*(num|n)_(routed_|local_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"n_group|topk_group|num_expert_group|o_groups|mamba_n_?groups|n_groups", 1),
    (r"(ssm_)?state_size|mamba_d_state", 8),
    (r".*chunk_size|block_size", 16),
    (r"(max_)?(position_embeddings|target_positions|source_positions)|n_positions|n_ctx|context_length", 128),
    (r"max_position_embeddings|max_seq_len|model_max_length|rel_extent", 128),
    (r"image_size|crop_size", 32),
    (r"num_filters|base_channels|codebook_dim|codebook_size|vector_quantization_hidden_dimension", 32),
    (r"dim_model_base", 32),
)
KEPT = r"chunk_size_feed_forward|chunk_size_lm_head|num_shared_experts|.*shared_experts$|rope_.*"
# of one family, where a field's meaning is not in its name; by dots into parts of the config
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": None},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v32": {"first_k_dense_replace": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "first_k_dense_replace": 1},
    "gemma4_text": {"per_layer_config": {}},
    "gemma4_unified_text": {"per_layer_config": {}},
    "dots3_note_text": {"per_layer_config": {}},
    "dots1": {"n_shared_experts": 1},
    "minimax": {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    "nemotron": {"head_dim": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
IMPOSSIBLE: dict[str, str] = {  # families that are no plain decoders of text, and why
    "blt": "reads bytes in patches, by a second model",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "a decoder of sound codes",
    "musicgen_melody": "a decoder of sound codes",
}


class NotTinyError(ValueError):
    """A family that cannot be built at toy size; the message says why."""


def tiny_model(family: str, vocabulary: int) -> Any:
    """Build a decoder of a family at toy size, in fp32 and eval mode, always with the same weights.

    Args:
        family: Model type, a key of transformers' mapping of causal language models.
        vocabulary: Number of token ids.

    Raises:
        NotTinyError: If the config cannot be shrunk, with the reason.
    """
    if family in IMPOSSIBLE:
        raise NotTinyError(IMPOSSIBLE[family])
    try:
        config = tiny_config(family, vocabulary)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise NotTinyError(f"{size:,} parameters after shrinking")
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return AutoModelForCausalLM.from_config(config).float().eval()
    except NotTinyError:
        raise
    except Exception as error:  # whatever a foreign constructor raises is the reason
        raise NotTinyError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def tiny_config(family: str, vocabulary: int) -> Any:
    """Return a family's default config with every size shrunk."""
    default = AutoConfig.for_model(family).to_dict()
    overrides = OVERRIDES.get(family, {})
    return AutoConfig.for_model(**_shrunk({**default, "model_type": family}, vocabulary, overrides))


def _shrunk(config: Mapping[str, Any], vocabulary: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    heads = {value for name, value in config.items() if _size(name) == 4 and "attention_heads" in name}
    depths = {value for name, value in config.items() if _size(name) == DEPTH and isinstance(value, int)}
    for name, value in config.items():
        nested = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(f"{name}.")}
        if name in overrides:
            fields[name] = overrides[name]
        elif isinstance(value, Mapping):
            fields[name] = _shrunk(value, vocabulary, nested) if name.endswith("config") or "." in name else value
        elif isinstance(value, (list, tuple)):
            fields[name] = _first_layers(value) if len(value) in depths and len(value) > DEPTH else value
        elif re.fullmatch(KV_HEADS, name) and value in heads:
            fields[name] = _size("num_attention_heads")  # no groups in this family
        elif name == "is_decoder":
            fields[name] = True
        else:
            fields[name] = _smaller(name, value, vocabulary)
    return fields | {name: value for name, value in overrides.items() if "." not in name}


def _size(name: str) -> int | None:
    if re.fullmatch(KEPT, name):
        return None
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _smaller(name: str, value: Any, vocabulary: int) -> Any:
    """Shrink one number: sizes to those of `SIZES`, token ids into the vocabulary, the spread of weights widened."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return SPREAD if name in ("initializer_range", "init_std") else value
    if not isinstance(value, int):
        return value
    if "vocab" in name:
        return min(value, vocabulary)
    if name.endswith(("token_id", "token_index")):
        return min(value, vocabulary - 1)
    size = _size(name)
    return value if size is None or value <= 0 else size


def _first_layers(values: Sequence[Any]) -> list[Any]:
    """Cut a list of one value per layer, keeping one layer of every kind as long as there is room."""
    cut = list(values[:DEPTH])
    for place, kind in enumerate(
        [v for v in dict.fromkeys(values) if v not in cut] if isinstance(values[0], str) else []
    ):
        if place < DEPTH - 1:
            cut[DEPTH - 1 - place] = kind
    return cut
