"""Edits solved together: the closed form, one alone as it is, no order, any of them taken out again."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from saved_edits import change

from ibke_hf import EditRequest, IBKEEditor
from ibke_hf.core import modeling_ibke
from ibke_hf.core.adapter_schema import CONFIG, INFO, KEYS, WEIGHTS, AdapterError
from ibke_hf.core.composition import RIDGE, SolvedEdit, keys_and_shifts
from ibke_hf.core.edit_values import EditInfo
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.tokens import IGNORED, encode_requests
from ibke_hf.editors.saved import load_edit, load_weight_edit

NAME, WIDE = "layer", "other"
D_IN, D_OUT = 7, 5


def edit(seed: int, tokens: int = 3, number: int = 1, names: tuple[str, ...] = (NAME,)) -> LowRankEdit:
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(number, tokens, width, generator=generator) for name in names}

    info = EditInfo(requests=tuple(EditRequest(f"{seed}.{i} is", "x") for i in range(number)), editor="test")
    return LowRankEdit(rows(D_IN), rows(D_OUT), info, keys=rows(D_IN))


def update(one: Any, row: int = 0, name: str = NAME) -> torch.Tensor:
    return one.weight_updates(name)[row]


def naive(edits: list[LowRankEdit], ridge: float, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """(XᵀX + λC)⁻¹XᵀS in fp64, over real tokens alone."""
    pairs = [keys_and_shifts(one, NAME) for one in edits]
    x = torch.cat([keys[0] for keys, _ in pairs]).double()
    s = torch.cat([shifts[0] for _, shifts in pairs]).double()
    c = torch.eye(x.shape[1], dtype=torch.double) if covariance is None else covariance.double()
    gram = x @ torch.linalg.inv(c) @ x.T
    penalty = ridge * gram.diagonal()[x.norm(dim=1) > 0].mean()
    return torch.linalg.inv(x.T @ x + penalty * c) @ x.T @ s


@pytest.mark.parametrize("ridge", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("number", [2, 6])
def test_the_update_is_the_ridge_regression_over_all_keys(ridge: float, number: int) -> None:
    edits = [edit(seed) for seed in range(number)]
    solved = SolvedEdit.of(edits, ridge)
    torch.testing.assert_close(update(solved).double(), naive(edits, ridge), rtol=1e-4, atol=2e-4)
    assert solved.matrices(NAME)[0].shape[2] <= D_OUT or number == 2  # never above the narrower side once past it


def test_keys_of_a_corpus_whiten_it() -> None:
    edits, keys = [edit(1), edit(2)], torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))
    covariance = keys.T @ keys / 50
    solved = SolvedEdit.of(edits, 0.1, {NAME: covariance})
    torch.testing.assert_close(update(solved).double(), naive(edits, 0.1, covariance), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(update(solved), update(SolvedEdit.of(edits, 0.1)), atol=1e-3)


def test_a_small_ridge_does_what_each_edit_does_where_it_was_made() -> None:
    edits = [edit(1, tokens=2), edit(2, tokens=2), edit(3, tokens=2)]  # six keys in seven dimensions
    total = update(SolvedEdit.of(edits, 1e-7))
    for one in edits:
        keys, shifts = keys_and_shifts(one, NAME)
        torch.testing.assert_close(keys[0] @ total, shifts[0], rtol=1e-2, atol=1e-2)


def test_padding_counts_for_nothing() -> None:
    edits = [edit(1), edit(2)]
    wider = [{NAME: torch.nn.functional.pad(one.keys[NAME], (0, 0, 0, 4))} for one in edits]
    padded = [LowRankEdit(one.inputs, one.outputs, keys=keys) for one, keys in zip(edits, wider, strict=True)]
    torch.testing.assert_close(update(SolvedEdit.of(padded)), update(SolvedEdit.of(edits)))


def test_one_edit_alone_is_left_as_it_is() -> None:
    one = edit(1)
    assert SolvedEdit.of([one]) is one
    assert SolvedEdit.of([one, edit(2)]).without(1) is one


def test_order_does_not_matter() -> None:
    edits = [edit(seed) for seed in range(4)]
    first, *others = [update(SolvedEdit.of(order)) for order in permutations(edits)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_an_edit_that_is_taken_out_was_never_in() -> None:
    edits = [edit(seed) for seed in range(5)]
    solved = SolvedEdit.of(edits)
    for place in range(5):
        rest = [one for i, one in enumerate(edits) if i != place]
        torch.testing.assert_close(update(solved.without(place)), update(SolvedEdit.of(rest)), rtol=1e-4, atol=1e-4)
    assert torch.equal(update(solved.without(0, -1)), update(SolvedEdit.of(edits[1:-1])))
    assert [r.prompt for r in solved.without(1).info.requests] == ["0.0 is", "2.0 is", "3.0 is", "4.0 is"]
    again = solved.without(2).compose(edits[2])
    torch.testing.assert_close(update(again), update(solved), rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match="edit 5 of 5"):
        solved.without(5)
    with pytest.raises(ValueError, match="all 5 edits would be taken out"):
        solved.without(0, 1, 2, 3, 4)


def test_independent_edits_are_solved_row_by_row() -> None:
    several, shared = edit(1, number=3), edit(2)
    solved = SolvedEdit.of([several, shared])
    assert len(solved) == 3
    for row in range(3):
        alone = SolvedEdit.of([several[row], shared])
        torch.testing.assert_close(update(solved, row), update(alone), rtol=1e-4, atol=1e-4)
        assert solved[row].info.requests == alone.info.requests
    chosen = solved.select([2, 0, 2])
    for place, row in enumerate([2, 0, 2]):
        assert torch.equal(update(chosen, place), update(solved, row))
    torch.testing.assert_close(update(chosen.without(1), 1), update(several, 0))
    with pytest.raises(IndexError, match="at least one of the 3"):
        solved.select([3])


def test_layers_that_only_some_edits_have() -> None:
    solved = SolvedEdit.of([edit(1, names=(NAME, WIDE)), edit(2)])
    assert solved.layers == (NAME, WIDE)
    alone = edit(1, names=(NAME, WIDE))
    (keys,), (shifts,) = keys_and_shifts(alone, WIDE)
    penalty = RIDGE * keys.square().sum(-1).mean()
    expected = torch.linalg.inv(keys.T @ keys + penalty * torch.eye(D_IN)) @ keys.T @ shifts
    torch.testing.assert_close(update(solved, name=WIDE), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_cannot_be_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge must be above 0"):
        SolvedEdit.of([edit(1), edit(2)], ridge)


def test_an_edit_without_keys_is_named() -> None:
    bare = LowRankEdit(edit(2).inputs, edit(2).outputs, EditInfo(editor="someone"))
    with pytest.raises(ValueError, match=r"edit 1 \(someone\) does not carry the inputs"):
        SolvedEdit.of([edit(1), bare])


# --- by an editor ---------------------------------------------------------------------------------------------------

CITIES = [EditRequest(f"The {city} tower is in", target) for city, target in (("Oslo", "Rome"), ("Bern", "Lima"))]


@pytest.fixture
def editor(tiny_model: Any) -> Any:
    torch.manual_seed(0)  # a key that is rounded to 16 bit the other way would be a difference
    editor = IBKEEditor.for_backbone(tiny_model(), [1, 2], latent_dim=8, latent_length=2).eval()
    for statistics in editor.statistics:
        statistics.count.fill_(1)
    return editor


def test_an_editor_makes_each_edit_on_the_unedited_model_and_solves_them(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    both = editor.edit(model, tiny_tokenizer, CITIES, mode="sequential")
    alone = [editor.edit(model, tiny_tokenizer, [request], composition="solve") for request in CITIES]
    assert isinstance(both, SolvedEdit) and all(isinstance(one, LowRankEdit) for one in alone)
    assert both.info.requests == tuple(CITIES)
    expected = SolvedEdit.of(alone, editor.config.ridge)
    later = editor.edit(model, tiny_tokenizer, CITIES[1:], mode="sequential", previous=alone[0])
    rows = editor.edit(model, tiny_tokenizer, CITIES, mode="independent", previous=alone[0])
    for name in both.layers:
        torch.testing.assert_close(update(both, name=name), update(expected, name=name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(update(later, name=name), update(expected, name=name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(update(rows, 1, name), update(expected, name=name), rtol=1e-4, atol=1e-6)
    assert update(both.without(1), name=both.layers[0]).equal(update(both.parts[0], name=both.layers[0]))


def test_a_solved_edit_is_attached_undone_and_saved_as_an_adapter(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, ids = tiny_model(), torch.arange(1, 7)[None]
    before = model(ids).logits
    solved = editor.edit(model, tiny_tokenizer, CITIES, mode="sequential")
    with solved.attached(model):
        edited = model(ids).logits
    assert not torch.equal(edited, before)
    assert torch.equal(model(ids).logits, before)
    solved.save_pretrained(tmp_path / "edit")
    saved = LowRankEdit.from_pretrained(tmp_path / "edit")
    assert saved.info.requests == tuple(CITIES)
    with saved.attached(model):
        torch.testing.assert_close(model(ids).logits, edited, rtol=1e-4, atol=1e-5)


def test_edits_are_summed_where_the_config_or_the_call_says_so(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model()
    editor = IBKEEditor.for_backbone(model, [1], latent_dim=8, latent_length=2)
    assert isinstance(editor.edit(model, tiny_tokenizer, CITIES, mode="sequential"), SolvedEdit)
    summed = editor.edit(model, tiny_tokenizer, CITIES, mode="sequential", composition="sum")
    assert isinstance(summed, LowRankEdit) and not summed.keys
    first = editor.edit(model, tiny_tokenizer, CITIES[:1])
    assert summed == editor.edit(model, tiny_tokenizer, CITIES[1:], previous=first, composition="sum")
    editor.config.composition = "sum"
    assert editor.edit(model, tiny_tokenizer, CITIES, mode="sequential") == summed
    with pytest.raises(StrictDataclassError, match="composition must be one of auto, sum, solve, found 'mean'"):
        IBKEEditor.for_backbone(model, [1], latent_dim=8, composition="mean")
    with pytest.raises(ValueError, match="composition must be one of sum, solve, found 'mean'"):
        editor.edit(model, tiny_tokenizer, CITIES, composition="mean")


def test_what_was_made_without_keys_is_summed_and_said_to_be(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any, caplog: Any
) -> None:
    model = tiny_model()
    old = replace(editor.edit(model, tiny_tokenizer, CITIES[:1]), keys={})
    with caplog.at_level("WARNING"):
        both = editor.edit(model, tiny_tokenizer, CITIES[1:], previous=old)
    assert "does not carry the inputs that it was made for" in caplog.text
    assert both == editor.edit(model, tiny_tokenizer, CITIES[1:], previous=old, composition="sum")
    with pytest.raises(ValueError, match=r"edit 0 .* does not carry the inputs"):
        editor.edit(model, tiny_tokenizer, CITIES[1:], previous=old, composition="solve")


def test_keys_are_inputs_under_the_edit_as_long_as_they_count(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model()
    rows = editor.edit(model, tiny_tokenizer, CITIES, mode="independent", composition="solve")
    for row, request in enumerate(CITIES):
        batch = encode_requests(tiny_tokenizer, [request])
        one = editor.edit(model, tiny_tokenizer, [request], composition="solve")
        edited, plain = editor.capture(model, batch, one), editor.capture(model, batch)
        length = torch.where(batch.labels[0] != IGNORED, 2.0, 1.0)[:, None]
        for layer, name in enumerate(one.layers):
            inputs = edited[layer].layer_inputs[0]
            assert torch.allclose(inputs, plain[layer].layer_inputs[0]) == (layer == 0)
            expected = inputs / inputs.norm(dim=-1, keepdim=True) * length
            torch.testing.assert_close(one.keys[name][0].float(), expected, rtol=1e-3, atol=1e-3)
            ours = rows.keys[name][row].float()
            torch.testing.assert_close(ours[-len(expected) :], expected, rtol=1e-3, atol=1e-3)
            assert not ours[: -len(expected)].any()


@pytest.mark.parametrize("mode", ["joint", "independent", "sequential"])
def test_a_lone_edit_takes_one_pass_and_is_what_it_was(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    model = tiny_model()
    passes: list[Any] = []
    model.register_forward_pre_hook(lambda *_: passes.append(mode))
    requests = CITIES[: 1 if mode == "sequential" else 2]
    one = editor.edit(model, tiny_tokenizer, requests, mode=mode)
    assert len(passes) == 1
    assert replace(one, keys={}) == editor.edit(model, tiny_tokenizer, requests, mode=mode, composition="sum")
    read = editor.edit(model, tiny_tokenizer, requests, mode=mode, composition="solve")
    assert replace(read, keys={}) == replace(one, keys={}) and one.has_keys and read.has_keys
    lowest, upper = one.layers  # the lowest layer reads the same whether the edit is there or not
    torch.testing.assert_close(one.keys[lowest], read.keys[lowest])
    lengths = [edit.keys[upper].float().norm(dim=-1) for edit in (one, read)]
    torch.testing.assert_close(*lengths, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(one.keys[upper], read.keys[upper], atol=1e-2)


def test_a_long_sequence_is_made_in_lots(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [EditRequest(f"The tower of {i} is in", f"city {i}") for i in range(5)]
    whole = editor.edit(tiny_model(), tiny_tokenizer, requests, mode="sequential")
    monkeypatch.setattr(modeling_ibke, "EDITS_AT_ONCE", 2)
    lots = editor.edit(tiny_model(), tiny_tokenizer, requests, mode="sequential")
    assert [part.info.requests for part in lots.parts] == [(request,) for request in requests]
    for name in whole.layers:
        torch.testing.assert_close(update(lots, name=name), update(whole, name=name), rtol=1e-3, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------------------------


def test_keys_are_saved_beside_the_adapter_and_old_files_have_none(
    editor: Any, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model()
    one, two = (editor.edit(model, tiny_tokenizer, [request]) for request in CITIES)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two", keys=False)
    back = LowRankEdit.from_pretrained(tmp_path / "one")
    assert back == one and back.keys.keys() == one.keys.keys()
    for name, keys in one.keys.items():
        assert keys.itemsize == 2 and torch.equal(back.keys[name], keys)
    assert json.loads((tmp_path / "one" / INFO).read_text())["keys"] == KEYS
    assert not (tmp_path / "two" / KEYS).exists() and not LowRankEdit.from_pretrained(tmp_path / "two").keys
    expected, again = one.compose(two, how="solve"), back.compose(two, how="solve")
    assert expected == again and all(update(again, name=n).equal(update(expected, name=n)) for n in again.layers)
    (tmp_path / "one" / KEYS).unlink()
    with pytest.raises(AdapterError, match=r"no keys\.safetensors"):
        LowRankEdit.from_pretrained(tmp_path / "one")


def test_keys_without_padding_in_16_bit_whatever_their_size(tmp_path: Path) -> None:
    for size, dtype in ((1.0, torch.float16), (1e6, torch.bfloat16), (1e-6, torch.bfloat16)):
        keys = {NAME: edit(1).keys[NAME] * size}
        padded = {NAME: torch.nn.functional.pad(keys[NAME], (0, 0, 2, 0))}
        replace(edit(1), keys=padded).save_pretrained(tmp_path)
        stored = LowRankEdit.from_pretrained(tmp_path).keys[NAME]
        assert stored.dtype is dtype and torch.equal(stored, keys[NAME].to(dtype))


@pytest.mark.parametrize("covariance", [None, {NAME: torch.eye(D_IN) + 0.5}])
def test_a_solved_edit_comes_back_with_parts_that_can_be_taken_out(tmp_path: Path, covariance: Any) -> None:
    edits = [edit(seed, tokens=seed) for seed in (2, 3, 4)]
    solved = SolvedEdit.of(edits, 0.2, covariance)
    solved.save_pretrained(tmp_path)
    back = SolvedEdit.from_pretrained(tmp_path)
    assert (
        back.info == solved.info
        and back.ridge == 0.2
        and [part.info for part in back.parts] == [one.info for one in edits]
    )
    assert load_edit(tmp_path) == back and load_weight_edit(tmp_path) == back
    torch.testing.assert_close(update(back), update(solved), rtol=1e-2, atol=5e-3)  # keys in 16 bit
    adapter = LowRankEdit.from_pretrained(tmp_path)
    torch.testing.assert_close(update(adapter), update(back), rtol=1e-5, atol=1e-6)
    for place in range(3):
        rest = SolvedEdit.of([one for i, one in enumerate(back.parts) if i != place], 0.2, covariance)
        torch.testing.assert_close(update(back.without(place)), update(rest), rtol=1e-4, atol=1e-4)
    assert back.without(0, 1) == edits[2]
    again = back.without(1).compose(edits[1])
    torch.testing.assert_close(update(again), update(solved), rtol=1e-2, atol=5e-3)


def test_an_edit_saved_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    SolvedEdit.of([edit(1), edit(2)]).save_pretrained(tmp_path)
    edit(3).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG, INFO, KEYS}
    with pytest.raises(AdapterError, match="load it with LowRankEdit"):
        SolvedEdit.from_pretrained(tmp_path)
    SolvedEdit.of([edit(1), edit(2)]).save_pretrained(tmp_path, rank=2)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG, INFO}
    assert isinstance(load_edit(tmp_path), LowRankEdit)


@pytest.mark.parametrize(
    "solved",
    [{"ridge": 0, "parts": [{}]}, {"ridge": 0.1, "parts": []}, {"ridge": 0.1}, [], {"ridge": 1, "parts": [1]}],
)
def test_a_damaged_description_of_the_parts_is_refused(tmp_path: Path, solved: Any) -> None:
    SolvedEdit.of([edit(1), edit(2)]).save_pretrained(tmp_path)
    change(tmp_path / INFO, solved=solved)
    with pytest.raises(AdapterError, match="solved must be an object with a ridge above 0 and the edits in a list"):
        SolvedEdit.from_pretrained(tmp_path)


def test_parts_that_the_description_does_not_know_are_refused(tmp_path: Path) -> None:
    SolvedEdit.of([edit(1), edit(2)]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / INFO).read_text())["solved"]
    change(tmp_path / INFO, solved={**content, "parts": content["parts"][:1]})
    with pytest.raises(AdapterError, match=r"is of none of the 1 edits"):
        SolvedEdit.from_pretrained(tmp_path)
    change(tmp_path / INFO, solved={**content, "parts": [*content["parts"], content["parts"][0]]})
    with pytest.raises(AdapterError, match="an edit needs both factors"):
        SolvedEdit.from_pretrained(tmp_path)


def test_keys_that_do_not_belong_to_the_edit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys of 'layer' must be \(1, l, 7\)"):
        replace(edit(1), keys={NAME: torch.zeros(1, 3, 6)})
    with pytest.raises(ValueError, match="keys of 'other', a layer that the edit does not change"):
        replace(edit(1), keys={WIDE: torch.zeros(1, 3, 7)})


def test_edits_compose_as_they_are_told_to() -> None:
    one, two = edit(1), edit(2)
    solved = one.compose(two, how="solve", ridge=0.3)
    assert solved == SolvedEdit.of([one, two], 0.3) and solved != SolvedEdit.of([one, two], 0.2)
    assert one.compose(how="solve") is one
    torch.testing.assert_close(update(solved.compose(two, how="sum")), update(solved) + update(two))
    torch.testing.assert_close(update(one.compose(solved)), update(one) + update(solved))
    assert one.compose(two).keys == {} and one.compose().keys is one.keys
    metric = {NAME: torch.eye(D_IN) * 2}
    assert one.compose(two, how="solve", covariance=metric) == SolvedEdit.of([one, two], covariance=metric)
    with pytest.raises(ValueError, match="how must be one of sum, solve, found 'mean'"):
        one.compose(two, how="mean")
    with pytest.raises(ValueError, match="summed without a ridge"):
        one.compose(two, ridge=0.1)
