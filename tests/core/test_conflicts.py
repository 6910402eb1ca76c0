"""What speaks against carrying edits together is named by index and request, wherever they get company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from ibke_hf import Conflict, EditRequest, IBKEEditor, conflicts
from ibke_hf.atlas import load_backbone, load_editor, load_records
from ibke_hf.core import composition, modeling_ibke
from ibke_hf.core.conflicts import conflict_warning, conflicting_requests
from ibke_hf.core.edit_values import EditInfo
from ibke_hf.core.edits import LowRankEdit

OSLO = EditRequest("The capital of Norway is", "Oslo", "Norway")
ROME = EditRequest("The capital of Norway is", "Rome", "Norway")
LIMA = EditRequest("Norway's capital is", "Lima", "Norway")
FAR = EditRequest("The author of Faust is", "Goethe", "Faust")


def edit(request: EditRequest, last_key: list[float] | None = None) -> LowRankEdit:
    keys = torch.tensor([[[0.0, 0.0, 0.0], [0.6, 0.8, 0.0], last_key or [0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]])
    tensors = {"layer": torch.ones(1, 1, 3)}
    return LowRankEdit(tensors, tensors, EditInfo(requests=(request,)), keys={"layer": keys} if last_key else {})


def test_requests_tell_what_overrides_and_what_contradicts() -> None:
    assert conflicts([edit(OSLO), edit(FAR), edit(ROME), edit(LIMA)]) == [
        Conflict("override", 0, 2, (OSLO, ROME)),
        Conflict("contradiction", 0, 3, (OSLO, LIMA)),
        Conflict("contradiction", 2, 3, (ROME, LIMA)),
    ]
    same = replace(OSLO, target="oslo.")
    assert conflicts([edit(OSLO), edit(FAR), edit(same), edit(replace(LIMA, target="Oslo"))]) == []
    assert conflicts([edit(replace(ROME, subject=None)), edit(replace(LIMA, subject=None))]) == []
    (first, *_) = conflicting_requests([[OSLO], [LIMA], [ROME]])
    assert first.kind == "override" and (first.first, first.second) == (0, 2)


def test_keys_tell_what_a_layer_can_hardly_tell_apart() -> None:
    near, far = EditRequest("Faust was written by", "Schiller"), EditRequest("An oak is", "a tree")
    edits = [edit(FAR, [0.0, 0.1, 2.0]), edit(far, [0.0, 2.0, 0.1]), edit(near, [0.0, 0.3, 2.0])]
    (conflict,) = conflicts(edits)
    assert (conflict.kind, conflict.first, conflict.second) == ("same keys", 0, 2)
    assert conflict.similarity == pytest.approx(0.995, abs=1e-3) and conflict.requests == (FAR, near)
    assert conflicts([edits[0], replace(edits[2], info=EditInfo(requests=(replace(near, target="Goethe"),)))]) == []


def test_a_warning_names_the_edits_and_counts_the_others() -> None:
    assert conflict_warning([]) == ""
    text = conflict_warning(conflicts([edit(OSLO), edit(ROME)]))
    assert "edit 1 ('The capital of Norway is' -> 'Rome') overrides one of the same prompt, edit 0 (" in text
    many = conflicts([edit(replace(OSLO, target=str(number))) for number in range(4)])
    assert len(many) == 6 and "; and 3 more" in conflict_warning(many) and "\n" not in conflict_warning(many)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    for module in (composition, modeling_ibke):
        monkeypatch.setattr(module.logger, "warning_once", texts.append)
    return texts


@pytest.mark.parametrize("how", ["sum", "solve"])
def test_compose_says_what_is_at_odds(said: list[str], how: str) -> None:
    one, other, third = (edit(request, [0.0, 0.0, 2.0]) for request in (OSLO, ROME, replace(ROME, target="Oslo")))
    one.compose(third, how=how)
    assert said == []
    one.compose(other, how=how)
    (text,) = said
    assert "edit 1 ('The capital of Norway is' -> 'Rome')" in text
    one.compose(third, how="solve").compose(other, how=how)
    assert len(said) == 2


def test_an_editor_says_what_is_at_odds_with_what_the_model_carries(
    said: list[str], tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    editor = IBKEEditor.for_backbone(model, [1], latent_dim=8, latent_length=2)
    for how in ("solve", "sum"):
        first = editor.edit(model, tiny_tokenizer, [OSLO], composition=how)
        editor.edit(model, tiny_tokenizer, [OSLO, ROME], mode="independent", composition=how)
        editor.edit(model, tiny_tokenizer, [FAR, OSLO], mode="sequential", composition=how)
        assert said == []
        for mode in ("joint", "sequential", "independent"):
            editor.edit(model, tiny_tokenizer, [ROME], mode=mode, previous=first, composition=how)
            assert len(said) == 1 and "edit 1 ('The capital of Norway is' -> 'Rome')" in said.pop()
        for mode in ("joint", "sequential"):
            editor.edit(model, tiny_tokenizer, [OSLO, FAR, LIMA], mode=mode, composition=how)
            assert len(said) == 1 and "edit 2 (\"Norway's capital is\" -> 'Lima') is of the same subject" in said.pop()


def test_one_prompt_with_two_targets_has_the_same_keys_at_the_lowest_layer(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    editor = IBKEEditor.for_backbone(model, [1, 2], latent_dim=8, latent_length=2)
    for how in ("auto", "solve"):
        editor.config.composition = how
        edits = [
            editor.edit(model, tiny_tokenizer, [request]) for request in (FAR, replace(FAR, target="A. N. Other"))
        ]
        unnamed = [replace(edits[0], info=EditInfo(requests=(FAR,)))]
        unnamed += [replace(edits[1], info=EditInfo(requests=(EditRequest("Who wrote it?", "A. N. Other"),)))]
        (conflict,) = conflicts(unnamed)
        assert conflict.kind == "same keys" and conflict.similarity == pytest.approx(1, abs=1e-3)


def test_the_threshold_reports_what_its_docstring_says_of_atlas() -> None:
    """The figures beside `NEARLY`, made anew: edits of all validation records, and others of the same facts."""
    model, tokenizer = load_backbone()
    editor, records = load_editor(), load_records("validation")
    requests = [request for record in records for request in record.requests]
    others = [requests[(place + 7) % len(requests)].target for place in range(len(requests))]
    rephrased = [
        (place, replace(requests[place], prompt=case.prompt, target=others[place]))
        for place, record in enumerate(records)
        for case in record.generality
        if case.criteria and set(case.criteria) <= {"Rephrase"}
    ]

    def unnamed(asked: Sequence[EditRequest]) -> list[LowRankEdit]:
        """Edits whose keys alone tell: no request is like another."""
        parts = chain.from_iterable(
            editor.edit(model, tokenizer, asked[start : start + 32], mode="independent")
            for start in range(0, len(asked), 32)
        )
        return [replace(one, info=EditInfo(requests=(EditRequest(f"q{i}", f"a{i}"),))) for i, one in enumerate(parts)]

    edits = unnamed(requests)
    facts = [(request.subject, record.relation) for request, record in zip(requests, records, strict=True)]
    assert sum(facts[i] != facts[j] for i in range(300) for j in range(i)) == 44_846
    assert sum(facts[one.first] != facts[one.second] for one in conflicts(edits)) == 2
    second = unnamed([replace(request, target=other) for request, other in zip(requests, others, strict=True)])
    far = replace(EditInfo(), requests=(EditRequest("another", "target"),))
    assert all(conflicts([one, replace(two, info=far)]) for one, two in zip(edits, second, strict=True))
    third = unnamed([request for _, request in rephrased])
    near = [bool(conflicts([edits[i], replace(e, info=far)])) for (i, _), e in zip(rephrased, third, strict=True)]
    assert 100 * sum(near) / len(near) == pytest.approx(27, abs=1)
