"""Finding the FFN output projections of many families, and reading weights in their own orientation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ibke_hf.core.configuration_ibke import PRESET_DIMENSIONS, PRESETS
from ibke_hf.core.layers import (
    BackboneError,
    dimensions,
    find_ffn_output,
    is_transposed,
    layers_to_edit,
    modules_to_edit,
    number_of_layers,
)

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "vocab_size": 64,
}
FFN_OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": (
        "transformer.h.{i}.mlp.dense_4h_to_h",
        {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "pad_token_id": 0},
    ),
    "falcon": (
        "transformer.h.{i}.mlp.dense_4h_to_h",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "gemma3_text": ("model.layers.{i}.mlp.down_proj", {**WIDE, "head_dim": 16}),
    "gpt_neo": (
        "transformer.h.{i}.mlp.c_proj",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_neox": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h", WIDE),
    "mistral": ("model.layers.{i}.mlp.down_proj", {**WIDE, "num_key_value_heads": 1}),
    "mpt": ("transformer.blocks.{i}.ffn.down_proj", {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64}),
    "olmo2": ("model.layers.{i}.mlp.down_proj", WIDE),
    "opt": ("model.decoder.layers.{i}.fc2", {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("model.layers.{i}.mlp.fc2", WIDE),
    "phi3": ("model.layers.{i}.mlp.down_proj", WIDE),
    "qwen2": ("model.layers.{i}.mlp.down_proj", {**WIDE, "num_key_value_heads": 1}),
    "starcoder2": ("model.layers.{i}.mlp.c_proj", {**WIDE, "num_key_value_heads": 1}),
    # hybrids: a block mixes tokens by attention or by a convolution with a state, and neither is its FFN
    "jamba": (
        "model.layers.{i}.feed_forward.down_proj",
        {**WIDE, "num_experts": 1, "num_key_value_heads": 1, "use_mamba_kernels": False},
    ),
    "lfm2": ("model.layers.{i}.feed_forward.w2", {**WIDE, "num_key_value_heads": 1}),
    "olmo_hybrid": ("model.layers.{i}.mlp.down_proj", {**WIDE, "num_hidden_layers": 4}),
    "qwen3_5_text": (
        "model.layers.{i}.mlp.down_proj",
        {**WIDE, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "recurrent_gemma": (
        "model.layers.{i}.mlp_block.down_proj",
        {**WIDE, "num_hidden_layers": 3, "num_key_value_heads": 1},
    ),
}


def on_meta(family: str, **config: Any) -> Any:
    """A model without memory, as wide as we like."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))


# --- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("gpt2", "transformer.h.{i}.mlp.c_proj"),
        ("gptj", "transformer.h.{i}.mlp.fc_out"),
        ("qwen3", "model.layers.{i}.mlp.down_proj"),
        ("llama", "model.layers.{i}.mlp.down_proj"),
        ("gemma", "model.layers.{i}.mlp.down_proj"),
    ],
)
def test_the_ffn_output_of_the_papers_families(tiny_model: Callable[..., Any], family: str, template: str) -> None:
    model = tiny_model(family)
    assert find_ffn_output(model) == template
    modules = modules_to_edit(model, [template.format(i=i) for i in (2, 0)])
    assert list(modules) == [template.format(i=2), template.format(i=0)]
    for name, module in modules.items():
        assert dimensions(module) == (48, 32)
        assert module is model.get_submodule(name)
        assert is_transposed(module) == (family == "gpt2")


@pytest.mark.parametrize("family", FFN_OUTPUTS)
def test_the_ffn_output_is_found_by_structure(family: str) -> None:
    template, config = FFN_OUTPUTS[family]
    model = on_meta(family, **config)
    assert find_ffn_output(model) == template
    names = [template.format(i=i) for i in range(number_of_layers(model))]
    assert all(dimensions(module)[1] == 32 for module in modules_to_edit(model, names).values())


@pytest.mark.parametrize(("family", "inner"), [("gpt2", "n_inner"), ("qwen3", "intermediate_size")])
def test_square_ffns_are_found_too(tiny_model: Callable[..., Any], family: str, inner: str) -> None:
    assert find_ffn_output(tiny_model(family, **{inner: 32})) == find_ffn_output(tiny_model(family))


@pytest.mark.parametrize("backbone", PRESETS)
def test_presets_resolve_on_models_of_the_same_architecture(backbone: str) -> None:
    family = {"openai-community/gpt2-xl": "gpt2", "EleutherAI/gpt-j-6b": "gptj"}.get(backbone, "qwen3")
    widths = {
        "openai-community/gpt2-xl": {"n_embd": 1600, "n_layer": 18, "n_head": 25},
        "EleutherAI/gpt-j-6b": {"n_layer": 9},
        "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 9},
        "Qwen/Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 9},
    }[backbone]
    model, preset = on_meta(family, **widths), PRESETS[backbone]
    assert find_ffn_output(model) == preset["edited_modules"]
    template, layers = layers_to_edit(model, preset["edited_layers"], preset["edited_modules"])
    modules = modules_to_edit(model, [template.format(i=i) for i in layers])
    assert [dimensions(module) for module in modules.values()] == [PRESET_DIMENSIONS[backbone]] * 3


@pytest.mark.parametrize(
    ("family", "config", "candidates"),
    [
        (
            "mamba",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
            "0 candidates for the FFN output projection (none)",
        ),
        (
            "mixtral",
            {**WIDE, "num_local_experts": 2, "num_key_value_heads": 1},
            "0 candidates for the FFN output projection (none)",
        ),
        (
            "qwen2_moe",
            {**WIDE, "num_experts": 2, "num_key_value_heads": 1, "mlp_only_layers": [0], "moe_intermediate_size": 16},
            (
                "2 candidates for the FFN output projection (model.layers.{i}.mlp.down_proj, "
                "model.layers.{i}.mlp.shared_expert.down_proj)"
            ),
        ),
    ],
)
def test_an_ambiguous_ffn_output_is_refused_with_candidates(
    family: str, config: dict[str, Any], candidates: str
) -> None:
    model = on_meta(family, **config)
    with pytest.raises(BackboneError) as caught:
        find_ffn_output(model)
    assert str(caught.value).startswith(
        f"{type(model).__name__}: {candidates}; name the one to edit, such as edited_modules="
    )


def test_a_long_list_of_candidates_is_cut(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        for place in range(30):
            layer.mlp.add_module(f"side_{place}", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)))
    with pytest.raises(BackboneError, match=r"31 candidates .*side_14.1 and 15 more\)"):
        find_ffn_output(model)


def test_routed_experts_in_a_list_are_no_candidates_beside_a_shared_one(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)) for _ in range(30))
    assert find_ffn_output(model) == "model.layers.{i}.mlp.down_proj"
    del model.model.layers[0].mlp.experts
    for layer in model.model.layers:
        del layer.mlp.down_proj
    with pytest.raises(BackboneError, match=r"30 candidates .*experts.0.1"):
        find_ffn_output(model)


SHARED = {**WIDE, "num_hidden_layers": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "config", "template", "layers"),
    [
        ("mixtral", {"num_local_experts": 2}, "model.layers.{i}.self_attn.o_proj", [0, 1, 2]),
        ("qwen3_moe", {"num_experts": 2}, "model.layers.{i}.self_attn.o_proj", [0, 1, 2]),
        ("olmoe", {"num_experts": 2}, "model.layers.{i}.self_attn.o_proj", [0, 1, 2]),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 16}, "model.layers.{i}.self_attn.o_proj", [0, 1, 2]),
        ("qwen2_moe", {"num_experts": 2}, "model.layers.{i}.mlp.shared_expert.down_proj", [0, 1, 2]),
        (
            "deepseek_v3",
            {"n_routed_experts": 8, "first_k_dense_replace": 1},  # the first block has a plain FFN, the others none
            "model.layers.{i}.mlp.shared_experts.down_proj",
            [1, 2],
        ),
        ("jamba", {"num_experts": 2, "use_mamba_kernels": False}, "model.layers.{i}.feed_forward.down_proj", [0, 2]),
    ],
)
def test_what_is_edited_where_ffns_are_routed_or_absent(
    family: str, config: dict[str, Any], template: str, layers: list[int]
) -> None:
    model = on_meta(family, **{**SHARED, **config})
    assert layers_to_edit(model) == (template, layers)
    assert modules_to_edit(model, [template.format(i=i) for i in layers])


def test_a_model_without_ffn_and_attention_is_refused_with_its_linear_layers() -> None:
    with pytest.raises(BackboneError, match=r"0 candidates .*linear layers are backbone.layers.\{i\}.mixer"):
        layers_to_edit(on_meta("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64))


def test_an_editors_own_layer_moves_to_the_nearest_that_has_the_projection() -> None:
    model = on_meta("jamba", **{**SHARED, "num_experts": 2, "use_mamba_kernels": False})
    assert layers_to_edit(model, default=[3])[1] == [2]
    assert layers_to_edit(model, default=[0, 1, 2])[1] == [0, 2]
    assert layers_to_edit(model, [3], default=[0])[1] == [3]  # what the user asks for stays, and is refused by name
    with pytest.raises(BackboneError, match="for i = 0, 2"):
        modules_to_edit(model, ["model.layers.3.feed_forward.down_proj"])


def test_an_attention_that_is_edited_for_want_of_an_ffn_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.enable_propagation()
    model = on_meta("olmoe", **{**SHARED, "num_experts": 2, "num_hidden_layers": 6})
    logging.get_logger("ibke_hf.core.layers").warning_once.cache_clear()
    for _ in range(2):
        layers_to_edit(model)
    said = [record for record in caplog.records if "is edited in its place" in record.message]
    assert len(said) == 1
    assert "model.layers.{i}.self_attn.o_proj" in said[0].message


def test_an_unknown_layer_is_refused_with_what_there_is(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(BackboneError) as caught:
        modules_to_edit(model, ["transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.down_proj"])
    assert str(caught.value) == (
        "GPT2LMHeadModel has no linear layer named 'transformer.h.1.mlp.down_proj'; its linear layers are lm_head, "
        "transformer.h.{i}.attn.c_attn, transformer.h.{i}.attn.c_proj, transformer.h.{i}.mlp.c_fc, "
        "transformer.h.{i}.mlp.c_proj"
    )


def test_a_layer_that_is_too_high_is_refused_with_the_range(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(BackboneError) as caught:
        modules_to_edit(tiny_model("gpt2"), ["transformer.h.9.mlp.c_proj"])
    assert str(caught.value).endswith(
        "named 'transformer.h.9.mlp.c_proj'; it has transformer.h.{i}.mlp.c_proj for i = 0, 1, 2, 3"
    )


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0]), (2, [0, 1]), (3, [0, 1]), (4, [0, 1, 2]), (6, [1, 2, 3]), (28, [12, 13, 14])]
)
def test_the_default_is_three_layers_before_the_middle(
    tiny_model: Callable[..., Any], depth: int, layers: list[int]
) -> None:
    assert layers_to_edit(tiny_model("qwen3", num_hidden_layers=depth)) == ("model.layers.{i}.mlp.down_proj", layers)


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        ([4], r"between 0 and 3 for this backbone, found \[4\]"),
        ([-1], r"between 0 and 3"),
        ([], r"between 0 and 3 .* found \[\]"),
        ([1, 2, 1], r"layers must differ, found \[1, 2, 1\]"),
    ],
)
def test_layers_that_cannot_be_edited_are_refused(
    tiny_model: Callable[..., Any], layers: list[int], what: str
) -> None:
    with pytest.raises(BackboneError, match=what):
        layers_to_edit(tiny_model("qwen3"), layers)


def test_a_name_without_a_place_for_the_layer_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(
        BackboneError, match=r"edited_modules must contain \{i\}.*found 'model.layers.3.mlp.down_proj'"
    ):
        layers_to_edit(tiny_model("qwen3"), [3], "model.layers.3.mlp.down_proj")
