"""SERAC through the Trainer: two terms, files, resume, evaluation with the memory at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from torch.nn import functional
from training_runs import arguments, assert_equal_weights, record, weights

from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.tokens import IGNORED
from ibke_hf.editors.serac import SERACEditor
from ibke_hf.training.batches import EditCollator
from ibke_hf.training.serac import SERACTrainer, answer_loss, entries_of, run_serac_batch, scope_loss
from ibke_hf.training.trainer import RecordDataset

RECORDS = [record(i, generality=2, locality=2) for i in range(4)]


@pytest.fixture
def serac_trainer(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Any:
    def build(folder: str = "run", form: str = "embedding", validation: Any = None, **options: Any) -> SERACTrainer:
        backbone = tiny_model("qwen3", initializer_range=0.1)
        torch.manual_seed(1)
        editor = SERACEditor.for_backbone(
            backbone, scope=backbone, counterfactual=backbone, scope_form=form, embedding_dim=16
        )
        settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_grad_norm": 1.0, **options}
        data = {
            "train_dataset": RecordDataset(RECORDS),
            "eval_dataset": RecordDataset(validation) if validation else None,
        }
        return SERACTrainer(
            editor,
            backbone=backbone,
            args=arguments(tmp_path / folder, **settings),
            processing_class=tiny_tokenizer,
            **data,
        )

    return build


@pytest.mark.parametrize("form", ["embedding", "cross"])
def test_training_lowers_both_terms_and_leaves_the_backbone_alone(
    form: str, serac_trainer: Any, tmp_path: Path
) -> None:
    trainer = serac_trainer(form=form, max_steps=15, save_strategy="steps", save_steps=15, validation=RECORDS)
    before = weights(trainer.backbone)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["loss_scope"] + entry["loss_counterfactual"], rel=1e-4)
    for term in ("loss_scope", "loss_counterfactual"):
        assert history[-1][term] < 0.7 * history[0][term]
    assert_equal_weights(before, weights(trainer.backbone))
    assert all(p.grad is None for p in trainer.backbone.parameters())
    report = trainer.evaluate()
    assert {
        "eval_loss_scope",
        "eval_loss_counterfactual",
        "eval_reliability",
        "eval_generality",
        "eval_locality",
    } <= report.keys()
    assert_equal_weights(weights(trainer.model), weights(SERACEditor.from_pretrained(tmp_path / "run/checkpoint-15")))
    assert not any(path.suffix == ".bin" for path in (tmp_path / "run").rglob("*"))


@pytest.mark.slow
def test_a_trained_editor_answers_in_scope_and_leaves_the_rest(serac_trainer: Any) -> None:
    trainer = serac_trainer(max_steps=120, validation=RECORDS, logging_steps=40)
    trainer.train()
    report = trainer.evaluate()
    assert report["eval_reliability"] > 95
    assert report["eval_generality"] > 95
    assert report["eval_locality"] > 95


def test_resume_equals_an_uninterrupted_run_bitwise(serac_trainer: Any) -> None:
    straight = serac_trainer("straight", max_steps=4)
    straight.train()
    half = serac_trainer("half", max_steps=4, save_strategy="steps", save_steps=2)
    half.train()
    resumed = serac_trainer("half", max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    assert_equal_weights(weights(straight.model), weights(half.model))
    assert_equal_weights(weights(straight.model), weights(resumed.model))


def test_terms_equal_a_naive_reference(serac_trainer: Any, tiny_tokenizer: Any) -> None:
    trainer = serac_trainer()
    editor = trainer.editor.train()
    inputs = EditCollator(tiny_tokenizer)(RECORDS[:2])
    batch = run_serac_batch(editor, editor, trainer.backbone, inputs)
    cases, (requests, generality, _) = inputs["cases"], inputs["counts"]
    entries = [ids for ids, _ in entries_of(cases[:requests])]
    assert entries == [
        tiny_tokenizer(f"{r.requests[0].prompt} {r.requests[0].target}")["input_ids"] for r in RECORDS[:2]
    ]
    losses: dict[str, list[Any]] = {"positive": [], "own": [], "foreign": []}
    answered = []
    for row in range(len(cases)):
        for request in range(requests):
            same_record, inside = bool(inputs["owners"][row] == request), row < requests + generality
            scores = editor.scopes(
                editor.embed_requests(entries[request : request + 1]),
                entries[request : request + 1],
                cases[row : row + 1],
            )[:, 0]
            kind = "foreign" if not same_record else "positive" if inside else "own"
            losses[kind] += list(functional.softplus(-scores if kind == "positive" else scores))
            if kind == "positive":
                ids = [
                    *entries[request],
                    editor.config.separator,
                    *cases.input_ids[row][cases.attention_mask[row].bool()].tolist(),
                ]
                targets = cases.labels[row][cases.labels[row] != IGNORED]
                logits = editor.counterfactual(torch.tensor([ids])).logits[0, -len(targets) :]
                answered.append(functional.cross_entropy(logits, targets))
    expected = torch.stack([torch.stack(part).mean() for part in losses.values()]).mean()
    torch.testing.assert_close(batch.terms["loss_scope"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.terms["loss_counterfactual"], torch.stack(answered).mean(), rtol=1e-4, atol=1e-5)


def test_losses_of_few_cases() -> None:
    scopes = torch.tensor([[2.0], [-1.0]])
    owners = torch.zeros(2, dtype=torch.long)
    loss = scope_loss(scopes, owners, owners[:1], torch.tensor([True, False]))
    torch.testing.assert_close(
        loss, (functional.softplus(torch.tensor(-2.0)) + functional.softplus(torch.tensor(-1.0))) / 2
    )
    labels = torch.tensor([[IGNORED, 1], [0, 1]])
    logits = torch.randn(3, 4)
    each = functional.cross_entropy(logits, torch.tensor([1, 0, 1]), reduction="none")
    torch.testing.assert_close(answer_loss(logits, labels), (each[0] + each[1:].mean()) / 2)


def test_the_trainer_publishes_the_editor(hub: LoopbackHub, serac_trainer: Any) -> None:
    trainer = serac_trainer(max_steps=1, hub_model_id="org/serac-tiny")
    trainer.train()
    trainer.push_to_hub(license="apache-2.0")
    assert set(hub["org/serac-tiny"].files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    card = str(ModelCard.load("org/serac-tiny"))
    assert "from ibke_hf.editors.serac import SERACEditor" in card
    assert "a memory of edit requests" in card
    assert_equal_weights(weights(trainer.editor), weights(SERACEditor.from_pretrained("org/serac-tiny")))


def test_a_non_finite_editor_stops_and_names_the_records(serac_trainer: Any) -> None:
    trainer = serac_trainer()
    with torch.no_grad():
        trainer.editor.project.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss_scope is not finite at step 0: records r"):
        trainer.train()
