"""Bytes that an edit keeps alive, and bytes that are allocated at once while something runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..core.composition import SolvedEdit
from ..core.edits import LowRankEdit
from ..training.needs import STATES
from ..training.speed import run_step
from .ratios import Ratio
from .subject import Subject
from .training_cost import needs_for, step_at_hand


def memory_ratios(subject: Subject) -> list[Ratio]:
    """Hold the bytes that edits keep alive against those of what they are made of, and plans against bytes."""
    kept = [
        Ratio(name, f"{subject.shape(number)}, {mode}", stored_bytes(edit), content_bytes(edit), "bytes")
        for name, number, mode in (
            ("edit_memory", 1, "joint"),
            ("edit_memory_b8", 8, "independent"),
            ("edit_memory_sequential", 8, "sequential"),
        )
        for edit in [subject.editor.edit(subject.model, subject.tokenizer, subject.requests(number), mode=mode)]
    ]
    return kept + (planned_memory(subject) if subject.device.type == "cpu" else [])


def planned_memory(subject: Subject) -> list[Ratio]:
    """Hold what `ibke plan` says of memory against what is allocated: for an edit, a training step and serving."""
    model, editor = subject.model, subject.editor
    weights, of_editor = (sum(p.nbytes for p in part.parameters()) for part in (model, editor))
    with step_at_hand(subject) as (trainer, batch):
        needs = needs_for(subject, batch)
        run_step(trainer, batch, None)  # makes the moments of Adam
        step = weights + STATES * of_editor + peak_bytes(lambda: run_step(trainer, batch, None), subject.device)
    request = subject.batch(1)
    edited = needs.with_work(tokens=request.input_ids.shape[1], targets=request.kept)
    make = partial(editor.edit, model, subject.tokenizer, subject.requests(1))
    making = weights + of_editor + peak_bytes(make, subject.device)
    ids = torch.zeros(needs.work.rows, needs.work.context, dtype=torch.long)
    with torch.no_grad():
        serve = partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
        serving = weights + peak_bytes(serve, subject.device)
    shapes = {
        "plan_train_memory": (subject.shape(needs.batch), needs.total, step),
        "plan_edit_memory": (subject.shape(1), edited.edit_total, making),
        "plan_serve_memory": (f"{ids.shape[0]} × {ids.shape[1]} tokens", needs.serving_total, serving),
    }
    return [Ratio(name, shape, ours, reference, "bytes") for name, (shape, ours, reference) in shapes.items()]


def content_bytes(edit: LowRankEdit | SolvedEdit) -> int:
    """Return the bytes of ĥ and û in fp32, and of the keys in 16 bit that composition solves for."""
    parts = edit.parts if isinstance(edit, SolvedEdit) else (edit,)
    factors = sum(
        4 * tensor.numel() for part in parts for side in (part.inputs, part.outputs) for tensor in side.values()
    )
    return factors + sum(2 * keys.numel() for part in parts for keys in part.keys.values())


def stored_bytes(value: Any) -> int:
    """Return the bytes of all storages that a value's tensors keep alive: a view keeps the whole of what it views."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    if is_dataclass(value):
        return [tensor for each in fields(value) for tensor in _tensors(getattr(value, each.name))]
    return []


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes more than at the start are allocated at once on a device while something runs.

    On a CPU the allocations are those that torch's profiler sees, temporary ones of its kernels among them.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        run()
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    profiler: Any = trace.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
