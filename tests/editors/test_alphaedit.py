"""The AlphaEdit baseline: null space, closed form in factors, spreading over layers, protected earlier edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from located_edits import REQUESTS, hits
from memory_edits import FAMILIES

from ibke_hf.core.capture import target_logits
from ibke_hf.core.edits import EditInfo, LowRankEdit
from ibke_hf.core.layers import modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, encode_requests, pad_and_label
from ibke_hf.editors.alphaedit import AlphaEditConfig, AlphaEditEditor, joined, null_space_update
from ibke_hf.editors.locate.key_statistics import KeyStatistics, read_layers
from ibke_hf.editors.locate.search import ValueSearch
from ibke_hf.editors.locate.states import HIDDEN, last_block, read_states
from ibke_hf.editors.locate.texts import ask

TEXTS = ["Paris is in a", "A sparrow of", "the Thames"]  # fewer tokens than the layers have dimensions


def setting(
    tiny_model: Callable[..., Any], tokenizer: Any, family: str = "qwen3", **config: Any
) -> tuple[Any, AlphaEditEditor]:
    """A model that edits are easy in, with an editor of its two lower layers that leaves all of the corpus alone."""
    model = tiny_model(family, initializer_range=0.15)
    statistics = KeyStatistics.of(model, tokenizer, TEXTS, [0, 1], progress=False)
    settings = {
        "prefixes": 0,
        "clamp": 50.0,
        "steps": 30,
        "kl_factor": 0.0,
        "null_threshold": 1e-6,
        "regularisation": 1e-4,
    }
    return model, AlphaEditEditor.for_backbone(model, statistics=statistics, **{**settings, **config})


def corpus_outputs(model: Any, tokenizer: Any, edit: Any, names: Any) -> dict[str, torch.Tensor]:
    """Return what each layer maps each of the corpus' keys to."""
    batch = pad_and_label([([*ids, 0], len(ids)) for ids in tokenizer(TEXTS)["input_ids"]])
    modules = modules_to_edit(model, list(names))
    outputs = {}
    for name in names:  # one layer's update at a time: a lower layer's would change its input
        single = LowRankEdit({name: edit.inputs[name]}, {name: edit.outputs[name]})
        with single.attached(model):
            outputs[name] = read_layers(model, {name: modules[name]}, batch)[name][1][batch.attention_mask.bool()]
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_preserved_keys_keep_their_outputs_and_the_model_answers(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    original = target_logits(model, batch)[0].detach()
    independent = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert all(hits(model, tiny_tokenizer, independent))
    assert independent.ranks == dict.fromkeys(editor.config.module_names(), 1)
    nothing = LowRankEdit(independent.inputs, {name: 0 * rows for name, rows in independent.outputs.items()})
    for row in range(3):
        expected = corpus_outputs(model, tiny_tokenizer, nothing[row], independent.layers)
        for name, outputs in corpus_outputs(model, tiny_tokenizer, independent[row], independent.layers).items():
            torch.testing.assert_close(outputs, expected[name], rtol=1e-4, atol=1e-4)
            assert independent[row].weight_update(name).norm() > 0.1
    assert torch.equal(target_logits(model, batch)[0], original)
    assert all(
        torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("earlier", [0, 3])
def test_the_factors_are_the_papers_closed_form(earlier: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q
    projection = torch.eye(8) - basis @ basis.T
    old, new = (
        torch.randn(8, earlier, generator=generator),
        torch.randn(8, 2, generator=generator),
    )  # keys as columns, as in the paper
    residual = torch.randn(4, 2, generator=generator)
    expected = (
        residual @ new.T @ projection @ torch.linalg.inv((old @ old.T + new @ new.T) @ projection + 0.3 * torch.eye(8))
    )  # Eq. 14
    keys = (projection @ torch.cat((old, new), 1)).T.unsqueeze(0)
    outputs = null_space_update(keys, residual.T.unsqueeze(0), 0.3)
    torch.testing.assert_close((keys[0].T @ outputs[0]).T, expected, rtol=1e-4, atol=1e-4)


def test_the_null_space_is_relative_to_the_mean_moment(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Keys ten times as large leave the same directions free: the threshold means the same in every backbone."""
    model, editor = setting(tiny_model, tiny_tokenizer, null_threshold=0.5)
    modules = modules_to_edit(model, editor.config.module_names())
    larger = {name: 100 * moment for name, moment in editor.statistics.moments.items()}
    scaled = AlphaEditEditor(editor.config, replace(editor.statistics, moments=larger))
    for name, module in modules.items():
        values = torch.linalg.eigvalsh(editor.statistics.moments[name].double())
        expected = int((values > 0.5 * values.mean()).sum())
        assert 0 < expected < len(values)
        for one in (editor, scaled):
            assert one._occupied_by_corpus(name, module).shape == (len(values), expected)


def test_regularisation_is_relative_to_the_keys_of_the_corpus(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ means the same for every layer and backbone: a part of the corpus' mean ‖k‖², the trace of its moment."""
    model, editor = setting(tiny_model, tiny_tokenizer, regularisation=0.25, steps=1)
    strengths: list[float] = []
    monkeypatch.setattr(
        "ibke_hf.editors.alphaedit.null_space_update",
        lambda keys, residual, strength: strengths.append(strength) or null_space_update(keys, residual, strength),
    )
    editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    moments = editor.statistics.moments
    traces = [float(moments[name].trace()) for name in editor.config.module_names()]
    assert strengths == pytest.approx([0.25 * trace for trace in traces])
    assert abs(traces[0] / traces[1] - 1) > 0.01  # the layers differ, so that a constant would not do


def test_the_residual_is_spread_over_the_layers(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, "gptj")
    changes: list[torch.Tensor] = []
    run = ValueSearch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValueSearch, "run", lambda search, *sizes: changes.append(run(search, *sizes)) or changes[-1])
        edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    first, second = editor.config.module_names()
    asked = ask(tiny_tokenizer, REQUESTS, [], "{} is a", 128).requests
    modules = {**modules_to_edit(model, [first, second]), HIDDEN: last_block(model, editor.config)}

    def states(*names: str) -> Any:
        edits = [LowRankEdit({n: edit.inputs[n] for n in names}, {n: edit.outputs[n] for n in names})] if names else []
        return read_states(model, modules, asked, edits, 10)

    value = states()[HIDDEN].outputs + changes[0]
    half = changes[0] / 2
    torch.testing.assert_close(
        states(first)[first].outputs - states()[first].outputs, half, rtol=0.02, atol=0.02 * float(half.abs().max())
    )
    torch.testing.assert_close(
        states(first, second)[HIDDEN].outputs, value, rtol=0.02, atol=0.02 * float(value.abs().max())
    )


def test_sequential_edits_keep_what_earlier_ones_stored(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer)
    first = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    both = editor.edit(model, tiny_tokenizer, REQUESTS[1:2], previous=first)
    sequential = editor.edit(model, tiny_tokenizer, REQUESTS[:2], mode="sequential")
    assert sequential.info.requests == REQUESTS[:2]
    moved, unprotected = [], []
    for name in editor.config.module_names():
        torch.testing.assert_close(sequential.weight_update(name), both.weight_update(name), rtol=1e-3, atol=1e-4)
        assert both.ranks[name] == 2  # no row is stored twice
        key = first.inputs[name][0, 0]  # of the first request, projected
        stored = key @ first.weight_update(name)
        moved.append(float((key @ both.weight_update(name) - stored).norm() / stored.norm()))
        alone = both.inputs[name][:, 1:]
        free = null_space_update(alone, alone @ (both.weight_update(name) - first.weight_update(name)), 1e-4)
        unprotected.append(float((key @ alone[0].T @ free[0]).norm() / stored.norm()))
    assert max(moved) < 0.01
    assert max(unprotected) > 10 * max(moved)
    both.save_pretrained(tmp_path)
    loaded = LowRankEdit.from_pretrained(tmp_path)
    assert loaded == both
    after = [editor.edit(model, tiny_tokenizer, REQUESTS[2:], previous=edit) for edit in (both, loaded)]
    assert after[0] == after[1]
    assert sum(hits(model, tiny_tokenizer, after[0])) >= 2


def test_independent_edits_equal_edits_of_one(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, stop_below=0.01)
    independent = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    stacked = editor.edit(model, tiny_tokenizer, REQUESTS[::-1], mode="independent", previous=independent)
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        for name in alone.layers:
            torch.testing.assert_close(
                independent[row].weight_update(name), alone.weight_update(name), rtol=1e-3, atol=1e-3
            )
    second = editor.edit(model, tiny_tokenizer, REQUESTS[-1:], previous=independent[0])
    for name in second.layers:
        torch.testing.assert_close(stacked[0].weight_update(name), second.weight_update(name), rtol=1e-3, atol=1e-3)


def test_edits_of_other_editors_are_contained_but_not_protected(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, steps=5)
    name, _ = editor.config.module_names()
    other = LowRankEdit(
        {name: torch.randn(1, 2, 48), "model.layers.3.mlp.down_proj": torch.randn(1, 1, 48)},
        {name: 0.1 * torch.randn(1, 2, 32), "model.layers.3.mlp.down_proj": torch.randn(1, 1, 32)},
        EditInfo(),
    )
    edit = editor.edit(model, tiny_tokenizer, REQUESTS[:1], previous=other)
    assert edit.ranks[name] == 3
    torch.testing.assert_close(edit.inputs[name][:, :2], other.inputs[name])
    torch.testing.assert_close(
        edit.outputs[name][:, :2], other.outputs[name]
    )  # nothing of the new update is in these rows
    assert torch.equal(edit.inputs["model.layers.3.mlp.down_proj"], other.inputs["model.layers.3.mlp.down_proj"])


def test_more_requests_than_dimensions_are_compressed_without_a_change(tiny_model: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    old = LowRankEdit(
        {"x": torch.randn(1, 5, 6, generator=generator)}, {"x": torch.randn(1, 5, 4, generator=generator)}
    )
    rows, outputs = (
        torch.cat((old.inputs["x"], torch.randn(1, 3, 6, generator=generator)), 1),
        torch.randn(1, 8, 4, generator=generator),
    )
    edit = joined(old, {"x": rows}, {"x": outputs})
    assert edit.ranks == {"x": 6}
    torch.testing.assert_close(
        edit.weight_update("x"), old.weight_update("x") + rows[0].T @ outputs[0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(edit.inputs["x"][0].T @ edit.inputs["x"][0], rows[0].T @ rows[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_edited_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.15).to(dtype)
    statistics = KeyStatistics.of(model, tiny_tokenizer, TEXTS, progress=False)
    editor = AlphaEditEditor.for_backbone(
        model, statistics=statistics, prefixes=2, clamp=50.0, steps=10, loss_scale=64.0
    )
    with torch.inference_mode():
        edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    assert all(
        tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for tensor in edit.tensors().values()
    )


def test_alphaedit_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model, editor = setting(tiny_model, tiny_tokenizer, steps=1)
    with pytest.raises(RequestError, match="request 1: it has no subject"):
        editor.edit(model, tiny_tokenizer, [REQUESTS[0], EditRequest("a b", "c")])
    with pytest.raises(ValueError, match="mode must be one of"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="all")  # type: ignore[arg-type]
    several = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    with pytest.raises(ValueError, match='needs mode="independent"'):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential", previous=several)
    texts = [f"{a} {b} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrst"]
    many = KeyStatistics.of(model, tiny_tokenizer, texts, [0, 1], progress=False)
    full = AlphaEditEditor.for_backbone(model, statistics=many, null_threshold=0.0, steps=1, prefixes=0)
    with pytest.raises(ValueError, match=r"no direction of .* raise null_threshold"):
        full.edit(model, tiny_tokenizer, REQUESTS)
    for wrong in ({"null_threshold": -1.0}, {"regularisation": 0.0}, {"edited_layers": (1, 1)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AlphaEditConfig(**{"edited_modules": "h.{i}.x", "edited_layers": (1,), **wrong})  # type: ignore[arg-type]
