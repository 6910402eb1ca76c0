"""An edit says everything that it was made of: what it contains, row by row, and what it was made on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ibke_hf.core.edit_values import EditInfo, describe, with_rows
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.records import EditRequest
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.editors.grace import GRACEEditor
from ibke_hf.editors.lemoe import LEMoEEditor

FRANCE, OAK, CURIE = (
    EditRequest("The capital of France is", "Rome"),
    EditRequest("An oak is", "metal"),
    EditRequest("Marie Curie was born in", "Lisbon"),
)
LAYER = "model.layers.1.mlp.down_proj"
EDITORS: dict[str, Callable[[Any], Any]] = {
    "ibke": lambda model: IBKEEditor.for_backbone(model, latent_length=2, latent_dim=8),
    "ft": lambda model: FineTuningEditor.for_backbone(model, steps=1),
    "grace": lambda model: GRACEEditor.for_backbone(model, steps=1),
    "lemoe": lambda model: LEMoEEditor.for_backbone(model, steps=1),
}


@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_on_top_of_another_names_the_requests_of_both(
    name: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("qwen3")
    editor = EDITORS[name](model)
    first = editor.edit(model, tiny_tokenizer, [FRANCE])
    both = editor.edit(model, tiny_tokenizer, [OAK], previous=first)
    assert both.info.requests == (FRANCE, OAK)
    sequential = editor.edit(model, tiny_tokenizer, [OAK, CURIE], mode="sequential", previous=first)
    assert sequential.info.requests == (FRANCE, OAK, CURIE)
    rows = editor.edit(model, tiny_tokenizer, [OAK, CURIE], mode="independent", previous=first)
    assert [row.info.requests for row in rows] == [(FRANCE, OAK), (FRANCE, CURIE)]
    assert rows.select([1]).info.requests == (FRANCE, CURIE)
    rows[1].save_pretrained(tmp_path)
    assert type(rows).from_pretrained(tmp_path).info == rows[1].info


def edit_of(*requests: EditRequest, number: int = 1, **info: Any) -> LowRankEdit:
    factors = {LAYER: torch.ones(number, 1, 48)}, {LAYER: torch.ones(number, 1, 32)}
    return LowRankEdit(*factors, EditInfo(requests, "IBKE", "tiny", **info))


def test_composed_independent_edits_keep_the_requests_of_their_own_rows() -> None:
    many, one = edit_of(FRANCE, OAK, number=2), edit_of(CURIE)
    assert [row.info.requests for row in one.compose(many)] == [(CURIE, FRANCE), (CURIE, OAK)]
    assert [row.info.requests for row in many.compose(many, one)] == [(FRANCE, FRANCE, CURIE), (OAK, OAK, CURIE)]
    twice = many.compose(one).select([1, 0])
    assert [row.info.requests for row in twice] == [(OAK, CURIE), (FRANCE, CURIE)]
    assert edit_of(FRANCE, OAK).info.requests_of(0, 1) == (FRANCE, OAK)
    assert edit_of(FRANCE, OAK, number=3)[2].info.requests == (FRANCE, OAK)  # nothing tells them apart
    assert with_rows(EditInfo(), [(), ()]) == EditInfo()


def test_a_composed_edit_names_every_editor_and_layer() -> None:
    one = edit_of(FRANCE, fingerprint={LAYER: [1.0]})
    two = edit_of(OAK, fingerprint={LAYER: [2.0], "other": [3.0]})
    object.__setattr__(two.info, "editor", "ROME")
    info = one.compose(two).compose(one).info
    assert (info.editor, info.backbone) == ("IBKE + ROME", "tiny")
    assert info.fingerprint == {LAYER: [1.0], "other": [3.0]}


def heard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "differ from those" in record.getMessage()]


def edit_for(model: Any) -> LowRankEdit:
    info = describe(model, modules_to_edit(model, [LAYER]), [FRANCE], editor="IBKE", backbone="tiny")
    return LowRankEdit({LAYER: torch.full((1, 1, 48), 0.1)}, {LAYER: torch.full((1, 1, 32), 0.1)}, info)


def test_another_backbone_of_equal_shapes_is_told(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    one.config.name_or_path, other.config.name_or_path = "one", "other"
    edit = edit_for(one)
    with edit.attached(one), edit.to(torch.bfloat16).attached(tiny_model("qwen3").to(torch.bfloat16)):
        assert not heard(caplog)
    with edit.attached(other):
        assert len(heard(caplog)) == 1
        assert "made on one, and the weights of other differ" in heard(caplog)[0]
    FineTuningEditor.for_backbone(other, [1], steps=1).edit(other, tiny_tokenizer, [OAK], previous=edit)
    assert any("the previous edit" in message for message in heard(caplog))


def test_another_backbone_is_merged_into_by_force_alone(tiny_model: Callable[..., Any]) -> None:
    one, other = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    weight = other.model.layers[1].mlp.down_proj.weight
    before = weight.clone()
    with pytest.raises(
        BackboneError, match=r"weights of .* differ from those .*force=True, on the command line --force"
    ):
        edit_for(one).merge_into(other)
    assert torch.equal(weight, before)
    merged = edit_for(one).merge_into(other, force=True)
    assert not torch.equal(weight, before)
    merged.undo()
    assert torch.equal(weight, before)
    edit_for(one).merge_into(one)
