"""The IBKE editor: from requests to edits, its ablations, modes, files and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_edits import FAMILIES
from small_editors import REQUESTS, SMALL, make_editor
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ibke_hf.core.capture import NonFiniteError, case_losses, target_logits
from ibke_hf.core.configuration_ibke import PRESETS, IBKEConfig
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.factor_statistics import Moments
from ibke_hf.core.layers import BackboneError, modules_to_edit
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, encode_requests
from ibke_hf.core.weights import add_to_weight

near = {"rtol": 1e-5, "atol": 1e-5}


def dense(edit: LowRankEdit, row: int = 0) -> dict[str, Tensor]:
    return {name: edit[row].weight_update(name) for name in edit.layers}


def assert_same(one: LowRankEdit, other: LowRankEdit, row: int = 0, other_row: int = 0) -> None:
    for name, update in dense(one, row).items():
        torch.testing.assert_close(update, dense(other, other_row)[name], **near)


# --- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_independent_edits_of_a_batch_equal_naive_updates_of_copies(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.1)
    editor = make_editor(model, tiny_tokenizer)
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    with torch.no_grad():
        original = case_losses(*target_logits(model, batch))
        with edit.attached(model):
            attached, _ = target_logits(model, batch)
        for row in range(len(REQUESTS)):
            edited = copy.deepcopy(model)
            for name, update in dense(edit, row).items():
                assert torch.isfinite(update).all()
                add_to_weight(modules_to_edit(edited, [name])[name], update)
            expected, labels = target_logits(edited, batch[row : row + 1])
            torch.testing.assert_close(attached[row : row + 1, -expected.shape[1] :], expected, **near)
            assert not torch.isclose(case_losses(expected, labels), original[row : row + 1], atol=1e-3)
    assert all(parameter.grad is None for parameter in [*model.parameters(), *editor.parameters()])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_neither_padding_nor_the_rest_of_the_batch_changes_an_edit(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    editor = make_editor(model, tiny_tokenizer)
    together = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert together == editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent"), "an edit is deterministic"
    for row in range(len(REQUESTS)):
        assert_same(together, editor.edit(model, tiny_tokenizer, REQUESTS[row : row + 1]), row)
    right = editor(editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS, side="right")))
    assert_same(together, editor.as_edit(right, torch.arange(3)), 1, 1)
    without_padding = copy.deepcopy(tiny_tokenizer)
    without_padding.pad_token = None
    assert together == editor.edit(model, without_padding, REQUESTS, mode="independent"), "no pad token is needed"


def test_a_joint_edit_is_the_sum_of_edits_on_the_unedited_model(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    joint = editor.edit(model, tiny_tokenizer, REQUESTS)
    alone = [editor.edit(model, tiny_tokenizer, [request]) for request in REQUESTS]
    assert_same(joint, alone[0].compose(*alone[1:]))
    assert len(joint) == 1
    assert all(rank <= 32 for rank in joint.ranks.values()), "recompressed past min(d_in, d_out)"
    assert joint.info.requests == REQUESTS


def test_sequential_edits_read_each_request_on_the_model_edited_so_far(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    editor.config.composition = "sum"
    with torch.inference_mode():
        sequential = editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")
    edited, steps = copy.deepcopy(model), []
    for request in REQUESTS:
        steps.append(editor.edit(edited, tiny_tokenizer, [request]))
        steps[-1].merge_into(edited)
    for name, update in dense(sequential).items():
        torch.testing.assert_close(
            update, torch.stack([step.weight_update(name) for step in steps]).sum(0), rtol=1e-4, atol=1e-4
        )
    joint = editor.edit(model, tiny_tokenizer, REQUESTS)
    assert not torch.allclose(
        joint.weight_update(joint.layers[-1]), sequential.weight_update(joint.layers[-1]), atol=1e-3
    )
    first = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    for mode in ("joint", "sequential"):
        assert_same(
            editor.edit(model, tiny_tokenizer, REQUESTS[1:2], mode=mode, previous=first),
            editor.edit(model, tiny_tokenizer, REQUESTS[:2], mode="sequential"),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_backbones_give_finite_edits(
    family: str, dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.05).to(dtype)
    editor = make_editor(model, tiny_tokenizer, capture_loss_scale=64.0)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert all(torch.isfinite(edit.weight_updates(name)).all() for name in edit.layers)
    with torch.inference_mode(), edit.attached(model):
        logits, labels = target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))
    assert logits.dtype == dtype
    assert torch.isfinite(case_losses(logits, labels)).all()


def test_calibration_starts_from_the_configured_ratio(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, initial_edit_ratio=0.03, **SMALL)
    assert not editor.is_calibrated
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    step_sizes = editor.calibrate(model, [batch[:2], batch[2:]])
    assert editor.is_calibrated
    assert list(step_sizes.values()) == editor.step_sizes.tolist()
    factors = editor.capture(model, batch)
    for index, (captured, adapted) in enumerate(zip(factors, editor(factors), strict=True)):
        x = editor.standardise(index, captured)[captured.mask]
        torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones_like(x[0]), atol=1e-2, rtol=0)
        side = (
            captured.layer_inputs @ adapted.layer_inputs.mT @ adapted.output_gradients * editor.step_sizes[index]
        ).detach()
        assert float((side.flatten(1).norm(dim=-1) / captured.output_norms).median()) == pytest.approx(0.03, rel=1e-3)


def test_calibration_in_one_pass_equals_two_passes_over_all_factors(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Statistics within 1e-6 of two passes in fp64 over everything at once, relatively; η's start within 1e-5."""
    model = tiny_model("gpt2")
    model.transformer.h[0].mlp.c_proj.bias.data[3] = 1e4  # a massive activation, whose squares cancel in fp32
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, layers=[1, 2], **SMALL)
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    parts = [batch[:1], batch[1:]]
    held = []
    capture = editor.capture
    editor.capture = lambda *args: held.append(capture(*args)) or held[-1]  # type: ignore[method-assign]
    editor.calibrate(model, parts)
    assert len(held) == 2 * len(parts), "the factors of a batch are read again, not kept"
    for index, statistics in enumerate(editor.statistics):
        rows = torch.cat(
            [
                torch.cat((part[index].layer_inputs, part[index].output_gradients), -1)[part[index].mask]
                for part in held[: len(parts)]
            ]
        ).double()
        assert int(statistics.count) == len(rows)
        torch.testing.assert_close(statistics.mean.double(), rows.mean(0), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(statistics.std.double(), rows.std(0, correction=0), rtol=1e-6, atol=1e-9)
        ratios = []
        for part in held[: len(parts)]:
            adapted = editor._adapt(index, part[index], sample=False, gates=None)
            side = part[index].layer_inputs @ adapted.layer_inputs.mT @ adapted.output_gradients
            ratios.append(side.flatten(1).norm(dim=-1) / part[index].output_norms)
        start = editor.config.initial_edit_ratio / torch.cat(ratios).median()
        torch.testing.assert_close(editor.step_sizes[index], start, rtol=1e-5, atol=0)


def test_moments_do_not_depend_on_how_rows_are_split() -> None:
    rows = 1e6 + torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sizes in ([40], [1] * 40, [7, 0, 33]):
        moments = Moments(3)
        for part in rows.split(sizes):
            moments.add(part)
        assert moments.count == 40
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-6, atol=0)


# --- files and refusals ---------------------------------------------------------------------------------------------


def test_a_saved_editor_gives_the_same_edit_bit_for_bit(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    editor = make_editor(model, tiny_tokenizer)
    editor.save_pretrained(tmp_path)
    expected = editor.edit(model, tiny_tokenizer, REQUESTS)
    for loader in (IBKEEditor, AutoModel):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is IBKEEditor
        assert loaded.is_calibrated
        assert loaded.edit(model, tiny_tokenizer, REQUESTS) == expected
    assert isinstance(AutoConfig.from_pretrained(tmp_path), IBKEConfig)
    half = IBKEEditor.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.log_step_sizes.dtype == half.statistics[0].std.dtype == torch.float32
    assert half.hypernetworks[0].residual.weight.dtype == torch.bfloat16
    assert all(torch.isfinite(update).all() for update in dense(half.edit(model, tiny_tokenizer, REQUESTS)).values())


def test_bad_requests_are_named_by_their_index(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    for bad, message in (
        (EditRequest(" ", "Rome"), "request 1: the prompt is empty"),
        (EditRequest("The capital is", "\n"), "request 1: the target is empty"),
        (EditRequest("The capital is", "Rome " * 200), r"request 1: \d+ tokens do not fit the model's context of 128"),
    ):
        for mode in ("joint", "sequential", "independent"):
            with pytest.raises(RequestError, match=message):
                editor.edit(model, tiny_tokenizer, [REQUESTS[0], bad], mode=mode)
    with pytest.raises(RequestError, match="no edit request"):
        editor.edit(model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="joint, sequential, independent, found 'both'"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="both")  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="request 0"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="sequential")


def test_backbones_that_do_not_fit_are_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    with pytest.raises(BackboneError, match=r"between 0 and 3 .* found \[4\]"):
        IBKEEditor.for_backbone(model, layers=[4], **SMALL)
    with pytest.raises(BackboneError, match=r"no linear layer named 'h\.1\.x'"):
        IBKEEditor.for_backbone(model, edited_modules="h.{i}.x", layers=[1], **SMALL)
    with pytest.raises(BackboneError, match="maps 48 to 32; the given model's maps 64 to 32"):
        editor.edit(tiny_model("qwen3", intermediate_size=64), tiny_tokenizer, REQUESTS)
    with pytest.raises(BackboneError, match=r"transformer\.h\.\{i\}\.mlp\.c_proj"):
        editor.edit(tiny_model("gpt2"), tiny_tokenizer, REQUESTS)
    with pytest.raises(ValueError, match="names no edited layers"):
        IBKEEditor(IBKEConfig())


def test_presets_are_complete() -> None:
    for backbone in PRESETS:
        config = IBKEConfig.from_preset(backbone)
        assert len(config.module_names()) == len(config.input_dims or []) == len(config.output_dims or []) == 3
        assert (config.latent_length, config.latent_dim) == (10, 1024)
    with pytest.raises(ValueError, match=r"no preset for 'gpt5'.*for_backbone"):
        IBKEConfig.from_preset("gpt5")
