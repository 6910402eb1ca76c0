"""IBKETrainer's objective and scores against a dense one-case-at-a-time reference; collation and supporting hops."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import fact, naive_ids, record
from transformers.pytorch_utils import Conv1D

from ibke_hf import IBKEEditor
from ibke_hf.core.capture import GradientFactors
from ibke_hf.core.records import EditCase, EditRecord
from ibke_hf.core.tokens import IGNORED, RequestError
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.training.batches import PASS_TOKENS, rows_by_length
from ibke_hf.training.objective import edits_with_hops, hit_rates, run_batch
from ibke_hf.training.trainer import EditCollator


def naive_logits(model: Any, tokenizer: Any, case: Any) -> tuple[Tensor, Tensor]:
    """Logits at the target positions of one case alone, unpadded, and the target ids."""
    ids, start = naive_ids(tokenizer, case)
    logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    return logits.float(), torch.tensor(ids[start:])


def naive_update(
    editor: Any, backbone: Any, tokenizer: Any, requests: Sequence[Any]
) -> tuple[dict[str, Tensor], list[Any]]:
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
            GradientFactors(
                seen[n][0], seen[n][1].grad, torch.ones(seen[n][0].shape[:2], dtype=torch.bool), torch.ones(1)
            )
            for n in names
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


def naive_loss(
    editor: Any, backbone: Any, tokenizer: Any, groups: Sequence[Sequence[EditRecord]], edit_too: bool, hops: bool
) -> Any:
    """Eq. 36 with dense updates and one forward per case; and the scores of each role."""
    generality, locality, latents, number = [], [], [], 0
    scores: dict[str, list[float]] = {"reliability": [], "generality": [], "locality": []}

    def hits(logits: Tensor, targets: Tensor, top_k: int) -> float:
        best = [row.topk(top_k).indices.tolist() for row in logits]
        return sum(t in b for t, b in zip(targets.tolist(), best, strict=True)) / len(targets)

    for group in groups:
        requests = [r for item in group for r in item.requests]
        updates, new_latents = naive_update(editor, backbone, tokenizer, requests)
        latents, number = latents + new_latents, number + len(requests)
        model = naive_edited(backbone, updates)
        for item in group:
            for case in (*item.requests, *item.generality):
                edited = model
                if hops and getattr(case, "supporting", ()):
                    more, new_latents = naive_update(editor, backbone, tokenizer, case.supporting)
                    latents += new_latents
                    edited = naive_edited(model, more)
                logits, targets = naive_logits(edited, tokenizer, case)
                judged = isinstance(case, EditCase)
                if judged or edit_too:
                    generality.append(nn.functional.cross_entropy(logits, targets))
                scores["generality" if judged else "reliability"].append(
                    hits(logits, targets, case.top_k if judged else 1)
                )
            for case in item.locality:
                logits, targets = naive_logits(model, tokenizer, case)
                original, _ = naive_logits(backbone, tokenizer, case)
                p, q = logits.softmax(-1), original.softmax(-1)
                locality.append((p * (p.log() - q.log())).sum(-1).mean())
                scores["locality"].append(hits(logits, original.argmax(-1), case.top_k))
    terms = {"loss_sg": torch.stack(generality).mean(), "loss_il": torch.stack(locality).mean()}
    if latents[0].log_variance is not None:
        size = number * len(editor.config.edited_layers) * latents[0].mean[0].numel()
        divergence = [0.5 * (a.log_variance.exp() + a.mean**2 - 1 - a.log_variance).sum() for a in latents]
        terms["loss_itm"] = torch.stack(divergence).sum() / size
    return terms, {name: sum(values) / len(values) for name, values in scores.items()}


@pytest.mark.parametrize(
    ("family", "kind", "per_group", "edit_too", "hops"),
    [
        ("qwen3", IBKEEditor, 1, False, "none"),
        ("gpt2", IBKEEditor, 2, True, "all"),
        ("qwen3", MENDEditor, 0, False, "all"),
    ],
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
    assert {name: metrics[f"eval_{name}"] for name in scores} == pytest.approx(
        {name: 100 * score for name, score in scores.items()}
    )
    assert all(
        metrics[f"eval_{name}"] == pytest.approx(float(value.detach()), rel=2e-4, abs=1e-5)
        for name, value in terms.items()
    )


def test_scores_count_every_case_of_an_incomplete_last_batch(trainer_for: Any) -> None:
    records = [record(i, 1 + i % 3, 1 + i % 2) for i in range(5)]
    scores = []
    for size in (1, 2, 5):
        trainer = trainer_for(records, validation=records, per_device_eval_batch_size=size, edits_per_group=1)
        trainer.calibrate(trainer.model)
        scores.append({name: trainer.evaluate()[f"eval_{name}"] for name in ("reliability", "generality", "locality")})
    assert scores[0] == pytest.approx(scores[1]) and scores[0] == pytest.approx(scores[2])


def test_hit_rates_break_ties_to_the_lowest_id() -> None:
    labels = torch.tensor([[2, 3]])
    assert hit_rates(torch.zeros(2, 6), labels, torch.tensor([3])).tolist() == [0.5]
    assert hit_rates(torch.zeros(1, 6), torch.tensor([[IGNORED, 3]]), torch.tensor([4])).tolist() == [1.0]


def test_predictions_that_are_not_finite_hit_nothing() -> None:
    assert hit_rates(torch.full((1, 6), float("nan")), torch.tensor([[2]]), torch.tensor([5])).tolist() == [0.0]


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
    still = [
        run_batch(trainer.model.eval(), trainer.model, trainer.backbone, inputs).adapted[0].latent for _ in range(2)
    ]
    assert torch.equal(*still)
    torch.testing.assert_close(still[0][0], still[0][1])


# --- the collator ------------------------------------------------------------------------------------------------


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


# --- supporting hops ---------------------------------------------------------------------------------------------


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
    held = {
        edit: sorted(m for m, e in zip(members.tolist(), edits.tolist(), strict=True) if e == edit)
        for edit in range(4)
    }
    assert held == {0: [0, 1], 1: [2], 2: [0, 1, 4], 3: [2, 3, 5]}


def test_rows_of_like_lengths_share_a_forward_where_that_saves_tokens() -> None:
    def cost(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
        return sum(len(rows) * max(lengths[row] for row in rows) + PASS_TOKENS for rows in groups)

    assert rows_by_length([5, 6, 5]) == [[0, 2, 1]]
    assert rows_by_length([9, 60, 10, 61]) == [[0, 2], [1, 3]]
    lengths = torch.randint(4, 90, (7,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = rows_by_length(lengths)
    assert sorted(row for rows in groups for row in rows) == list(range(7))
    order = sorted(range(7), key=lengths.__getitem__)
    splits = [
        [order[i:j] for i, j in pairwise([0, *cuts, 7])] for n in range(7) for cuts in combinations(range(1, 7), n)
    ]
    assert cost(groups, lengths) == min(cost(split, lengths) for split in splits)
