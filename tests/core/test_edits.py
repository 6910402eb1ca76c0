"""Edits as values: attaching, undoing, merging and the algebra, against dense weights."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import pytest
import torch
from memory_edits import FAMILIES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ibke_hf.core.edit_values import Edit
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.factors import recompress
from ibke_hf.core.fingerprints import fingerprint, same_backbone
from ibke_hf.core.layers import BackboneError, dimensions, find_ffn_output, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.weights import add_to_weight

near = {"rtol": 1e-5, "atol": 1e-5}


def random_edit(
    model: Any, number: int = 1, rank: int = 3, seed: int = 0, chosen: tuple[int, ...] = (1, 2)
) -> LowRankEdit:
    generator = torch.Generator().manual_seed(seed)
    modules = modules_to_edit(model, [find_ffn_output(model).format(i=i) for i in chosen])
    inputs, outputs = {}, {}
    for name, module in modules.items():
        d_in, d_out = dimensions(module)
        inputs[name] = torch.randn(number, rank, d_in, generator=generator) / d_in**0.5
        outputs[name] = torch.randn(number, rank, d_out, generator=generator) / rank**0.5
    return LowRankEdit(inputs, outputs)


def with_dense_update(model: Any, edit: LowRankEdit) -> Any:
    """The naive way: ΔW = ĥᵀû added to the weights of a copy."""
    edited = copy.deepcopy(model)
    for name in edit.inputs:
        module = modules_to_edit(edited, [name])[name]
        add_to_weight(module, edit.inputs[name][0].T @ edit.outputs[name][0])
    return edited


def square(family: str) -> dict[str, int]:
    return {"n_inner": 32} if family.startswith("gpt") else {"intermediate_size": 32}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 320, (3, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# --- on a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["wide", "square"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_independent_edits_equals_naive_dense_updates(
    family: str, shape: str, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model(family, initializer_range=0.1, **(square(family) if shape == "square" else {}))
    edit = random_edit(model, number=3)
    original = logits(model, ids)
    with edit.attached(model):
        attached = logits(model, ids)
    for row in range(3):
        expected = logits(with_dense_update(model, edit[row]), ids[row : row + 1])
        torch.testing.assert_close(attached[row : row + 1], expected, **near)
        assert (expected - original[row]).abs().max() > 0.05
    assert isinstance(edit, Edit)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_undo_is_exact_also_nested_and_after_exceptions(
    family: str, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = logits(model, ids)
    first, second = random_edit(model, seed=1), random_edit(model, seed=2)
    with first.attached(model):
        alone = logits(model, ids)
        with second.attached(model):
            both = logits(model, ids)
        assert torch.equal(logits(model, ids), alone)
        with pytest.raises(RuntimeError, match="boom"), second.attached(model):
            raise RuntimeError("boom")
        assert torch.equal(logits(model, ids), alone)
    with first.compose(second).attached(model):
        torch.testing.assert_close(both, logits(model, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), original)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_threads_with_opposite_edits_never_see_each_others(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2", n_layer=2)
    edits = [random_edit(model, chosen=(0, 1))]
    edits.append(LowRankEdit(edits[0].inputs, {name: -u for name, u in edits[0].outputs.items()}))
    expected = [logits(with_dense_update(model, edit), ids) for edit in edits]
    original, start = logits(model, ids), threading.Barrier(3)

    def edited(index: int) -> float:
        start.wait()
        worst = 0.0
        for _ in range(200):
            with edits[index].attached(model):
                worst = max(worst, float((logits(model, ids) - expected[index]).abs().max()))
        return worst

    def unedited(_: int) -> float:
        start.wait()
        return max(float((logits(model, ids) - original).abs().max()) for _ in range(200))

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(edited, 0), pool.submit(edited, 1), pool.submit(unedited, 0)]
        assert [job.result() < 1e-4 for job in jobs] == [True] * 3
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert not any(module._forward_hooks for module in model.modules())


def test_asyncio_tasks_keep_their_own_edits(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2")
    edits = [random_edit(model, seed=seed) for seed in range(3)]
    expected = [logits(with_dense_update(model, edit), ids) for edit in edits]

    async def task(index: int) -> None:
        for _ in range(5):
            with edits[index].attached(model):
                await asyncio.sleep(0)
                torch.testing.assert_close(logits(model, ids), expected[index], rtol=1e-4, atol=1e-4)

    async def all_tasks() -> None:
        await asyncio.gather(*(task(index) for index in range(3)))

    asyncio.run(all_tasks())


def test_a_thread_started_inside_carries_the_edit_with_the_context(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model("gpt2")
    original = logits(model, ids)
    with ThreadPoolExecutor(1) as pool, random_edit(model).attached(model):
        assert torch.equal(pool.submit(logits, model, ids).result(), original)
        assert torch.equal(pool.submit(copy_context().run, logits, model, ids).result(), logits(model, ids))


def test_a_checkpoints_recomputation_sees_the_edit_of_its_own_thread(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    block = model.transformer.h[1].mlp
    x = torch.randn(1, 4, 32)

    def gradient(_: object = None) -> Tensor:
        leaf = x.clone().requires_grad_(True)
        checkpoint(block, leaf, use_reentrant=False).square().sum().backward()
        return leaf.grad

    with ThreadPoolExecutor(1) as pool:
        original, block_gradient = gradient(), None
        with random_edit(model).attached(model):
            block_gradient = gradient()
            assert torch.equal(pool.submit(gradient).result(), original)
    assert not torch.equal(block_gradient, original)


def test_compiled_models_are_edited_and_undone(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    for edited_first in (False, True):
        model = tiny_model("gpt2")
        edit = random_edit(model)
        original, expected = logits(model, ids), logits(with_dense_update(model, edit), ids)
        for block in (1, 2):
            model.transformer.h[block].mlp.compile(backend="eager")
        if not edited_first:
            torch.testing.assert_close(logits(model, ids), original)
        with edit.attached(model):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model, ids), original)
        torch._dynamo.reset()


def test_rows_say_which_edit_each_row_carries(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama", initializer_range=0.1)
    edit = random_edit(model, number=2)
    with edit.attached(model, rows=torch.tensor([1, 0, 1])):
        attached = logits(model, ids)
    for row, carried in enumerate((1, 0, 1)):
        torch.testing.assert_close(
            attached[row : row + 1], logits(with_dense_update(model, edit[carried]), ids[row : row + 1]), **near
        )
    for rows in (None, torch.tensor([1]), torch.tensor([0, 1, 0, 1])):
        with pytest.raises(ValueError, match="batch of 3 rows"), edit.attached(model, rows=rows):
            model(ids)
    with (
        pytest.raises(IndexError, match="2 independent edits, 0 to 1"),
        edit.attached(model, rows=torch.tensor([0, 1, 2])),
    ):
        model(ids)


@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma"])
def test_generation_under_an_edit_equals_a_merged_models(
    how: str, family: str, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = tiny_model(family)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    options: dict[str, Any] = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"num_beams": 3, "do_sample": False},
    }[how]

    def generate(model: Any, rows: slice) -> Tensor:
        torch.manual_seed(0)
        return model.generate(
            ids[rows], attention_mask=mask[rows], max_new_tokens=8, min_new_tokens=8, use_cache=True, **options
        )

    single, independent = random_edit(model), random_edit(model, number=3)
    with single.attached(model):
        attached = generate(model, slice(None))
    assert torch.equal(attached, generate(with_dense_update(model, single), slice(None)))
    if how == "sampling":  # draws differ between a batch and its rows
        return
    with independent.attached(model, rows=torch.arange(3).repeat_interleave(options.get("num_beams", 1))):
        attached = generate(model, slice(None))
    for row in range(3):
        assert torch.equal(
            attached[row : row + 1], generate(with_dense_update(model, independent[row]), slice(row, row + 1))
        )
    if how == "beams":
        with pytest.raises(ValueError, match="beam search repeats rows"), independent.attached(model):
            generate(model, slice(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_equals_attaching_and_undoes_bit_exactly(
    dtype: torch.dtype, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    for family in ("gpt2", "qwen3"):
        model = tiny_model(family, **square(family)).to(dtype)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        original, edit = logits(model, ids), random_edit(model)
        with edit.attached(model):
            attached = logits(model, ids)
        merged = edit.merge_into(model)
        if dtype == torch.float32:
            torch.testing.assert_close(logits(model, ids), attached, rtol=1e-4, atol=1e-4)
        assert (logits(model, ids) - original).abs().max() > 0.1
        merged.undo()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_merging_into_a_peft_model_keeps_the_orientation_of_the_wrapped_layer(
    tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    peft = pytest.importorskip("peft")
    for family, target in (("gpt2", "c_proj"), ("qwen3", "down_proj")):
        model = tiny_model(family, **square(family))
        edit = random_edit(model)
        expected = logits(with_dense_update(model, edit), ids)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], fan_in_fan_out=family == "gpt2"))
        with edit.attached(wrapped):
            torch.testing.assert_close(logits(wrapped, ids), expected, rtol=1e-4, atol=1e-4)
        edit.merge_into(wrapped)
        torch.testing.assert_close(logits(wrapped, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_side_path_adds_in_fp32_on_16_bit_models(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    module = model.model.layers[1].mlp.down_proj
    x = torch.randn(1, 5, 48).to(torch.bfloat16)
    edit = random_edit(model, chosen=(1,))
    with edit.attached(model):
        edited = module(x)
    assert edited.dtype == torch.bfloat16
    expected = module(x).float() + (x.float() @ edit.inputs[name][0].T) @ edit.outputs[name][0]
    assert torch.equal(edited, expected.to(torch.bfloat16))


def test_an_edit_of_another_backbone_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3")
    deep = random_edit(tiny_model("qwen3", num_hidden_layers=10), chosen=(9,))
    with pytest.raises(
        BackboneError, match=r"no linear layer named 'model\.layers\.9.*model\.layers\.\{i\}\.mlp\.down_proj"
    ):
        deep.modules(model)
    with (
        ExitStack() as stack,
        pytest.raises(BackboneError, match=r"expects .* to map 48 to 32, the model's maps 64 to 32"),
    ):
        stack.enter_context(random_edit(model).attached(tiny_model("qwen3", intermediate_size=64)))
    fingerprints = [fingerprint(random_edit(model).modules(tiny_model("qwen3", seed=seed))) for seed in (0, 1)]
    half = fingerprint(random_edit(model).modules(tiny_model("qwen3").to(torch.bfloat16)))
    assert same_backbone(fingerprints[0], half)
    assert not same_backbone(*fingerprints)


# --- values and algebra ---------------------------------------------------------------------------------------------


def test_indexing_selecting_and_comparing(tiny_model: Callable[..., Any]) -> None:
    edit = random_edit(tiny_model("llama"), number=3)
    requests = tuple(EditRequest(f"prompt {i}", "target") for i in range(3))
    edit = LowRankEdit(edit.inputs, edit.outputs, type(edit.info)(requests=requests))
    assert len(edit) == 3
    assert edit[-1] == edit[2] == list(edit)[2]
    assert edit[0] != edit[1]
    assert edit[1].info.requests == requests[1:2]
    chosen = edit.select([2, 0, 2])
    assert [row == edit[i] for row, i in zip(chosen, (2, 0, 2), strict=True)] == [True] * 3
    assert chosen.info.requests == (requests[2], requests[0], requests[2])
    assert edit.to(torch.bfloat16).nbytes * 2 == edit.nbytes == 3 * 2 * 3 * (48 + 32) * 4
    for wrong in (lambda: edit[3], lambda: edit.select([3]), lambda: edit.select([])):
        with pytest.raises(IndexError):
            wrong()
    for what in (edit.merge_into, edit.weight_update, edit.save_pretrained):
        with pytest.raises(ValueError, match="3 independent edits at once"):
            what(object())


def test_factors_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 8\) and \(1, 3, 4\)"):
        LowRankEdit({"a": torch.ones(2, 3, 8)}, {"a": torch.ones(1, 3, 4)})
    with pytest.raises(ValueError, match="both factors"):
        LowRankEdit({"a": torch.ones(1, 3, 8)}, {"b": torch.ones(1, 3, 4)})


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_compose_is_the_sum_of_the_dense_updates(rank: int, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    one, two = random_edit(model, rank=rank, seed=1), random_edit(model, rank=2, seed=2, chosen=(2, 3))
    many = random_edit(model, number=3, rank=rank, seed=3)
    joined = one.compose(two, two)
    for name in joined.layers:
        parts = [edit.weight_update(name) for edit in (one, two, two) if name in edit.layers]
        torch.testing.assert_close(joined.weight_update(name), torch.stack(parts).sum(0), rtol=1e-5, atol=2e-5)
        assert joined.ranks[name] <= 32
    for row, part in enumerate(one.compose(many)):
        for name in part.layers:
            expected = one.weight_update(name) + many[row].weight_update(name)
            torch.testing.assert_close(part.weight_update(name), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"lengths \[3, 2\]"):
        many.compose(many.select([0, 1]))


def test_recompression_is_exact_on_either_narrow_side() -> None:
    for d_in, d_out in ((6, 20), (20, 6)):
        h, u = torch.randn(2, 50, d_in), torch.randn(2, 50, d_out)
        inputs, outputs = recompress(h, u)
        assert inputs.shape == (2, 6, d_in)
        torch.testing.assert_close(inputs.mT @ outputs, h.mT @ u, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7, 100])
@pytest.mark.parametrize("stored", [7, 60])
def test_truncation_is_the_dense_svds_and_states_its_error(
    rank: int, stored: int, tiny_model: Callable[..., Any]
) -> None:
    edit = random_edit(tiny_model("qwen3"), rank=stored)
    truncated = edit.truncate(rank)
    for name in edit.inputs:
        dense = edit.weight_update(name)
        left, singular, right = torch.linalg.svd(dense.double(), full_matrices=False)
        best = (left[:, :rank] * singular[:rank]) @ right[:rank]
        error = float((best - dense).norm() / dense.norm())
        torch.testing.assert_close(truncated.weight_update(name), best.float(), rtol=1e-4, atol=1e-5)
        assert truncated.relative_error[name] == pytest.approx(error, abs=1e-5)
        assert truncated.ranks[name] == min(rank, stored, 32)
        torch.testing.assert_close(truncated.padded(101).weight_update(name), truncated.weight_update(name), **near)
    with pytest.raises(ValueError, match="at least 1"):
        edit.truncate(0)
    with pytest.raises(ValueError, match="truncate it first"):
        edit.padded(1)
