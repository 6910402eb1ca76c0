"""The baselines MEND and FT, and the dense edits that fine-tuning returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_edits import FAMILIES, REQUESTS
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.capture import NonFiniteError, case_losses, target_logits
from ibke_hf.core.edits import Edit, EditInfo, LowRankEdit
from ibke_hf.core.layers import BackboneError, is_transposed, modules_to_edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError, encode_requests
from ibke_hf.core.weights import add_to_weight
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.editors.ft import FineTuningEditor, FTConfig
from ibke_hf.editors.mend import MENDBlock, MENDConfig, MENDEditor

near = {"rtol": 1e-5, "atol": 1e-5}


def assert_equals_copies(model: Any, tokenizer: Any, edit: Any, tolerance: float = 1e-5) -> None:
    """A batch under n independent edits equals n copies of the model with ΔW added to their weights."""
    batch = encode_requests(tokenizer, REQUESTS)
    with torch.no_grad(), edit.attached(model):
        attached, _ = target_logits(model, batch)
    for row in range(len(batch)):
        edited = copy.deepcopy(model)
        for name in edit.layers:
            add_to_weight(modules_to_edit(edited, [name])[name], edit[row].weight_update(name))
        with torch.no_grad():
            expected, _ = target_logits(edited, batch[row : row + 1])
        torch.testing.assert_close(
            attached[row : row + 1, -expected.shape[1] :], expected, rtol=tolerance, atol=tolerance
        )


# --- MEND -----------------------------------------------------------------------------------------------------------


def make_mend(model: Any, tokenizer: Any, **config: Any) -> MENDEditor:
    torch.manual_seed(0)
    editor = MENDEditor.for_backbone(model, hidden_dim=8, **config)
    editor.calibrate(model, [encode_requests(tokenizer, REQUESTS)])
    for network in editor.hypernetworks:
        nn.init.normal_(network.blocks[0].output.weight, std=0.1)
        nn.init.ones_(network.blocks[0].output.bias)
    return editor.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_mend_edits_equal_naive_updates_of_copies(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.1)
    edit = make_mend(model, tiny_tokenizer, blocks=2).edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert all(torch.isfinite(edit.weight_updates(name)).all() for name in edit.layers)
    assert_equals_copies(model, tiny_tokenizer, edit)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_an_untrained_mend_without_standardisation_is_the_gradient_step(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family)
    editor = MENDEditor.for_backbone(model, hidden_dim=8, standardise=False)
    nn.init.constant_(editor.log_step_sizes, -3.0)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    modules = edit.modules(model)
    loss = case_losses(*target_logits(model, encode_requests(tiny_tokenizer, REQUESTS))).sum()
    gradients = torch.autograd.grad(loss, [module.weight for module in modules.values()])
    for (name, module), gradient in zip(modules.items(), gradients, strict=True):
        expected = -editor.step_sizes[0].item() * (gradient if is_transposed(module) else gradient.T)
        torch.testing.assert_close(edit.weight_update(name), expected, **near)


def test_mend_is_token_wise_and_zero_on_padding(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_mend(model, tiny_tokenizer)
    factors = editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    for captured, adapted in zip(factors, editor(factors), strict=True):
        assert not adapted.layer_inputs[~captured.mask].any()
        assert not adapted.output_gradients[~captured.mask].any()
        assert (adapted.gates, adapted.latent, adapted.mean, adapted.log_variance) == (None,) * 4
    with pytest.raises(ValueError, match="no gates"):
        editor(factors, gates=[factors[0].mask.float(), *[None] * (len(factors) - 1)])
    alone = editor.edit(model, tiny_tokenizer, REQUESTS[1:2])
    together = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    for name in alone.layers:
        torch.testing.assert_close(alone.weight_update(name), together[1].weight_update(name), **near)


def test_a_mend_block_adds_a_rectified_layer() -> None:
    """x + W_2 relu(W_1 x + b_1) + b_2: hidden units below zero are silent, those above pass as they are."""
    torch.manual_seed(0)
    block = MENDBlock(5, 3)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 5)
    nn.init.constant_(block.hidden.bias, -100.0)
    torch.testing.assert_close(block(x), x + block.output.bias)
    nn.init.constant_(block.hidden.bias, 100.0)
    torch.testing.assert_close(block(x), x + block.output(block.hidden(x)))


def test_a_saved_mend_gives_the_same_edit_bit_for_bit(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    editor = make_mend(model, tiny_tokenizer, blocks=2, standardise=True)
    editor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MENDEditor
    assert loaded.edit(model, tiny_tokenizer, REQUESTS) == editor.edit(model, tiny_tokenizer, REQUESTS)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MENDConfig)


@pytest.mark.parametrize("blocks", [1, 2])
def test_hidden_dim_for_a_number_of_parameters(blocks: int) -> None:
    input_dims, output_dims = [48, 64], [32, 32]
    hidden_dim = MENDConfig.hidden_dim_for(40_000, input_dims, output_dims, blocks=blocks)
    config = MENDConfig(
        edited_modules="h.{i}.x",
        edited_layers=[0, 1],
        input_dims=input_dims,
        output_dims=output_dims,
        hidden_dim=hidden_dim,
        blocks=blocks,
    )
    assert sum(p.numel() for p in MENDEditor(config).hypernetworks.parameters()) == pytest.approx(40_000, rel=0.02)


# --- FT -------------------------------------------------------------------------------------------------------------


def naive_fine_tuning(model: Any, tokenizer: Any, requests: Any, editor: FineTuningEditor) -> dict[str, Tensor]:
    """Adam on the weights themselves of a copy; ΔW (d_in, d_out) after the configured steps."""
    tuned = copy.deepcopy(model)
    names = [editor.config.edited_modules.format(i=i) for i in editor.config.edited_layers]
    modules = modules_to_edit(tuned, names)
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    optimizer = torch.optim.Adam([module.weight for module in modules.values()], lr=editor.config.learning_rate)
    for _ in range(editor.config.steps):
        optimizer.zero_grad()
        case_losses(*target_logits(tuned, encode_requests(tokenizer, requests))).sum().backward()
        optimizer.step()
    change = {name: module.weight.detach() - before[name] for name, module in modules.items()}
    return {name: update if is_transposed(modules[name]) else update.T for name, update in change.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_equals_adam_on_the_weights(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.1)
    editor = FineTuningEditor.for_backbone(model, steps=8)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS)
    for name, expected in naive_fine_tuning(model, tiny_tokenizer, REQUESTS, editor).items():
        torch.testing.assert_close(edit.weight_update(name), expected, rtol=0, atol=1e-4)  # of steps of 1e-3 each
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_independent_fine_tuning_gives_every_request_its_own_update(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(family, initializer_range=0.1)
    editor = FineTuningEditor.for_backbone(model, steps=5)
    edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert len(edit) == 3
    assert_equals_copies(model, tiny_tokenizer, edit)
    for row, request in enumerate(REQUESTS):
        alone = editor.edit(model, tiny_tokenizer, [request])
        for name in alone.layers:
            torch.testing.assert_close(edit[row].weight_update(name), alone.weight_update(name), rtol=0, atol=1e-4)


def test_independent_fine_tuning_keeps_within_its_memory(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 requests at 8B would take 155 GB: lots that fit, the same updates; a result that cannot fit is refused."""
    model = tiny_model("qwen3")
    whole = FineTuningEditor.for_backbone(model, steps=3)
    expected = whole.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    size = whole.edit_bytes(model)
    assert size == expected.nbytes // len(REQUESTS)
    lots: list[int] = []
    fit = FineTuningEditor._fit
    monkeypatch.setattr(
        FineTuningEditor,
        "_fit",
        lambda *arguments, number, **named: lots.append(number) or fit(*arguments, number=number, **named),
    )
    for room, numbers in ((8 * size, [2, 1]), (4 * size, [1, 1, 1]), (3 * size, [1, 1, 1])):
        editor = FineTuningEditor(replace(whole.config, memory_bytes=room))
        edit = editor.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
        assert lots == numbers
        for name, updates in expected.updates.items():
            torch.testing.assert_close(edit.updates[name], updates, rtol=1e-3, atol=1e-5)
        lots.clear()
    edit = FineTuningEditor(replace(whole.config, memory_bytes=4 * size)).edit(
        model, tiny_tokenizer, REQUESTS, mode="independent", previous=expected
    )
    assert lots == [1, 1, 1]  # each on top of its own row
    again = whole.edit(model, tiny_tokenizer, REQUESTS, mode="independent", previous=expected)
    for name, updates in again.updates.items():
        torch.testing.assert_close(edit.updates[name], updates, rtol=1e-3, atol=1e-5)
    small = FineTuningEditor(replace(whole.config, memory_bytes=2 * size))
    with pytest.raises(
        ValueError, match=r"3 independent edits .* at most 2 requests at a time, or raise memory_bytes"
    ):
        small.edit(model, tiny_tokenizer, REQUESTS, mode="independent")
    assert len(small.edit(model, tiny_tokenizer, REQUESTS)) == 1  # one joint update takes no more than one


def test_sequential_fine_tuning_goes_on_from_the_update_before(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.1)
    editor = FineTuningEditor.for_backbone(model, steps=4)
    sequential = editor.edit(model, tiny_tokenizer, REQUESTS[:2], mode="sequential")
    first = editor.edit(model, tiny_tokenizer, REQUESTS[:1])
    second = editor.edit(model, tiny_tokenizer, REQUESTS[1:2], previous=first)
    for name in NAMES[:1]:
        torch.testing.assert_close(sequential.weight_update(name), second.weight_update(name), rtol=0, atol=1e-4)
    assert sequential.info.requests == REQUESTS[:2]
    merged = copy.deepcopy(model)
    first.merge_into(merged)
    tuned = naive_fine_tuning(merged, tiny_tokenizer, REQUESTS[1:2], editor)
    for name, update in tuned.items():
        torch.testing.assert_close(
            sequential.weight_update(name), first.weight_update(name) + update, rtol=0, atol=1e-4
        )
    joint = editor.edit(model, tiny_tokenizer, REQUESTS[:2])
    assert joint != sequential


def test_fine_tuning_makes_the_model_answer(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    with torch.no_grad():
        original = case_losses(*target_logits(model, batch))
    for mode in ("joint", "sequential", "independent"):
        with torch.inference_mode():
            edit = FineTuningEditor.for_backbone(model, learning_rate=1e-2).edit(
                model, tiny_tokenizer, REQUESTS, mode=mode
            )
        with torch.no_grad(), edit.attached(model):
            assert (case_losses(*target_logits(model, batch)) < 0.5 * original).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fine_tuning_16_bit_models_accumulates_in_fp32(
    dtype: torch.dtype, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("gpt2", initializer_range=0.05).to(dtype)
    edit = FineTuningEditor.for_backbone(model, steps=3, loss_scale=128.0).edit(model, tiny_tokenizer, REQUESTS)
    for update in edit.updates.values():
        assert update.dtype == torch.float32
        assert torch.isfinite(update).all()
        assert 1e-4 < update.abs().max() < 4e-3


def test_fine_tuning_refuses_what_it_cannot_do(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = FineTuningEditor.for_backbone(model, steps=1)
    with pytest.raises(RequestError, match="request 1: the target is empty"):
        editor.edit(model, tiny_tokenizer, [REQUESTS[0], EditRequest("a", " ")])
    with pytest.raises(ValueError, match="mode must be one of"):
        editor.edit(model, tiny_tokenizer, REQUESTS, mode="all")  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="no linear layer named"):
        FineTuningEditor(FTConfig("h.{i}.x", (1,))).edit(model, tiny_tokenizer, REQUESTS)
    for wrong in ({"edited_layers": ()}, {"steps": 0}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FTConfig(**{"edited_modules": "h.{i}.x", "edited_layers": (1,), **wrong})
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="request 0"):
        editor.edit(model, tiny_tokenizer, REQUESTS)


# --- dense edits ----------------------------------------------------------------------------------------------------

NAMES = ("transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj")


def random_dense(number: int = 1, seed: int = 0, info: EditInfo | None = None) -> DenseEdit:
    generator = torch.Generator().manual_seed(seed)
    return DenseEdit(
        {name: torch.randn(number, 48, 32, generator=generator) / 7 for name in NAMES}, info or EditInfo()
    )


def test_a_dense_edit_is_a_value(tiny_model: Callable[..., Any]) -> None:
    requests = tuple(EditRequest(f"prompt {i}", "target") for i in range(3))
    edit = random_dense(3, info=EditInfo(requests))
    assert isinstance(edit, Edit)
    assert (len(edit), edit.nbytes) == (3, 2 * 3 * 48 * 32 * 4)
    assert edit.select([2, 0])[1] == edit[0]
    assert edit[2].info.requests == requests[2:]
    assert edit.to(torch.bfloat16).nbytes * 2 == edit.nbytes
    model = tiny_model("gpt2")
    ids = torch.randint(2, 320, (3, 6))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        original = model(ids).logits
        with edit.attached(model):
            attached = model(ids).logits
        merged = edit[1].merge_into(model)
        torch.testing.assert_close(model(ids).logits[1], attached[1], rtol=1e-4, atol=1e-4)
        merged.undo()
        assert torch.equal(model(ids).logits, original)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="batch of 2 rows"), edit.attached(model):
        model(ids[:2])
    with pytest.raises(BackboneError, match="maps 64 to 32"), edit.attached(tiny_model("gpt2", n_inner=64)):
        pass
    for wrong in ({}, {"a": torch.ones(3, 3)}, {"a": torch.ones(1, 3, 3), "b": torch.ones(2, 3, 3)}):
        with pytest.raises(ValueError, match=r"edit|must be \(n, d_in, d_out\)"):
            DenseEdit(wrong)


def test_dense_edits_compose_with_dense_and_low_rank_ones() -> None:
    one, many = random_dense(), random_dense(3, seed=1)
    low = LowRankEdit({NAMES[0]: torch.randn(1, 2, 48)}, {NAMES[0]: torch.randn(1, 2, 32)})
    composed = one.compose(many, low)
    assert len(composed) == 3
    expected = one.updates[NAMES[0]] + many.updates[NAMES[0]] + low.weight_updates(NAMES[0])
    torch.testing.assert_close(composed.updates[NAMES[0]], expected, **near)
    assert torch.equal(composed.updates[NAMES[1]], one.updates[NAMES[1]] + many.updates[NAMES[1]])
    with pytest.raises(ValueError, match="lengths"):
        many.compose(random_dense(2))


def test_saved_dense_edits_come_back_and_foreign_files_are_refused(tmp_path: Path) -> None:
    edit = random_dense(3, info=EditInfo((EditRequest("Où? 🏔", "東京"),), "FineTuningEditor", "tiny"))
    edit.save_pretrained(tmp_path)
    assert DenseEdit.from_pretrained(tmp_path) == edit
    assert DenseEdit.from_pretrained(tmp_path).info == edit.info
    path = tmp_path / "dense_edit.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        DenseEdit.from_pretrained(tmp_path)
    save_file({"wte.weight": torch.ones(3, 3)}, path)
    with pytest.raises(AdapterError, match=r"not a dense edit .*'wte\.weight'"):
        DenseEdit.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(AdapterError, match="no dense_edit"):
        DenseEdit.from_pretrained(tmp_path)
