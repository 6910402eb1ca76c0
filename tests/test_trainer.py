"""IBKETrainer against a dense one-case-at-a-time reference, and its promises: resume, accumulation, ranks, files, errors."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.pytorch_utils import Conv1D

from ibke_hf import IBKEEditor
from ibke_hf.batches import case_scores, edits_with_hops, run_batch
from ibke_hf.capture import GradientFactors, NonFiniteError
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.records import EditCase, EditRecord, EditRequest, Hop
from ibke_hf.tokens import IGNORED, RequestError
from ibke_hf.trainer import EditCollator, IBKETrainer, IBKETrainingArguments, RecordDataset, last_complete_checkpoint

SMALL = {"latent_dim": 8, "latent_length": 3}
CITIES = ("Paris", "Rome", "Berlin", "Oslo", "Vienna", "Madrid", "Lisbon", "Warsaw")


def fact(head: str, tail: str, prompt: str = "{} is in") -> Hop:
    return Hop(prompt.format(head), tail, head, "P1", tail)


def record(index: int, generality: int = 1, locality: int = 1, hops: int = 0) -> EditRecord:
    """One record with cases of several lengths; `hops` generality cases run through a second fact."""
    city, other = CITIES[index % 8], CITIES[(index + 3) % 8]
    edit = fact(f"{city} tower", f"{other} {index}")
    cases = [EditCase(f"Where is the {city} tower{'?' * i} It is in", f"{other} {index}") for i in range(generality)]
    second = Hop(f"{other} {index} lies in", "Poland" if index % 2 else "England", f"{other} {index}", "P2", "E")
    cases += [EditCase(f"The country of the {city} tower is", second.target, hops=2, supporting=(second,)) for _ in range(hops)]
    local = [
        EditCase(f"The capital of France {'and England ' * i}is", CITIES[i], top_k=1 if i else 5, facts=(fact("France", CITIES[i]),))
        for i in range(locality)
    ]
    request = EditRequest(edit.prompt, edit.target)
    return EditRecord(f"r{index}", "test", "places", (request,), tuple(cases), tuple(local), (edit,))


def arguments(folder: Path | str, **options: Any) -> IBKETrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "max_steps": 4, "logging_steps": 1, "report_to": [],
                "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "calibration_requests": 6}  # fmt: skip
    return IBKETrainingArguments(str(folder), **{**defaults, **options})


def new_editor(backbone: Any, seed: int = 1, kind: Any = IBKEEditor, **config: Any) -> Any:
    torch.manual_seed(seed)
    options = {**(SMALL if kind is IBKEEditor else {"hidden_dim": 8}), "initial_edit_ratio": 0.5, **config}
    return kind.for_backbone(backbone, [1, 2], **options)


@pytest.fixture
def trainer_for(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., IBKETrainer]:
    """Build a trainer: ``trainer_for(records, folder=..., family=..., editor={...}, kind=..., eval=..., callbacks=..., **arguments)``."""

    def build(records: Sequence[EditRecord], *, folder: str = "run", family: str = "qwen3", editor: dict[str, Any] | None = None,
              kind: Any = IBKEEditor, validation: Sequence[EditRecord] | None = None, callbacks: Any = None, **options: Any) -> IBKETrainer:
        backbone = tiny_model(family)
        return IBKETrainer(
            new_editor(backbone, kind=kind, **(editor or {})), backbone, arguments(tmp_path / folder, **options), tiny_tokenizer,
            train_dataset=RecordDataset(records), eval_dataset=RecordDataset(validation) if validation else None, callbacks=callbacks,
        )  # fmt: skip

    return build


def weights(editor: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in editor.state_dict().items()}


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


# --- the objective ----------------------------------------------------------------------------------------------------


def naive_ids(tokenizer: Any, case: Any) -> tuple[list[int], int]:
    return tokenizer(f"{case.prompt} {case.target}")["input_ids"], len(tokenizer(case.prompt)["input_ids"])


def naive_logits(model: Any, tokenizer: Any, case: Any) -> tuple[Tensor, Tensor]:
    """Logits at the target positions of one case alone, unpadded, and the target ids."""
    ids, start = naive_ids(tokenizer, case)
    logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    return logits.float(), torch.tensor(ids[start:])


def naive_update(editor: Any, backbone: Any, tokenizer: Any, requests: Sequence[Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """ΔW of each layer, request by request with full backward passes; and the adapted factors."""
    names = editor.config.module_names()
    updates, latents = {}, []
    for request in requests:
        model = copy.deepcopy(backbone).requires_grad_(True)
        seen: dict[str, Any] = {}

        def keep(name: str, seen: dict[str, Any] = seen) -> Any:
            def hook(_: Any, args: Any, output: Tensor) -> None:
                output.retain_grad()
                seen[name] = (args[0].detach(), output)

            return hook

        for name in names:
            model.get_submodule(name).register_forward_hook(keep(name))
        logits, targets = naive_logits(model, tokenizer, request)
        nn.functional.cross_entropy(logits, targets).backward()
        factors = [
            GradientFactors(seen[n][0], seen[n][1].grad, torch.ones(seen[n][0].shape[:2], dtype=torch.bool), torch.ones(1)) for n in names
        ]
        for name, adapted, eta in zip(names, editor(factors), editor.step_sizes, strict=True):
            update = -eta * adapted.layer_inputs[0].T @ adapted.output_gradients[0]
            updates[name] = updates.get(name, 0) + update
            latents.append(adapted)
    return updates, latents


def naive_edited(backbone: Any, updates: dict[str, Tensor]) -> Any:
    model = copy.deepcopy(backbone)
    for name, update in updates.items():
        module = model.get_submodule(name)
        module.weight.data += update.detach() if isinstance(module, Conv1D) else update.detach().T
    return model


def naive_loss(editor: Any, backbone: Any, tokenizer: Any, groups: Sequence[Sequence[EditRecord]], edit_too: bool, hops: bool) -> Any:
    """Eq. 36 with dense updates and one forward per case; and the scores of each role."""
    generality, locality, latents = [], [], []
    scores: dict[str, list[float]] = {"reliability": [], "generality": [], "locality": []}

    def hits(logits: Tensor, targets: Tensor, top_k: int) -> float:
        best = [row.topk(top_k).indices.tolist() for row in logits]
        return sum(t in b for t, b in zip(targets.tolist(), best, strict=True)) / len(targets)

    for group in groups:
        requests = [r for item in group for r in item.requests]
        updates, found = naive_update(editor, backbone, tokenizer, requests)
        latents += found
        model = naive_edited(backbone, updates)
        for item in group:
            for case in (*item.requests, *item.generality):
                edited = model
                if hops and getattr(case, "supporting", ()):
                    more, found = naive_update(editor, backbone, tokenizer, case.supporting)
                    latents += found
                    edited = naive_edited(model, more)
                logits, targets = naive_logits(edited, tokenizer, case)
                judged = isinstance(case, EditCase)
                if judged or edit_too:
                    generality.append(nn.functional.cross_entropy(logits, targets))
                scores["generality" if judged else "reliability"].append(hits(logits, targets, case.top_k if judged else 1))
            for case in item.locality:
                logits, targets = naive_logits(model, tokenizer, case)
                original, _ = naive_logits(backbone, tokenizer, case)
                p, q = logits.softmax(-1), original.softmax(-1)
                locality.append((p * (p.log() - q.log())).sum(-1).mean())
                scores["locality"].append(hits(logits, original.argmax(-1), case.top_k))
    terms = {"loss_sg": torch.stack(generality).mean(), "loss_il": torch.stack(locality).mean()}
    if latents[0].log_variance is not None:
        size = sum(a.mean.numel() for a in latents)
        divergence = [0.5 * (a.log_variance.exp() + a.mean**2 - 1 - a.log_variance).sum() for a in latents]
        terms["loss_itm"] = torch.stack(divergence).sum() / size
    return terms, {name: sum(values) / len(values) for name, values in scores.items()}


@pytest.mark.parametrize(
    ("family", "kind", "per_group", "edit_too", "hops"),
    [("qwen3", IBKEEditor, 1, False, "none"), ("gpt2", IBKEEditor, 2, True, "all"), ("qwen3", MENDEditor, 0, False, "all")],
)
def test_loss_terms_and_scores_equal_a_dense_reference(
    family: str, kind: Any, per_group: int, edit_too: bool, hops: str, trainer_for: Any, tiny_tokenizer: Any
) -> None:
    records = [record(0, 2, 1), record(1, 1, 3, hops=1), record(2, 1, 2, hops=1)]
    options = {"edits_per_group": per_group, "sg_includes_edit": edit_too, "train_supporting_hops": hops, "beta": 0.3}
    trainer = trainer_for(records, family=family, kind=kind, validation=records, **options)
    trainer.calibrate(trainer.model)
    editor = trainer.model.eval()
    size = per_group or 3
    groups = [records[i : i + size] for i in range(0, 3, size)]
    with torch.random.fork_rng():
        terms, scores = naive_loss(editor, trainer.backbone, tiny_tokenizer, groups, edit_too, hops == "all")
    inputs = trainer.data_collator(records)
    batch = run_batch(editor, editor, trainer.backbone, inputs, hops=hops, sg_includes_edit=edit_too)
    assert batch.terms.keys() == terms.keys()
    for name, expected in terms.items():
        torch.testing.assert_close(batch.terms[name], expected, rtol=2e-4, atol=1e-5)
    total = terms["loss_sg"] + terms["loss_il"] + 0.3 * terms.get("loss_itm", 0.0)
    torch.testing.assert_close(trainer.compute_loss(editor, inputs).detach(), total.detach(), rtol=2e-4, atol=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(total.detach()), rel=2e-4)
    assert {name: metrics[f"eval_{name}"] for name in scores} == pytest.approx({name: 100 * score for name, score in scores.items()})
    assert all(metrics[f"eval_{name}"] == pytest.approx(float(value.detach()), rel=2e-4, abs=1e-5) for name, value in terms.items())


def test_scores_count_every_case_of_an_incomplete_last_batch(trainer_for: Any) -> None:
    records = [record(i, 1 + i % 3, 1 + i % 2) for i in range(5)]
    scores = []
    for size in (1, 2, 5):
        trainer = trainer_for(records, validation=records, per_device_eval_batch_size=size, edits_per_group=1)
        trainer.calibrate(trainer.model)
        scores.append({name: trainer.evaluate()[f"eval_{name}"] for name in ("reliability", "generality", "locality")})
    assert scores[0] == pytest.approx(scores[1]) and scores[0] == pytest.approx(scores[2])


def test_case_scores_break_ties_to_the_lowest_id() -> None:
    labels = torch.tensor([[2, 3]])
    assert case_scores(torch.zeros(2, 6), labels, torch.tensor([3])).tolist() == [0.5]
    assert case_scores(torch.zeros(1, 6), torch.tensor([[IGNORED, 3]]), torch.tensor([4])).tolist() == [1.0]


def test_a_batch_without_cases_gives_zero_and_a_gradient_for_every_parameter(trainer_for: Any) -> None:
    bare = replace(record(0), generality=(), locality=())
    trainer = trainer_for([record(0), record(1)], kind=MENDEditor)
    trainer.calibrate(trainer.model)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator([bare]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_every_parameter_learns_through_forward_alone(trainer_for: Any) -> None:
    trainer = trainer_for([record(0), record(1)])
    trainer.calibrate(trainer.model)
    adapted = trainer.model(trainer.model.capture(trainer.backbone, trainer.data_collator([record(0)])["cases"]))
    sum(a.step_size for a in adapted).backward()
    assert trainer.model.log_step_sizes.grad.all()
    trainer.compute_loss(trainer.model.train(), trainer.data_collator([record(0), record(1)])).backward()
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_noise_is_drawn_per_request_and_only_in_training(trainer_for: Any) -> None:
    trainer = trainer_for([record(0)])
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator([record(0), record(0)])
    noisy = run_batch(trainer.model.train(), trainer.model, trainer.backbone, inputs).adapted[0]
    torch.testing.assert_close(noisy.mean[0], noisy.mean[1])
    assert not torch.isclose(noisy.latent[0], noisy.latent[1]).all()
    still = [run_batch(trainer.model.eval(), trainer.model, trainer.backbone, inputs).adapted[0].latent for _ in range(2)]
    assert torch.equal(*still)
    torch.testing.assert_close(still[0][0], still[0][1])


# --- the collator -----------------------------------------------------------------------------------------------------


def test_locality_cases_that_collide_within_their_group_are_left_out(tiny_tokenizer: Any) -> None:
    clash = EditCase("Oslo tower stands in", "Rome", facts=(fact("Rome 4", "Paris tower"), record(1).edits[0]))
    records = [replace(record(0), locality=(clash,)), record(1, locality=2)]
    assert EditCollator(tiny_tokenizer, edits_per_group=1)(records)["counts"] == [2, 2, 3]
    assert EditCollator(tiny_tokenizer, edits_per_group=0)(records)["counts"] == [2, 2, 2]


def test_groups_hold_whole_records(tiny_tokenizer: Any) -> None:
    double = replace(record(0), requests=record(0).requests + record(5).requests)
    inputs = EditCollator(tiny_tokenizer, edits_per_group=2)([double, record(1), record(2)])
    assert inputs["counts"] == [4, 3, 3]
    assert inputs["groups"].tolist() == [0, 0, 0, 1] + 2 * [0, 0, 1]
    assert inputs["owners"].tolist() == [0, 0, 1, 2] + 2 * [0, 1, 2]


def test_an_unusable_text_is_named_by_its_record(tiny_tokenizer: Any) -> None:
    broken = replace(record(3), generality=(record(3).generality[0], EditCase("Where?", " ")))
    with pytest.raises(RequestError, match="generality case 1 of record r3: the target is empty"):
        EditCollator(tiny_tokenizer)([record(0), broken])
    with pytest.raises(RequestError, match=r"request 0 of record r0: .* do not fit the model's context of 4"):
        EditCollator(tiny_tokenizer, max_length=4)([record(0)])


# --- supporting hops --------------------------------------------------------------------------------------------------


def test_only_unknown_hops_are_edited_in_unless_all_are(trainer_for: Any, tiny_tokenizer: Any) -> None:
    trainer = trainer_for([record(0)])
    trainer.calibrate(trainer.model)
    trainer.backbone.lm_head.weight.data.zero_()  # every prediction ties, so that the ids 0 to 4 are the top 5

    def requests(which: str, known: int | None = None) -> list[str]:
        inputs = EditCollator(tiny_tokenizer, supporting_hops=which != "none")([record(0, hops=1), record(1, hops=1)])
        if known is not None:
            labels = inputs["hops"].labels[known]
            labels[labels != IGNORED] = 4
        return list(run_batch(trainer.model.eval(), trainer.model, trainer.backbone, inputs, hops=which).requests)

    edits = [f"request 0 of record r{i}" for i in range(2)]
    hops = [f"a supporting hop of generality case 1 of record r{i}" for i in range(2)]
    assert requests("none") == edits
    assert requests("unknown") == requests("all") == requests("all", known=0) == edits + hops
    assert requests("unknown", known=0) == [*edits, hops[1]]
    assert requests("unknown", known=1) == [*edits, hops[0]]


def test_unknown_means_beyond_the_top_five_of_the_unedited_backbone(trainer_for: Any, tiny_tokenizer: Any) -> None:
    trainer = trainer_for([record(0)])
    records = [record(i, hops=1) for i in range(8)]
    logits = [naive_logits(trainer.backbone, tiny_tokenizer, r.generality[-1].supporting[0]) for r in records]
    ranks = [[int((row > row[t]).sum()) for t, row in zip(targets, rows, strict=True)] for rows, targets in logits]
    trainer.calibrate(trainer.model)
    inputs = EditCollator(tiny_tokenizer, supporting_hops=True)(records)
    edited = run_batch(trainer.model.eval(), trainer.model, trainer.backbone, inputs).requests[8:]
    assert edited == [f"a supporting hop of generality case 1 of record r{i}" for i in range(8) if max(ranks[i]) >= 5]


def test_a_case_with_hops_has_its_own_edit() -> None:
    groups = torch.tensor([0, 0, 1, 0, 1, 1])  # three requests, then three cases
    members, edits, rows = edits_with_hops(groups, 3, torch.tensor([4, 3, 4]))
    assert rows.tolist() == [0, 0, 1, 2, 3, 1]
    held = {edit: sorted(m for m, e in zip(members.tolist(), edits.tolist(), strict=True) if e == edit) for edit in range(4)}
    assert held == {0: [0, 1], 1: [2], 2: [0, 1, 4], 3: [2, 3, 5]}


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_logs_every_term_and_leaves_the_backbone_alone(trainer_for: Any, tmp_path: Path) -> None:
    records = [record(i, hops=i % 2) for i in range(4)]
    trainer = trainer_for(records, max_steps=25, per_device_train_batch_size=4, save_strategy="steps", save_steps=25, edits_per_group=1)
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
    assert files == {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
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

    def counted(self: Any, model: Any, batches: Any) -> Any:
        calls.append(sum(map(len, batches)))
        return calibrate(self, model, batches)

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
        trainer = trainer_for(records, folder=f"b{batch}", editor={"use_information_bottleneck": False}, edits_per_group=1, max_steps=3,
                              per_device_train_batch_size=batch, gradient_accumulation_steps=steps, optim="sgd")  # fmt: skip
        trainer.calibrate(trainer.model)
        trainer.train()
        runs.append((weights(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]))
    for state, history in runs[1:]:
        for name in ("loss", "loss_sg", "loss_il", "grad_norm"):
            assert [entry[name] for entry in history] == pytest.approx([entry[name] for entry in runs[0][1]], rel=1e-3)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, runs[0][0][name], rtol=1e-4, atol=1e-5)


def test_the_information_term_is_shared_out_too(trainer_for: Any) -> None:
    records = [record(i) for i in range(4)]
    losses = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = trainer_for(records, folder=f"i{batch}", edits_per_group=1, max_steps=1, per_device_train_batch_size=batch,
                              gradient_accumulation_steps=steps, beta=2.0)  # fmt: skip
        trainer.calibrate(trainer.model)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss_itm"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_autocast_trains(trainer_for: Any) -> None:
    trainer = trainer_for([record(i) for i in range(4)], bf16=True, max_steps=2)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_training_leaves_the_editors_config_alone(trainer_for: Any) -> None:
    trainer = trainer_for([record(i) for i in range(4)], max_steps=1)
    before = trainer.model.config.to_dict()
    trainer.train()
    assert trainer.model.config.to_dict() == before


# --- resume -----------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    """Ends the process's work after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resume_equals_an_uninterrupted_run_bitwise(trainer_for: Any) -> None:
    records = [record(i, hops=i % 2) for i in range(7)]
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "validation": records,
               "load_best_model_at_end": True, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}  # fmt: skip
    whole = trainer_for(records, folder="whole", callbacks=[EarlyStoppingCallback(100)], **options)
    whole.train()
    cut = trainer_for(records, folder="cut", callbacks=[EarlyStoppingCallback(100), StopAt(5)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    half = Path(cut.args.output_dir) / "checkpoint-6"  # as a run killed while it saved leaves it
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(cut.args.output_dir) == str(half.with_name("checkpoint-3"))
    resumed = trainer_for(records, folder="cut", editor={}, callbacks=[EarlyStoppingCallback(100)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(whole.model), weights(resumed.model))
    assert_equal_weights(*(weights(IBKEEditor.from_pretrained(f"{t.args.output_dir}/checkpoint-9")) for t in (whole, resumed)))
    for name in ("best_metric", "best_global_step"):
        assert getattr(whole.state, name) == getattr(resumed.state, name)
    states = [json.loads(Path(t.args.output_dir, "checkpoint-9/trainer_state.json").read_text()) for t in (whole, resumed)]
    assert states[0]["stateful_callbacks"]["EarlyStoppingCallback"] == states[1]["stateful_callbacks"]["EarlyStoppingCallback"]
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e][-3:] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resume_without_a_checkpoint_says_so(trainer_for: Any) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*start from the beginning"):
        trainer_for([record(0)]).train(resume_from_checkpoint=True)


def test_early_stopping_keeps_the_best_checkpoint(trainer_for: Any) -> None:
    records = [record(i) for i in range(4)]
    trainer = trainer_for(
        records, validation=[record(5), record(6)], max_steps=60, learning_rate=0.3, callbacks=[EarlyStoppingCallback(2)], save_steps=1,
        save_strategy="steps", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) < 60
    assert losses.index(min(losses)) == len(losses) - 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_non_finite_hypernetwork_stops_and_names_layer_and_record(trainer_for: Any) -> None:
    trainer = trainer_for([record(3)], max_steps=1)
    trainer.calibrate(trainer.model)
    trainer.model.hypernetworks[1].residual.bias.data[0] = float("nan")
    pattern = r"loss_sg is not finite at step 0: the adapted factors of model\.layers\.2\.mlp\.down_proj for request 0 of record r3"
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
    own = next(i for i in naive_ids(tiny_tokenizer, odd.locality[0])[0] if i not in seen)
    trainer.backbone.get_input_embeddings().weight.data[own] = float("nan")
    with pytest.raises(NonFiniteError, match=r"loss_il is not finite.*locality case 0 of record r3 \(edited layers model\.layers\.1"):
        trainer.compute_loss(trainer.model, trainer.data_collator([record(0), odd]))


def test_a_non_finite_gradient_stops_and_names_layer_and_record(trainer_for: Any) -> None:
    trainer = trainer_for([record(3)], max_steps=1)
    trainer.model.hypernetworks[1].mean.key.weight.register_hook(lambda gradient: gradient * float("inf"))
    pattern = r"gradient of hypernetworks\.1\.mean\.key\.weight is not finite at step 0: layer model\.layers\.2\.mlp\.down_proj, records r3"
    with pytest.raises(NonFiniteError, match=pattern):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"train_supporting_hops": "some"}, "train_supporting_hops must be one of none, unknown, all, found 'some'"),
     ({"beta": -1.0}, "beta must be at least 0, found -1.0"),
     ({"calibration_requests": 1}, "calibration_requests must be at least 2"),
     ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint would publish pickles")],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_an_editor_for_another_backbone_is_refused(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    editor = new_editor(tiny_model())
    with pytest.raises(ValueError, match="maps 48 to 32; the given model's maps 64 to 32"):
        IBKETrainer(editor, tiny_model(intermediate_size=64), arguments(tmp_path), tiny_tokenizer)


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., list[str]]:
    """Write a training program to disk; ``worker(options)`` returns its command, which takes the run's folder."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")

    def write(options: dict[str, Any], editor: dict[str, Any], records: int, after: str = "") -> list[str]:
        program = tmp_path / "program.py"
        program.write_text(
            f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import hashlib, json, torch
import test_trainer as t
from transformers import AutoModelForCausalLM, AutoTokenizer
backbone = AutoModelForCausalLM.from_pretrained({str(tmp_path / "backbone")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "backbone")!r})
arguments = t.arguments(sys.argv[1], **json.loads({json.dumps(options)!r}))
records = [t.record(i, 1 + i % 3, (0, 2, 1, 1)[i % 4], i % 2) for i in range({records})]
trainer = t.IBKETrainer(t.new_editor(backbone, **json.loads({json.dumps(editor)!r})), backbone, arguments, tokenizer,
                        train_dataset=t.RecordDataset(records), eval_dataset=t.RecordDataset(records[:5]))
trainer.train(resume_from_checkpoint="resume" in sys.argv)
{after}
"""
        )
        return [sys.executable, str(program)]

    return write


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(worker: Any, tmp_path: Path) -> None:
    options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    command = worker(options, {}, 9, 'trainer.save_model(sys.argv[1] + "/final")')
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment(), timeout=900, capture_output=True)
    cut = tmp_path / "cut"
    process = subprocess.Popen([*command, str(cut)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while last_complete_checkpoint(cut) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "final").exists()
    subprocess.run([*command, str(cut), "resume"], check=True, env=environment(), timeout=900, capture_output=True)
    assert_equal_weights(*(weights(IBKEEditor.from_pretrained(tmp_path / name / "final")) for name in ("whole", "cut")))


@pytest.mark.slow
def test_two_ranks_stay_equal_and_train_as_one_process_with_both_batches(worker: Any, tmp_path: Path) -> None:
    """Parameters agree across ranks, and without ε the losses are those of one process with a batch of twice the size."""
    after = """
assert trainer.args.world_size == expected, trainer.args.world_size
metrics = trainer.evaluate()
state = b"".join(p.detach().numpy().tobytes() for _, p in sorted(trainer.editor.state_dict().items()))
noise = float(torch.randn(()))
json.dump({"hash": hashlib.sha256(state).hexdigest(), "history": trainer.state.log_history, "metrics": metrics, "noise": noise},
          open(f"{sys.argv[1]}-{trainer.args.process_index}.json", "w"))
trainer.save_model(sys.argv[1] + "/final")
if expected == 2:
    torch.distributed.destroy_process_group()
"""
    options = {"max_steps": 4, "edits_per_group": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
               "optim": "sgd", "learning_rate": 0.1, "step_size_learning_rate": 0.1}  # fmt: skip
    editor = {"use_information_bottleneck": False}
    command = worker(options, editor, 16, after.replace("expected", "2"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command[1]]
    done = subprocess.run([*launch, str(tmp_path / "two")], env=environment(), timeout=900, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert ranks[0]["noise"] != ranks[1]["noise"]
    command = worker({**options, "per_device_train_batch_size": 4}, editor, 16, after.replace("expected", "1"))
    subprocess.run([*command, str(tmp_path / "one")], check=True, env=environment(), timeout=900, capture_output=True)
    alone = json.loads((tmp_path / "one-0.json").read_text())
    for name in ("loss", "loss_sg", "loss_il", "grad_norm"):
        values = [[entry[name] for entry in run["history"] if "loss" in entry] for run in (ranks[0], alone)]
        assert values[0] == pytest.approx(values[1], rel=2e-3), name
    for name in ("eval_reliability", "eval_generality", "eval_locality"):
        assert ranks[0]["metrics"][name] == ranks[1]["metrics"][name]
    one, two = (weights(IBKEEditor.from_pretrained(tmp_path / name / "final")) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
