"""Exports: each engine gets what it takes, read back and compared; what it would not serve is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import pytest
import torch
from quick_edits import quick_edit
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from ibke_hf.cli import main
from ibke_hf.core.edit_values import EditInfo, describe
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import BackboneError, dimensions, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.delivery import export as exporting
from ibke_hf.delivery.engines import ExportError
from ibke_hf.delivery.gguf_adapter import read_gguf_adapter
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.grace import GRACEEditor

REQUEST = EditRequest("The capital of France is", "Rome")
SGLANG_LINE = (
    "python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank 4 "
    "--lora-target-modules down_proj --lora-paths out={out}"
)
OUTPUT = {"llama": "model.layers.{i}.mlp.down_proj", "gpt2": "transformer.h.{i}.mlp.c_proj"}


def random_edit(model, names, rank=3, size=1.0):
    generator = torch.Generator().manual_seed(0)
    modules = modules_to_edit(model, names)
    widths = {name: dimensions(module) for name, module in modules.items()}
    inputs = {name: torch.randn(1, rank, d_in, generator=generator) / 7 for name, (d_in, _) in widths.items()}
    outputs = {name: size * torch.randn(1, rank, d_out, generator=generator) for name, (_, d_out) in widths.items()}
    return LowRankEdit(inputs, outputs, describe(model, modules, [REQUEST], editor="random"))


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def edit(llama):
    return random_edit(llama, [OUTPUT["llama"].format(i=i) for i in (1, 2)])


# --- LoRA adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "rank", "most", "written"),
    [
        ("vllm", 1, None, 1),
        ("vllm", 3, None, 8),
        ("vllm", 9, None, 16),
        ("vllm", 9, 15, 8),  # truncated
        ("vllm", 33, None, 64),
        ("sglang", 3, None, 3),
        ("sglang", 9, 4, 4),
        ("peft", 3, None, 3),
    ],
)
def test_ranks_are_ones_that_the_engine_has_and_nothing_is_lost_in_silence(
    llama, tmp_path, engine, rank, most, written
):
    edit = random_edit(llama, [OUTPUT["llama"].format(i=i) for i in (1, 2)], rank)
    export = edit.export(engine, tmp_path / "out", max_rank=most)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert export.rank == config["r"] == config["lora_alpha"] == written
    assert not config["use_dora"] and "rank_pattern" not in config and "modules_to_save" not in config
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in weights.items() if "lora_A" in key} == {written}
    read = LowRankEdit.from_pretrained(tmp_path / "out")
    for name in edit.layers:
        lost = (read.weight_update(name) - edit.weight_update(name)).norm() / edit.weight_update(name).norm()
        stated = export.relative_error.get(name, 0.0)
        assert float(lost) == pytest.approx(stated, abs=1e-5) and (stated > 0.05) == (written < rank)


def test_ranks_of_layers_that_differ_become_one(llama, tmp_path):
    names = [OUTPUT["llama"].format(i=i) for i in (1, 2)]
    edit = random_edit(llama, names[:1], 2).compose(random_edit(llama, names[1:], 5), how="sum")
    edit.export("vllm", tmp_path / "out")
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {8}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_has_the_effect_of_the_attached_edit_and_is_found_out_where_it_has_not(
    tiny_model, tiny_tokenizer, tmp_path, family, monkeypatch
):
    model = tiny_model(family)
    edit = random_edit(model, [OUTPUT[family].format(i=2)])
    export = edit.export("peft", tmp_path / "good", model=model, tokenizer=tiny_tokenizer)
    assert any("moves logits as the attached edit does" in check for check in export.checks)
    before = model(torch.tensor([[5, 6, 7]])).logits
    weaker = replace(edit, outputs={name: 0.9 * factor for name, factor in edit.outputs.items()})
    monkeypatch.setattr(exporting, "save_edit", lambda _, out: weaker.save_pretrained(out))
    monkeypatch.setattr(exporting, "_read_back", lambda *_: "")
    with pytest.raises(ExportError, match="through PEFT they differ"):
        edit.export("peft", tmp_path / "bad", model=model, tokenizer=tiny_tokenizer)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)  # PEFT is taken off again


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("model.layers.1.mlp.experts.3.down_proj", "routed experts, which .* fuses into one weight"),
        ("model.layers.1.mlp.experts.down_proj", "routed experts"),
        ("transformer.h.1.mlp.c_proj", "serves adapters of layers named down_proj, .*--to merged"),
    ],
)
def test_layers_that_an_engine_does_not_serve_are_refused_with_the_reason(tmp_path, engine, layer, reason):
    edit = LowRankEdit({layer: torch.ones(1, 1, 4)}, {layer: torch.ones(1, 1, 4)}, EditInfo())
    with pytest.raises(ExportError, match=reason):
        edit.export(engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("dense", "a dense edit .* has no adapter for vllm; give --to merged"),
        ("several", "cannot save 2 independent edits at once"),
        ("engine", "there is no engine 'tgi'; engines are vllm, sglang, peft, gguf, ollama, merged"),
        ("rank", "vLLM has no rank so low|--max-rank 0"),
        ("memory", "a memory beside the model that no weight can hold"),
    ],
)
def test_what_cannot_be_exported_says_why(llama, tiny_tokenizer, edit, tmp_path, kind, error):
    name = edit.layers[0]
    calls = {
        "dense": lambda: DenseEdit({name: torch.ones(1, 48, 32)}).export("vllm", tmp_path / "out"),
        "several": lambda: edit.select([0, 0]).export("peft", tmp_path / "out"),
        "engine": lambda: edit.export("tgi", tmp_path / "out"),
        "rank": lambda: edit.export("vllm", tmp_path / "out", max_rank=0),
        "memory": lambda: (
            GRACEEditor.for_backbone(llama, [1], steps=1)
            .edit(llama, tiny_tokenizer, [REQUEST])
            .export("vllm", tmp_path / "out")
        ),
    }
    with pytest.raises(ValueError, match=error):
        calls[kind]()
    assert not (tmp_path / "out").exists()


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tensor"), [("llama", "blk.2.ffn_down.weight"), ("gpt2", "blk.2.ffn_down.weight")])
def test_a_gguf_adapter_holds_the_update_under_llama_cpps_own_names(tiny_model, tmp_path, family, tensor):
    model = tiny_model(family)
    name = OUTPUT[family].format(i=2)
    edit = random_edit(model, [name])
    edit.export("gguf", tmp_path / "out")
    factors = read_gguf_adapter(tmp_path / "out" / "adapter.gguf")
    assert set(factors) == {f"{tensor}.lora_a", f"{tensor}.lora_b"}
    update = factors[f"{tensor}.lora_b"] @ factors[f"{tensor}.lora_a"]  # (d_out, d_in)
    assert torch.allclose(update.T, edit.weight_update(name), atol=1e-6)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF")}
    assert (fields["general.architecture"], fields["general.type"]) == (family, "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 3.0)


@pytest.mark.parametrize(
    ("layer", "model_type", "error"),
    [
        ("model.layers.1.self_attn.q_proj", "llama", "blk.1.attn_q .* reorders the rows"),
        ("model.layers.1.mlp.experts.down_proj", "qwen3_moe", "fuses the experts"),
        ("model.layers.1.mlp.of_no_kind", "llama", "has no tensor for it"),
        ("model.layers.1.mlp.down_proj", "nothing_known", "for which llama.cpp has no name"),
        ("model.layers.1.mlp.down_proj", "", "of an unknown architecture"),
    ],
)
def test_tensors_that_no_gguf_adapter_fits_are_refused(tmp_path, layer, model_type, error):
    edit = LowRankEdit({layer: torch.ones(1, 1, 4)}, {layer: torch.ones(1, 1, 4)}, EditInfo(model_type=model_type))
    with pytest.raises(ExportError, match=error):
        edit.export("gguf", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_an_adapter_is_held_against_the_file_that_it_is_served_beside(llama, edit, tiny_tokenizer, tmp_path):
    write_gguf(llama, tiny_tokenizer, tmp_path / "model.gguf")
    export = edit.export("ollama", tmp_path / "out", base=tmp_path / "model.gguf")
    assert any("architecture llama, tensors and widths" in check for check in export.checks)
    assert f"FROM {tmp_path / 'model.gguf'}\nADAPTER ./adapter.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()
    name = OUTPUT["llama"].format(i=9)
    other = LowRankEdit({name: torch.ones(1, 1, 48)}, {name: torch.ones(1, 1, 32)}, EditInfo())
    with pytest.raises(
        ExportError, match=r"blk.9.ffn_down.weight .*has no such tensor; the edit was made for another"
    ):
        other.export("gguf", tmp_path / "no", base=tmp_path / "model.gguf")
    narrow = LowRankEdit({edit.layers[0]: torch.ones(1, 1, 47)}, {edit.layers[0]: torch.ones(1, 1, 32)}, EditInfo())
    with pytest.raises(ExportError, match=r"maps 47 to 32, and model.gguf maps 48 to 32 there"):
        narrow.export("gguf", tmp_path / "no", base=tmp_path / "model.gguf")


# --- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_a_merged_model_reloads_to_the_attached_models_logits_in_its_precision_and_shards(
    tiny_model, tiny_tokenizer, tmp_path, family, dtype, close
):
    source = tiny_model(family).to(dtype)
    source.save_pretrained(tmp_path / "model", max_shard_size=60_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = random_edit(model, [OUTPUT[family].format(i=2)])
    edit.export("merged", tmp_path / "out", model=model, tokenizer=tiny_tokenizer)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), edit.attached(model):
        expected = model(ids).logits.float()
    with torch.no_grad():
        found, plain = merged(ids).logits.float(), model(ids).logits.float()
    assert merged.dtype == dtype
    assert (found - expected).abs().max() < close * (expected - plain).abs().max()
    maps = [
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (tmp_path / "model", tmp_path / "out")
    ]
    assert maps[0] == maps[1] and len(set(maps[0].values())) >= 2


def test_a_model_in_one_file_stays_in_one(llama, edit, tiny_tokenizer, tmp_path):
    edit.export("merged", tmp_path / "out", model=llama, tokenizer=tiny_tokenizer)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("tied", r"lm_head is tied to .*embed_tokens\.weight"),
        ("quantised", "a quantised weight cannot take a merged edit"),
        ("offloaded", "offloaded to disk"),
    ],
)
def test_weights_where_merging_would_be_wrong_are_refused(tiny_model, tiny_tokenizer, tmp_path, kind, error):
    model = tiny_model("llama", tie_word_embeddings=kind == "tied")
    edit = random_edit(model, ["lm_head" if kind == "tied" else OUTPUT["llama"].format(i=1)])
    if kind == "quantised":
        layer = model.model.layers[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    if kind == "offloaded":
        accelerate = pytest.importorskip("accelerate")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "disk" for i in range(4)}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "disk"))
    with pytest.raises(BackboneError, match=error):
        edit.export("merged", tmp_path / "out", model=model, tokenizer=tiny_tokenizer, force=True)
    assert not (tmp_path / "out").exists()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("vllm", "vllm serve {model} --enable-lora --max-lora-rank 16 --lora-modules out={out}"),
        ("sglang", SGLANG_LINE),
        ("peft", "model = peft.PeftModel.from_pretrained(model, '{out}', autocast_adapter_dtype=False)"),
        ("gguf", "llama-server -m BASE_MODEL.gguf --lora {out}/adapter.gguf"),
        ("ollama", "ollama create out -f {out}/Modelfile && ollama run out"),
        ("merged", "vllm serve {out}"),
    ],
)
def test_the_command_writes_and_prints_the_line_that_serves(store, tmp_path, capsys, engine, line):
    out = tmp_path / "out"
    edit = store / "edit"
    command = ["export", str(edit), "--to", engine, "--out", str(out), "--model", str(store / "model")]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    rank = LowRankEdit.from_pretrained(edit).ranks
    expected = line.format(model=store / "model", out=out).replace("rank 4", f"rank {max(rank.values())}")
    assert printed[-1] == expected
    assert any(part.startswith("checked: ") for part in printed)
    assert main(command) == 2  # nothing is written over in silence
    assert "which would be lost" in capsys.readouterr().err


def test_truncation_is_stated_by_the_command(store, tmp_path, capsys):
    assert main(["export", str(store / "edit"), "--to", "gguf", "--out", str(tmp_path), "--max-rank", "1"]) == 0
    assert "truncated: the update changes by at most 0." in capsys.readouterr().out


def test_a_working_edit_works_through_peft_and_merged(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama")
    edit = quick_edit(model, tiny_tokenizer, [REQUEST], [1, 2])
    edit.export("merged", tmp_path / "out", model=model, tokenizer=tiny_tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([tiny_tokenizer(REQUEST.prompt)["input_ids"]])
    target = tiny_tokenizer(" Rome")["input_ids"][0]
    assert int(merged(ids).logits[0, -1].argmax()) == target != int(model(ids).logits[0, -1].argmax())


def test_a_solved_edit_is_exported_as_one_adapter(llama, tmp_path):
    """What is no LowRankEdit but a chain of factors serves as an adapter of their product."""
    names = [OUTPUT["llama"].format(i=i) for i in (1, 2)]
    generator = torch.Generator().manual_seed(1)
    parts = [
        replace(part, keys={name: torch.randn(1, 2, 48, generator=generator) for name in names})
        for part in (random_edit(llama, names, 2), random_edit(llama, names, 3))
    ]
    solved = parts[0].compose(parts[1], how="solve")
    assert not isinstance(solved, LowRankEdit)
    solved.export("vllm", tmp_path / "out")
    read = LowRankEdit.from_pretrained(tmp_path / "out")
    for name in names:
        torch.testing.assert_close(read.weight_update(name), solved.weight_update(name), atol=1e-4, rtol=1e-4)
    assert read.info.requests == solved.info.requests
