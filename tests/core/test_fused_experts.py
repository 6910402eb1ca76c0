"""A saved edit has its effect in PEFT, or is not saved as an adapter: what PEFT does is asked of PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ibke_hf.benchmark.tiny_models import tiny_model
from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.edit_values import describe
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import dimensions, modules_to_edit

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SHAPE |= {"num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16, "num_experts": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **SHARED,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
    }
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "qwen2_moe": SHARED,
    "deepseek_v3": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
REFUSED = {
    ("qwen3_next", "model.layers.1.mlp.shared_expert.down_proj"): True,
    ("qwen3_next", "model.layers.0.linear_attn.out_proj"): False,
    ("qwen2_moe", "model.layers.1.mlp.shared_expert.down_proj"): False,
    ("deepseek_v3", "model.layers.0.mlp.down_proj"): True,
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.down_proj"): True,
    ("deepseek_v3", "model.layers.1.self_attn.o_proj"): False,
    ("laguna", "model.layers.1.mlp.shared_experts.down_proj"): True,
    ("laguna", "model.layers.1.self_attn.o_proj"): False,
}


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_an_edit_has_its_effect_in_peft_or_is_not_saved(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if kind in MODELS:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind]})).eval()
    else:
        model = tiny_model(kind, SHAPE["vocab_size"])
    modules = modules_to_edit(model, [name])
    d_in, d_out = dimensions(modules[name])
    info = describe(model, modules, [], editor="test")
    edit = LowRankEdit({name: torch.randn(1, 2, d_in)}, {name: torch.randn(1, 2, d_out)}, info)
    refused = REFUSED[kind, name]
    if refused:
        with pytest.raises(AdapterError, match=rf"PEFT takes .*{name} on {kind} models .*no effect.*Merge the edit"):
            edit.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr("ibke_hf.core.adapter_files.is_redirected_by_peft", lambda *_: False)
    edit.save_pretrained(tmp_path)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        original = model(ids).logits
        with edit.attached(model):
            expected = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path))(ids).logits
    assert not torch.equal(expected, original)
    assert torch.equal(adapted, original) if refused else torch.allclose(adapted, expected, atol=1e-5)
