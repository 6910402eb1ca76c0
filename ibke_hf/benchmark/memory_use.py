"""Bytes that an edit keeps alive, and bytes that are allocated at once while something runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .ratios import Ratio
from .subject import Subject


def memory_ratios(subject: Subject) -> list[Ratio]:
    """Hold the bytes that edits keep alive against those of their factors ĥ and û alone."""
    return [
        Ratio(name, f"{subject.shape(number)}, {mode}", stored_bytes(edit), factor_bytes(edit), "bytes")
        for name, number, mode in (
            ("edit_memory", 1, "joint"),
            ("edit_memory_b8", 8, "independent"),
            ("edit_memory_sequential", 8, "sequential"),
        )
        for edit in [subject.editor.edit(subject.model, subject.tokenizer, subject.requests(number), mode=mode)]
    ]


def factor_bytes(edit: Any) -> int:
    """Return the bytes of ĥ and û."""
    return sum(tensor.nbytes for part in (edit.inputs, edit.outputs) for tensor in part.values())


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
