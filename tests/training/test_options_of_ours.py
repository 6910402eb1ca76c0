"""What training can do beyond the paper: sizes by gradient, dropout, a price on gates, groups of many sizes, the solve
in the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_editors import REQUESTS, make_editor
from training_runs import record

from ibke_hf import IBKEEditor
from ibke_hf.core.composition import SolvedEdit, solve_groups
from ibke_hf.core.modeling_ibke import GradientEditor
from ibke_hf.core.tokens import encode_requests
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.training.batches import EditCollator
from ibke_hf.training.objective import run_batch

SOLVE = {"composition": "solve", "ridge": 0.1}


def sizes(editor: GradientEditor, factors: Any) -> torch.Tensor:
    return torch.stack([update.flatten(1).norm(dim=1) for update in updates(editor, factors).values()])


def updates(editor: GradientEditor, factors: Any) -> dict[str, torch.Tensor]:
    edit = editor.as_edit(editor(factors), torch.arange(len(factors[0])))
    return {name: edit.weight_updates(name) for name in edit.layers}


# --- the size of an edit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [IBKEEditor, MENDEditor])
def test_an_edit_of_a_known_fact_is_nearly_nothing(kind: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = kind.for_backbone(model, [1, 2], size_by_gradient=0.1).eval()
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    editor.calibrate(model, [batch])
    factors = editor.capture(model, batch)
    known = [replace(layer, output_gradients=layer.output_gradients * 1e-3) for layer in factors]
    larger = [replace(layer, output_gradients=layer.output_gradients * 1e3) for layer in factors]
    off = kind.for_backbone(model, [1, 2]).eval()
    off.load_state_dict(editor.state_dict())
    assert (sizes(editor, known) < 0.05 * sizes(off, known)).all()
    torch.testing.assert_close(sizes(editor, larger), sizes(off, larger), rtol=2e-3, atol=0)
    assert (sizes(editor, factors) > 0.7 * sizes(off, factors)).all()
    assert (sizes(off, known) > 0.03 * sizes(off, factors)).all()  # what the option is for


def test_the_size_is_the_gradients_beside_that_of_the_calibration_set(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer)
    batch = encode_requests(tiny_tokenizer, REQUESTS)
    (first, *_) = editor.capture(model, batch)
    plain = updates(editor, editor.capture(model, batch))[editor.config.module_names()[0]]
    editor.config.size_by_gradient = 0.5
    scaled = updates(editor, editor.capture(model, batch))[editor.config.module_names()[0]]
    u = slice(first.layer_inputs.shape[-1], None)
    usual = (editor.statistics[0].mean[u] ** 2 + editor.statistics[0].std[u] ** 2).sum()
    for row in range(len(batch)):
        tokens = int(first.mask[row].sum())
        squares = [float(token.square().sum()) for token in first.output_gradients[row]]  # zero on padding
        size = (sum(squares) / tokens / float(usual)) ** 0.5
        torch.testing.assert_close(scaled[row], plain[row] * size / (size + 0.5), rtol=1e-4, atol=1e-6)


# --- the network and its gates -----------------------------------------------------------------------------------


def test_dropout_acts_in_training_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    plain, dropped = make_editor(model, tiny_tokenizer), make_editor(model, tiny_tokenizer, dropout=0.5)
    dropped.load_state_dict(plain.state_dict())
    for editor in (plain, dropped):
        torch.nn.init.normal_(editor.hypernetworks[0].residual.weight, std=0.1)
    dropped.load_state_dict(plain.state_dict())
    factors = plain.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    assert torch.equal(plain(factors)[0].layer_inputs, dropped.eval()(factors)[0].layer_inputs)
    one, two = (dropped.train()(factors)[0].layer_inputs for _ in range(2))
    assert not torch.allclose(one, two)


def test_a_price_on_gates_is_a_term_of_its_own_and_closes_them(trainer_for: Any) -> None:
    trainer = trainer_for([record(0), record(1)], gate_weight=0.5)
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator([record(0), record(1)])
    batch = run_batch(trainer.model.eval(), trainer.model, trainer.backbone, inputs, judge_gates=True)
    masks = [(layer.layer_inputs != 0).any(-1) for layer in batch.adapted]
    values = torch.cat([torch.sigmoid(a.gates)[mask] for a, mask in zip(batch.adapted, masks, strict=True)])
    assert float(batch.terms["loss_gate"].detach()) == pytest.approx(float(values.detach().mean()), rel=1e-5)
    plain = sum(
        float(batch.terms[name].detach()) * weight
        for name, weight in (("loss_sg", 1), ("loss_il", 1), ("loss_itm", trainer.args.beta), ("loss_gate", 0.5))
    )
    assert float(trainer.compute_loss(trainer.model, inputs).detach()) == pytest.approx(plain, rel=1e-5)
    biases = [network.gate.bias for network in trainer.model.hypernetworks]
    gradients = torch.autograd.grad(batch.terms["loss_gate"], biases)
    assert all(float(gradient) > 0 for gradient in gradients)  # a step against it closes them
    assert "loss_gate" not in run_batch(trainer.model, trainer.model, trainer.backbone, inputs).terms


def test_edits_that_are_cut_in_training_teach_the_network(trainer_for: Any) -> None:
    trainer = trainer_for([record(0), record(1)])
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator([record(0), record(1)])
    whole = trainer.compute_loss(trainer.model.eval(), inputs)
    trainer.model.config.edit_rank = 1
    cut = trainer.compute_loss(trainer.model, inputs)
    assert float((cut - whole).detach().abs()) > 1e-6
    parameters = [p for p in trainer.model.hypernetworks.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(cut, parameters, allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > len(parameters) / 2


# --- edits in company ----------------------------------------------------------------------------------------------


def test_mixed_groups_have_sizes_up_to_the_largest_and_follow_from_the_records(tiny_tokenizer: Any) -> None:
    collator = EditCollator(tiny_tokenizer, edits_per_group=4, mixed_groups=True)
    drawn = set()
    for start in range(24):
        records = [record(number) for number in range(start, start + 4)]
        groups = collator(records)["groups"][:4].tolist()
        assert groups == collator(records)["groups"][:4].tolist()
        drawn.add(groups.count(0))
    assert drawn == {1, 2, 4}


def test_solved_groups_equal_solved_edits(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    editor = make_editor(model, tiny_tokenizer, **SOLVE)
    factors = editor.capture(model, encode_requests(tiny_tokenizer, REQUESTS))
    each = editor.as_edit(editor(factors), torch.arange(3), captured=factors)
    together = solve_groups(each, torch.tensor([0, 1, 0]), 0.1)
    expected = SolvedEdit.of([each[0], each[2]], 0.1), SolvedEdit.of([each[1]], 0.1)
    for name in together.layers:
        torch.testing.assert_close(
            together.weight_updates(name)[0], expected[0].weight_updates(name)[0], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("kind", [IBKEEditor, MENDEditor])
def test_training_solves_groups_and_its_loss_reaches_every_parameter(kind: Any, trainer_for: Any) -> None:
    records = [record(number) for number in range(4)]
    trainer = trainer_for(records, kind=kind, editor=SOLVE, edits_per_group=2)
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator(records)
    editor = trainer.model.eval()
    loss = trainer.compute_loss(editor, inputs)
    editor.config.composition = "sum"
    assert not torch.isclose(loss, trainer.compute_loss(editor, inputs))
    editor.config.composition = "solve"
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in editor.parameters() if parameter.grad is not None)
    reached = {name.split(".")[0] for name, parameter in editor.named_parameters() if parameter.grad is not None}
    assert reached == {"hypernetworks", "log_step_sizes"}
    alone = EditCollator(trainer.tokenizer, edits_per_group=1)(records)
    solved = run_batch(editor, editor, trainer.backbone, alone).terms["loss_sg"]
    editor.config.composition = "sum"  # one edit alone is left as it is
    torch.testing.assert_close(run_batch(editor, editor, trainer.backbone, alone).terms["loss_sg"], solved)
