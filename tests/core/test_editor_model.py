"""Files of editors with weights: whole and finite, or refused; old configs; edits past the trained group size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ibke_hf import EditRequest, IBKEConfig, IBKEEditor
from ibke_hf.core import modeling_ibke
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.editor_model import ALIGNMENT, EditorFileError
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.editors.serac import SERACEditor

KINDS = {
    IBKEEditor: {"latent_dim": 8, "latent_length": 2},
    MENDEditor: {"hidden_dim": 4},
    SERACEditor: {"embedding_dim": 4},
}
REQUESTS = [EditRequest("The capital of France is", "Rome"), EditRequest("The river of Rome is", "Thames")]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def saved(request: Any, tiny_model: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    """An editor of each kind with weights, saved."""
    editor = request.param.for_backbone(tiny_model(), **KINDS[request.param])
    editor.save_pretrained(tmp_path / "editor")
    return editor, tmp_path / "editor"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_file_without_a_tensor_is_refused_and_the_tensor_named(saved: tuple[Any, Path]) -> None:
    editor, folder = saved
    name = [name for name, _ in editor.named_parameters()][-1]
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(EditorFileError, match=rf"editor: its file of weights does not hold {name}; config\.json"):
        type(editor).from_pretrained(folder)


def test_a_file_with_foreign_tensors_is_refused_and_the_first_named(saved: tuple[Any, Path]) -> None:
    editor, folder = saved
    change(folder, lambda tensors: tensors.update({f"x.{i}": torch.ones(1) for i in range(5)}))
    with pytest.raises(EditorFileError, match=r"holds foreign tensors: .*x\.0, .*x\.1, .*x\.2 and 2 more"):
        type(editor).from_pretrained(folder)


def test_a_tensor_of_another_shape_is_refused_and_named(saved: tuple[Any, Path]) -> None:
    editor, folder = saved
    name = [name for name, _ in editor.named_parameters()][-1]
    change(folder, lambda tensors: tensors.update({name: torch.ones(3, 2, 1)}))
    with pytest.raises(EditorFileError, match=rf"holds tensors of other shapes than the config says: {name};"):
        type(editor).from_pretrained(folder)


def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(saved: tuple[Any, Path], tmp_path: Path) -> None:
    editor, folder = saved
    name = [name for name, _ in editor.named_parameters()][-1]
    change(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(EditorFileError, match=rf"1 of \d+ tensors are not finite: {name}; train it again"):
        type(editor).from_pretrained(folder)
    dict(editor.named_parameters())[name].data.view(-1)[:1] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"the {type(editor).__name__}: 1 of \d+ tensors are not finite: {name}"):
        editor.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_loaded_weights_lie_where_the_allocator_would_put_them(saved: tuple[Any, Path]) -> None:
    editor, folder = saved
    loaded = type(editor).from_pretrained(folder)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.data_ptr() % ALIGNMENT]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in editor.state_dict().items())


def test_configs_saved_with_backbone_still_load(saved: tuple[Any, Path]) -> None:
    editor, folder = saved
    editor.config.base_model_name_or_path = "org/model"
    editor.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    assert content["base_model_name_or_path"] == "org/model"
    assert "backbone" not in content
    content["backbone"] = content.pop("base_model_name_or_path")  # as earlier versions wrote it
    (folder / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == config.backbone == "org/model"
    assert IBKEConfig(backbone="org/model").base_model_name_or_path == "org/model"


def test_more_edits_than_an_editor_was_trained_for_are_said_to_be(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(modeling_ibke.logger, "warning_once", said.append)
    model = tiny_model()
    editor = IBKEEditor.for_backbone(model, **KINDS[IBKEEditor], trained_edits_per_group=1)
    one = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert said == []
    editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")  # each is made alone, and all are solved together
    editor.edit(model, tiny_tokenizer, REQUESTS[:1], previous=one)
    assert said == []
    for mode, composition, previous in (
        ("joint", "solve", None),
        ("joint", "sum", None),
        ("sequential", "sum", None),
        ("joint", "sum", one),
    ):
        said.clear()
        requests = REQUESTS[: 1 if previous else 2]
        editor.edit(model, tiny_tokenizer, requests, mode=mode, previous=previous, composition=composition)
        (text,) = said
        assert "was trained on 1 edit at a time and is asked for one edit of more" in text
    editor.config.trained_edits_per_group = 2
    said.clear()
    editor.edit(model, tiny_tokenizer, REQUESTS)
    editor.config.trained_edits_per_group = 0  # an editor of which that is not known
    editor.edit(model, tiny_tokenizer, REQUESTS, previous=one, composition="sum")
    assert said == []
