"""The trainers' promises: logging, accumulation, steps and epochs, configs, files, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import arguments, assert_equal_weights, naive_ids, new_editor, record, weights

from ibke_hf import IBKEEditor
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import EditCase
from ibke_hf.core.tokens import RequestError
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.training import trainer as trainer_module
from ibke_hf.training.arguments import IBKETrainingArguments
from ibke_hf.training.trainer import IBKETrainer


def test_training_lowers_the_loss_logs_every_term_and_leaves_the_backbone_alone(
    trainer_for: Any, tmp_path: Path
) -> None:
    records = [record(i, hops=i % 2) for i in range(4)]
    trainer = trainer_for(
        records, max_steps=25, per_device_train_batch_size=4, save_strategy="steps", save_steps=25, edits_per_group=1
    )
    before = weights(trainer.backbone)
    trainer.backbone.train()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 25
    for entry in history:
        assert {"loss", "loss_sg", "loss_il", "loss_itm", "grad_norm", "step_size", "learning_rate"} <= entry.keys()
        assert entry["loss"] == pytest.approx(entry["loss_sg"] + entry["loss_il"] + 0.1 * entry["loss_itm"], rel=1e-4)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert_equal_weights(before, weights(trainer.backbone))
    assert all(p.grad is None for p in trainer.backbone.parameters())
    assert trainer.backbone.training and all(module.training for module in trainer.backbone.modules())
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    size = sum(t.nbytes for t in weights(trainer.model).values())
    assert (tmp_path / "run/checkpoint-25/model.safetensors").stat().st_size < 1.1 * size + 10_000
    assert_equal_weights(weights(trainer.model), weights(IBKEEditor.from_pretrained(tmp_path / "run/checkpoint-25")))


def test_theta_has_its_own_learning_rate(trainer_for: Any) -> None:
    trainer = trainer_for([record(0), record(1)], step_size_learning_rate=0.0, max_steps=2)
    trainer.calibrate(trainer.model)
    before = weights(trainer.model)
    trainer.train()
    assert torch.equal(before["log_step_sizes"], trainer.model.log_step_sizes)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) > len(before) // 2


def test_mend_trains_through_the_same_trainer(trainer_for: Any) -> None:
    records = [record(i) for i in range(4)]
    trainer = trainer_for(records, kind=MENDEditor, max_steps=15, per_device_train_batch_size=4, validation=records)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < history[0]["loss"]
    assert "loss_itm" not in history[0] and "eval_loss_itm" not in trainer.evaluate()


def test_calibration_runs_once_before_the_first_step(trainer_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    calibrate = IBKEEditor.calibrate

    def counted(self: Any, model: Any, batches: Any, *capture: Any) -> Any:
        calls.append(sum(map(len, batches)))
        return calibrate(self, model, batches, *capture)

    monkeypatch.setattr(IBKEEditor, "calibrate", counted)
    trainer = trainer_for([record(i) for i in range(8)], save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    assert calls == [6]
    statistics = weights(trainer.model.statistics)
    trainer.train()
    resumed = trainer_for([record(i) for i in range(8)], save_strategy="steps", save_steps=2, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert calls == [6]
    assert_equal_weights(statistics, weights(resumed.model.statistics))


def test_accumulation_equals_one_larger_batch(trainer_for: Any) -> None:
    records = [record(i, 1 + i % 3, (0, 2, 1, 1)[i % 4]) for i in range(8)]
    runs = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_for(
            records,
            folder=f"b{batch}",
            editor={"use_information_bottleneck": False},
            edits_per_group=1,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        trainer.calibrate(trainer.model)
        trainer.train()
        runs.append((weights(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]))
    for state, history in runs[1:]:
        for name in ("loss", "loss_sg", "loss_il", "grad_norm"):
            assert [entry[name] for entry in history] == pytest.approx([entry[name] for entry in runs[0][1]], rel=1e-3)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, runs[0][0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hops", ["none", "all"])
def test_the_information_term_is_shared_out_too(hops: str, trainer_for: Any) -> None:
    """Also where one micro-batch has supporting hops that are edited in, and another has none."""
    records = [record(i, hops=i % 2) for i in range(4)]
    losses = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = trainer_for(
            records,
            folder=f"i{batch}",
            edits_per_group=1,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            beta=2.0,
            train_supporting_hops=hops,
        )
        trainer.calibrate(trainer.model)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss_itm"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_autocast_trains(trainer_for: Any) -> None:
    trainer = trainer_for([record(i) for i in range(4)], bf16=True, max_steps=2)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize(("per_group", "trained"), [(1, 1), (0, 2)])
def test_the_editors_config_learns_the_group_size_and_nothing_else(
    per_group: int, trained: int, trainer_for: Any
) -> None:
    trainer = trainer_for([record(i) for i in range(4)], max_steps=1, edits_per_group=per_group)
    before = trainer.model.config.to_dict()
    trainer.train()
    assert trainer.model.config.to_dict() == {**before, "trained_edits_per_group": trained}


def test_calibration_draws_from_all_of_the_training_set(trainer_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record files are often sorted by domain: the first requests alone would be those of one domain."""
    monkeypatch.setattr(IBKEEditor, "calibrate", lambda *_: None)
    encoded: list[str] = []
    encode = trainer_module.encode_requests

    def read(tokenizer: Any, requests: Any, **options: Any) -> Any:
        encoded.extend(request.target for request in requests)
        return encode(tokenizer, requests, **options)

    monkeypatch.setattr(trainer_module, "encode_requests", read)
    records = [record(i) for i in range(40)]
    in_order = [r.requests[0].target for r in records[:6]]
    orders = []
    for seed in (0, 0, 1):
        encoded.clear()
        trainer = trainer_for(records, seed=seed)
        trainer.calibrate(trainer.model)
        assert len(encoded) == 6
        assert sorted(encoded) != sorted(in_order)
        orders.append(list(encoded))
    assert orders[0] == orders[1] != orders[2]


def test_weight_decay_leaves_the_step_size_alone(trainer_for: Any) -> None:
    """Decay pulls weights to zero; θ = 0 would be η = 1, thousands of times what calibration starts from."""
    trainer = trainer_for([record(0), record(1)], weight_decay=0.5, step_size_learning_rate=0.1, max_steps=1)
    optimizer = trainer.create_optimizer()
    by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    decays = {name: by_parameter[id(p)]["weight_decay"] for name, p in trainer.model.named_parameters()}
    assert decays.pop("log_step_sizes") == 0.0
    assert set(decays.values()) == {0.5}
    before = trainer.model.log_step_sizes.detach().clone().fill_(-5.0)
    trainer.model.log_step_sizes.data.copy_(before)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(trainer.model.log_step_sizes, before)


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, 1_000_000, 3.0),
        ({"max_steps": 7}, 7, 3.0),
        ({"num_train_epochs": 2}, -1, 2),
        ({"num_train_epochs": 2, "max_steps": 7}, 7, 2),
    ],
)
def test_the_papers_steps_apply_where_neither_steps_nor_epochs_are_given(
    options: dict[str, Any], steps: int, epochs: float, tmp_path: Path
) -> None:
    settings = IBKETrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    assert (settings.max_steps, settings.num_train_epochs) == (steps, epochs)


def test_epochs_end_training(trainer_for: Any) -> None:
    trainer = trainer_for([record(i) for i in range(6)], max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.epoch) == (6, 2.0)


def test_all_but_the_model_is_named(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    backbone = tiny_model()
    with pytest.raises(TypeError, match="positional"):
        IBKETrainer(new_editor(backbone), backbone, arguments(tmp_path), tiny_tokenizer)


def test_records_that_cannot_be_used_are_skipped_and_counted(trainer_for: Any) -> None:
    long = replace(record(1), locality=(EditCase("far " * 200, "Oslo"),))
    empty = replace(record(2), generality=(EditCase("Where is it", " "),))
    records = [record(0), long, empty, record(3)]
    trainer = trainer_for(records, max_steps=4, validation=[empty, record(5), long], per_device_train_batch_size=4)
    trainer.train()
    assert set(trainer.unusable) == {1, 2}
    assert "locality case 0 of record r1" in trainer.unusable[1] and "do not fit" in trainer.unusable[1]
    assert [r.id for r in trainer.train_dataset] == ["r0", "r3", "r3", "r3"], "the next usable record stands in"
    assert [r.id for r in trainer.eval_dataset] == ["r5"], "an evaluation counts each record once"
    assert {"eval_loss", "eval_reliability", "eval_locality"} <= trainer.evaluate().keys()
    with pytest.raises(RequestError, match=r"none of the 2 records can be used; the first: .*record r1"):
        trainer_for([long, empty]).train()


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_non_finite_hypernetwork_stops_and_names_layer_and_record(trainer_for: Any) -> None:
    trainer = trainer_for([record(3)], max_steps=1)
    trainer.calibrate(trainer.model)
    trainer.model.hypernetworks[1].residual.bias.data[0] = float("nan")
    pattern = (
        r"loss_sg is not finite at step 0: the adapted factors of model\.layers\.2\.mlp\.down_proj for "
        r"request 0 of record r3"
    )
    with pytest.raises(NonFiniteError, match=pattern):
        trainer.train()


def test_a_non_finite_backbone_stops_and_names_layer_and_record(trainer_for: Any) -> None:
    trainer = trainer_for([record(0), record(3)], max_steps=1)
    trainer.calibrate(trainer.model)
    trainer.backbone.model.layers[3].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the edit request is not finite for request 0 of record r"):
        trainer.train()


def test_a_non_finite_prediction_names_the_case(trainer_for: Any, tiny_tokenizer: Any) -> None:
    odd = replace(record(3), locality=(EditCase("Only here is a zebra", "Oslo"),))
    trainer = trainer_for([record(0), odd])
    trainer.calibrate(trainer.model)
    seen = {i for r in (record(0), odd) for c in (*r.requests, *r.generality) for i in naive_ids(tiny_tokenizer, c)[0]}
    token = next(i for i in naive_ids(tiny_tokenizer, odd.locality[0])[0] if i not in seen)
    trainer.backbone.get_input_embeddings().weight.data[token] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"loss_il is not finite.*locality case 0 of record r3 \(edited layers model\.layers\.1"
    ):
        trainer.compute_loss(trainer.model, trainer.data_collator([record(0), odd]))


def test_a_non_finite_gradient_stops_and_names_layer_and_record(trainer_for: Any) -> None:
    trainer = trainer_for([record(3)], max_steps=1)
    trainer.model.hypernetworks[1].mean.key.weight.register_hook(lambda gradient: gradient * float("inf"))
    pattern = (
        r"gradient of hypernetworks\.1\.mean\.key\.weight is not finite at step 0: layer "
        r"model\.layers\.2\.mlp\.down_proj, records r3"
    )
    with pytest.raises(NonFiniteError, match=pattern):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_supporting_hops": "some"}, "train_supporting_hops must be one of none, unknown, all, found 'some'"),
        ({"beta": -1.0}, "beta must be at least 0, found -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, found inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, found nan"),
        ({"calibration_requests": 1}, "calibration_requests must be at least 2"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint would publish pickles"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_no_memory_is_pinned_without_an_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert IBKETrainingArguments(str(tmp_path)).dataloader_pin_memory is False


def test_an_editor_for_another_backbone_is_refused(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    editor = new_editor(tiny_model())
    with pytest.raises(ValueError, match="maps 48 to 32; the given model's maps 64 to 32"):
        IBKETrainer(
            editor,
            backbone=tiny_model(intermediate_size=64),
            args=arguments(tmp_path),
            processing_class=tiny_tokenizer,
        )
