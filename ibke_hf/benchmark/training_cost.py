"""What a training step costs, against a loop over samples with dense updates, and against the plain passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.capture import GradientFactors, case_losses, evaluating, target_logits
from ..core.layers import is_transposed, modules_to_edit
from ..core.records import EditRecord
from ..core.tokens import IGNORED, TokenBatch, encode_requests
from ..training.arguments import IBKETrainingArguments
from ..training.batches import EditCollator, RecordDataset
from ..training.needs import TrainingNeeds, measured_speed
from ..training.objective import independence_for_locality, information_transfer, sufficiency_for_generality
from ..training.passes import Work
from ..training.speed import run_step
from ..training.trainer import IBKETrainer
from .ratios import Ratio, in_turns
from .subject import Subject

BATCH = 8  # records


def training_ratios(subject: Subject, runs: int) -> list[Ratio]:
    """Time a step of training, with what the backbone computes kept on disk and without, against two references.

    Args:
        subject: Backbone, editor and records.
        runs: Rounds of each.
    """
    with step_at_hand(subject) as (trainer, batch):
        needs, cache = needs_for(subject, batch), trainer.activations
        records = subject.some_records(BATCH)
        steps: dict[str, Callable[[], Any]] = {
            "ours": partial(run_step, trainer, batch, None),
            "naive": partial(naive_step, subject, trainer, records),
            "floor": partial(plain_passes, subject, batch),
        }
        if cache is not None:
            steps["cached"] = partial(run_step, trainer, batch, cache)
        medians = in_turns(steps, runs, subject.device)
    planned = measured_speed(needs, str(subject.device)).step_seconds(needs)
    shape = f"{subject.shape(BATCH)}; {len(batch['cases'])} texts"
    unit = "CPU s" if subject.device.type == "cpu" else "s"
    kept = medians.get("cached", medians["ours"])
    return [
        Ratio("train_vs_naive", shape, medians["ours"], medians["naive"], unit),
        Ratio("train_vs_floor", f"{shape}, activations kept", kept, medians["floor"], unit),
        Ratio("train_vs_naive_kept", f"{shape}, activations kept", kept, medians["naive"], unit),
        Ratio("train_vs_floor_first_time", shape, medians["ours"], medians["floor"], unit),
        Ratio("plan_train_time", shape, planned, medians["ours"], unit),
    ]


@contextmanager
def step_at_hand(subject: Subject) -> Iterator[tuple[IBKETrainer, dict[str, Any]]]:
    """Give a trainer of `BATCH` records, and their batch; its files are removed at the end."""
    records = subject.some_records(BATCH)
    with TemporaryDirectory() as folder:
        trainer = new_trainer(subject, records, folder)
        yield trainer, cast("EditCollator", trainer.data_collator)(records)


def needs_for(subject: Subject, batch: dict[str, Any]) -> TrainingNeeds:
    """Return what `ibke plan` counts for the texts of a batch."""
    cases, model, editor = batch["cases"], subject.model, subject.editor
    tokens, judged = cases.attention_mask.sum(1), (cases.labels != IGNORED).sum(1)
    work = Work(
        len(batch["records"]), round(float(tokens.float().mean())), round(float(judged.float().mean())), 2, 256
    )
    of_model, of_editor = (sum(p.numel() for p in part.parameters()) for part in (model, editor))
    dtype = str(model.dtype).removeprefix("torch.")
    return TrainingNeeds(editor.config, dtype, model.config, of_model, of_editor, work)


def new_trainer(subject: Subject, records: list[EditRecord], folder: str) -> IBKETrainer:
    """Return a trainer of the subject's editor, with a cache of activations in a folder."""
    arguments = IBKETrainingArguments(
        str(Path(folder) / "run"),
        max_steps=1,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        per_device_train_batch_size=len(records),
        edits_per_group=1,  # as in the loop over samples
        activation_cache=str(Path(folder) / "cache"),
        use_cpu=subject.device.type == "cpu",
    )
    trainer = IBKETrainer(
        subject.editor,
        backbone=subject.model,
        processing_class=subject.tokenizer,
        args=arguments,
        train_dataset=RecordDataset(records),
    )
    trainer.create_optimizer()
    return trainer


# --- references ---------------------------------------------------------------------------------------------------


def naive_step(subject: Subject, trainer: Any, records: list[EditRecord]) -> Tensor:
    """Run one step record by record: every ΔW as a matrix, every position's logits; return the loss.

    Every record is edited alone, as in the steps that this is held against.
    """
    total = torch.zeros((), device=subject.device)
    subject.editor.train()
    for record in records:
        parts: tuple[Any, ...] = (record.requests, record.generality, record.locality)
        request, general, local = (encode_requests(subject.tokenizer, part).to(subject.device) for part in parts)
        adapted = subject.editor(_captured_with_full_logits(subject, request), sample=True)
        edit = subject.editor.as_edit(adapted)
        weights = {}
        for name, module in modules_to_edit(subject.model, list(edit.layers)).items():
            update = edit.inputs[name][0].mT @ edit.outputs[name][0]
            weight: Any = module.weight
            weights[f"{name}.weight"] = weight + (update if is_transposed(module) else update.mT).to(weight.dtype)
        edited, judged = _full_logits(subject.model, general, weights)
        loss = sufficiency_for_generality(edited[judged], general.labels)
        edited, judged = _full_logits(subject.model, local, weights)
        with torch.no_grad():
            original, _ = _full_logits(subject.model, local, {})
        loss = loss + independence_for_locality(edited[judged], original[judged], local.labels)
        latents = [(a.mean, a.log_variance) for a in adapted if a.mean is not None and a.log_variance is not None]
        if latents:
            loss = loss + trainer.args.beta * information_transfer(latents, 1)
        (loss / len(records)).backward()
        total += loss.detach() / len(records)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return total


def _captured_with_full_logits(subject: Subject, request: TokenBatch) -> list[GradientFactors]:
    """Read the factors of one request by plain hooks, with the logits of every position."""
    modules = modules_to_edit(subject.model, subject.editor.config.module_names())
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def collect(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            torch.set_grad_enabled(True)  # ends with the no_grad of the pass
            output = output.detach().requires_grad_(True)
        inputs.append(arguments[0].detach())
        outputs.append(output)
        return output

    handles = [module.register_forward_hook(collect) for module in modules.values()]
    try:
        with torch.no_grad():
            logits, judged = _full_logits(subject.model, request, {})
            loss = torch.nn.functional.cross_entropy(logits[judged].float(), request.labels[judged])
            gradients = torch.autograd.grad(loss, outputs)
    finally:
        for handle in handles:
            handle.remove()
    mask = request.attention_mask.bool()
    norms = [output.detach().float().flatten(1).norm(dim=-1) for output in outputs]
    parts = zip(inputs, gradients, norms, strict=True)
    return [GradientFactors(h.float(), u.float(), mask, norm) for h, u, norm in parts]


def _full_logits(model: Any, batch: TokenBatch, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of every position, and which of them are judged."""
    arguments = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    with evaluating(model):
        logits = functional_call(model, weights, kwargs=arguments).logits if weights else model(**arguments).logits
    return logits, batch.labels != IGNORED


def plain_passes(subject: Subject, batch: dict[str, Any]) -> None:
    """Run the passes of one step and nothing else: no hypernetwork, no edit.

    Forward over requests and cases, and over the locality cases once more; backward, of activations alone and down to
    the lowest edited layer, over requests and cases. Logits are computed at the judged positions' columns alone.
    """
    requests, general, _ = batch["counts"]
    cases = batch["cases"].to(subject.device)
    parts = (cases[:requests].trimmed(), cases[requests:].trimmed())
    modules = modules_to_edit(subject.model, subject.editor.config.module_names())
    for part in parts:
        _forward_and_back(subject.model, next(iter(modules.values())), part)
    with torch.no_grad(), evaluating(subject.model):
        target_logits(subject.model, cases[requests + general :].trimmed())


def _forward_and_back(model: Any, lowest: nn.Module, batch: TokenBatch) -> None:
    root: list[Tensor] = []

    def start(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # ends with the no_grad of the pass
        root.append(output.detach().requires_grad_(True))
        return root[0]

    handle = lowest.register_forward_hook(start)
    try:
        with torch.no_grad(), evaluating(model):
            torch.autograd.grad(case_losses(*target_logits(model, batch)).sum(), root)
    finally:
        handle.remove()
