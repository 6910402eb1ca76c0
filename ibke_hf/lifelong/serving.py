"""What a library costs where it is served: in ratios to the model's own work, and in bytes a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.edits import LowRankEdit
from ..core.layers import input_device
from ..core.tokens import encode_prompt
from .library import EditLibrary
from .reading import read_states

REPEATS = 9  # runs that a median is of


@torch.no_grad()
def seconds_of(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median seconds of a call; the first call, which warms up, does not count."""
    run()
    times = []
    for _ in range(repeats):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        started = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def finding_seconds(router: Any, shelf: Any, states: list[Tensor], mask: Tensor) -> float:
    """Return the seconds of finding a prompt's edits, from states that the model has computed anyway."""
    number = router.config.most_edits
    return seconds_of(lambda: shelf.nearest(router(states, mask), number))


def forward_seconds(model: Any, ids: Tensor) -> float:
    """Return the seconds of the model's own pass over a prompt."""
    return seconds_of(lambda: model(input_ids=ids, use_cache=False))


def row_bytes(edit: LowRankEdit) -> int:
    """Return what a row that carries one edit holds of it: the factors of its layers in fp32."""
    return sum(4 * (h.shape[1] * h.shape[2] + edit.outputs[name].numel()) for name, h in edit.inputs.items())


def measured(library: EditLibrary, model: Any) -> dict[str, str]:
    """Return what `ibke library serve-check` prints: number, size, time to find, memory of a row."""
    from ..core.tokens import pad_and_label

    entries = library.list()
    report = {"edits": str(len(entries)), "bytes on disk": f"{sum(entry.nbytes for entry in entries):,}"}
    if not entries or library.router is None:
        return report
    prompt = entries[0].requests[0]
    ids = encode_prompt(library.tokenizer, prompt.prompt, prompt.format)
    shelf = library.shelf(model)
    states, mask = read_states(model, library.router.sources, pad_and_label([([*ids, 0], len(ids))]))
    finding = finding_seconds(library.router, shelf, states, mask)
    forward = forward_seconds(model, torch.tensor([ids], device=input_device(model)))
    largest = max(row_bytes(library.read(entry.id)) for entry in entries[:32])
    report["finding the edits of a prompt"] = (
        f"{1000 * finding:.2f} ms, {100 * finding / forward:.1f} % of a forward pass"
    )
    report["memory of a row that carries one edit"] = f"{largest:,} bytes"
    return report
