"""How fast training goes with a cache of activations and without: measured step by step, in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor

from .activations import ActivationCache
from .batches import EditCollator, UsableRecords
from .recipe import new_trainer, training_arguments
from .settings import TrainingSettings, require_reader
from .trainer import GradientEditorTrainer

CALIBRATED_ON = 32  # requests: the editor need not be good
WAYS = ("without", "filling", "filled")


def measure_speed(settings: TrainingSettings, steps: int) -> dict[str, Any]:
    """Time steps of a training without a cache, with one that is being filled, and with one that is filled.

    Each batch is run all three ways in turn, so that whatever else the machine does falls on all of them. The editor
    and the cache are given up afterwards.

    Args:
        settings: Of the training.
        steps: Number of batches, after one that is run to warm up.

    Returns:
        By way, ``seconds`` and ``cpu_seconds`` a step and ``records_per_second``; ``bytes_per_record`` on disk,
        ``records`` a step.

    Raises:
        ValueError: If the kind of editor reads no activations, or the backbone cannot be run in parts.
    """
    require_reader(settings.kind)
    beside = settings.training.get("activation_cache")
    if beside is not None:
        Path(beside).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside) as folder:
        settings = replace(
            settings, out=f"{folder}/editor", training={**settings.training, "activation_cache": folder}
        )
        trainer = new_trainer(settings, training_arguments(settings))
        cache = trainer.activations
        if cache is None:
            raise ValueError("there is nothing to compare, since training would run without a cache of activations")
        return _measured(trainer, cache, steps)


def _measured(trainer: GradientEditorTrainer, cache: ActivationCache, steps: int) -> dict[str, Any]:
    size, records = trainer.args.per_device_train_batch_size, cast("UsableRecords", trainer.train_dataset)
    numbers = random.Random(trainer.args.seed).choices(range(len(records)), k=size * (steps + 1))
    if len(records) >= len(numbers):
        numbers = random.Random(trainer.args.seed).sample(range(len(records)), len(numbers))
    collator = cast("EditCollator", trainer.data_collator)
    batches = [collator([records[number] for number in numbers[i : i + size]]) for i in range(0, len(numbers), size)]
    trainer.activations = None  # or calibration would store the requests
    trainer.prepare_editor(resumed=False)
    trainer.create_optimizer()
    totals = {way: [0.0, 0.0] for way in WAYS}
    _time_step(trainer, batches[0], None)
    before = cache.store.size
    for batch in batches[1:]:
        for way in WAYS:
            times = _time_step(trainer, batch, None if way == "without" else cache)
            totals[way] = [total + seconds for total, seconds in zip(totals[way], times, strict=True)]
    report: dict[str, Any] = {
        way: {"seconds": wall / steps, "cpu_seconds": cpu / steps, "records_per_second": size * steps / wall}
        for way, (wall, cpu) in totals.items()
    }
    stored = len({*numbers[size:]})
    return report | {"bytes_per_record": (cache.store.size - before) / stored, "records": size}


def _time_step(trainer: Any, batch: Mapping[str, Any], cache: ActivationCache | None) -> tuple[float, float]:
    """Run one step of the optimizer; return its seconds, and those of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    run_step(trainer, batch, cache)
    return time.perf_counter() - wall, time.process_time() - cpu


def run_step(trainer: Any, batch: Mapping[str, Any], cache: ActivationCache | None) -> Tensor:
    """Run one step of the optimizer on a batch, with a cache of activations or without; return the loss.

    Args:
        trainer: Of a gradient editor, with its optimizer.
        batch: What the trainer's collator returns.
        cache: What is kept of the texts; None where all is computed.
    """
    trainer.activations = cache
    trainer.model.train()
    loss: Tensor = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.detach()


def in_words(report: Mapping[str, Any], steps: int) -> str:
    """Return a measurement as text."""
    base = report["without"]["seconds"]
    lines = [f"{steps} steps of {report['records']} records, each run in all three ways:"]
    for way, title in zip(WAYS, ("without a cache", "while it is filled", "when it is filled"), strict=True):
        part = report[way]
        lines.append(
            f"  {title:<18} {part['records_per_second']:8.2f} records/s  {part['cpu_seconds']:7.3f} CPU s a step"
            f"  {base / part['seconds']:5.2f} x"
        )
    return "\n".join([*lines, f"  on disk {report['bytes_per_record'] / 1000:.0f} kB a record"])
