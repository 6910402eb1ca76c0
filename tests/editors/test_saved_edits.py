"""Every saved edit is read as what it is: those of weights are merged, memories say why not and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibke_hf.cli import main
from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.records import EditRequest
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.grace import GRACEEditor
from ibke_hf.editors.saved import CLASSES, load_edit, load_weight_edit
from ibke_hf.hub.push import folder_kind

REQUESTS = [EditRequest("The capital of France is", "Rome")]


def test_dense_edits_are_merged_and_memories_say_why_not(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("qwen3")
    dense = FineTuningEditor.for_backbone(model, [1], steps=2).edit(model, tiny_tokenizer, REQUESTS)
    memory = GRACEEditor.for_backbone(model, [1], steps=1).edit(model, tiny_tokenizer, REQUESTS)
    dense.save_pretrained(tmp_path / "dense")
    memory.save_pretrained(tmp_path / "grace")
    assert load_edit(tmp_path / "dense") == load_weight_edit(tmp_path / "dense") == dense
    assert load_edit(tmp_path / "grace") == memory
    message = r"a grace edit, a memory .* neither merged nor published .*GRACEEdit\.from_pretrained and attach it"
    with pytest.raises(AdapterError, match=message):
        load_weight_edit(tmp_path / "grace")
    with pytest.raises(ValueError, match=r"GRACEEdit\.from_pretrained"):
        memory.merge_into(model)
    with pytest.raises(ValueError, match=message):
        folder_kind(tmp_path / "grace")
    with pytest.raises(ValueError, match=r"dense edit, .*`ibke merge --edit .*dense --out DIR`"):
        folder_kind(tmp_path / "dense")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    command = ["merge", "--edit", str(tmp_path / "dense"), "--model", str(tmp_path / "model"), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    merged = type(model).from_pretrained(tmp_path / "out")
    weight = model.model.layers[1].mlp.down_proj.weight
    expected = weight + dense.weight_update("model.layers.1.mlp.down_proj").T
    torch.testing.assert_close(merged.model.layers[1].mlp.down_proj.weight, expected)
    other = tiny_model("qwen3", seed=1)
    other.save_pretrained(tmp_path / "model")
    assert main([*command, str(tmp_path / "out2")]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out3"), "--force"]) == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_has_its_class(kind: str) -> None:
    from importlib import import_module

    module, name = CLASSES[kind]
    assert getattr(import_module(module, "ibke_hf.editors"), name).__name__ == name
