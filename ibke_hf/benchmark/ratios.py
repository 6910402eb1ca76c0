"""What an operation of this package costs against what the mathematics needs, both measured in one run, as ratios.

Times are CPU seconds of this process, medians of runs that take turns, so that whatever else the machine does falls
on both. On an accelerator they are seconds of the clock, with the device waited for.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation.report.tabular import markdown_table
from ..io import write_json, write_text

RUNS = 7
PAGE = ".md"  # beside the JSON file
LIMITS = {  # the largest ratio that is asked for
    "edit_b1": 1.10,
    "edit_b8": 1.10,
    "train_vs_naive": 0.30,
    "train_vs_floor": 0.75,
    "attached_forward": 1.03,
    "mixed_64": 1.10,
    "mixed_64_vs_peft": 0.5,
    "edit_memory": 1.1,
    "library_find": 0.05,
    "library_add": 1.5,
    "records_start_up": 1.0,
    "records_memory": 1.0,
}


@dataclass(frozen=True)
class Ratio:
    """One operation beside its reference.

    Attributes:
        name: Such as ``edit_b8``.
        shape: What it was measured on, in words.
        ours: Cost of this package.
        reference: Cost of what it is held against.
        unit: Of both, such as ``CPU s`` or ``bytes``.
    """

    name: str
    shape: str
    ours: float
    reference: float
    unit: str

    @property
    def ratio(self) -> float:
        """Ours over the reference."""
        return self.ours / self.reference

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the JSON list."""
        fields: dict[str, Any] = {"name": self.name, "shape": self.shape, "ours": self.ours}
        return fields | {"reference": self.reference, "unit": self.unit, "ratio": self.ratio}


def seconds_of(run: Callable[[], Any], device: torch.device | None = None) -> float:
    """Return the CPU seconds of one run; on an accelerator the seconds until the device is done."""
    if device is None or device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], Any]], number: int = RUNS, device: torch.device | None = None
) -> dict[str, float]:
    """Return the median seconds of each of several runs, which take turns, after one of each that is not counted.

    Args:
        runs: By name, what is timed.
        number: Rounds; every second one goes backwards, so that none always follows the same other.
        device: Where they compute.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whichever run fills its counters
    try:
        for turn in range(number):
            for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(seconds_of(runs[name], device))
    finally:
        if was_enabled:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    name: str, shape: str, ours: Callable[[], Any], reference: Callable[[], Any], number: int, device: torch.device
) -> Ratio:
    """Time one operation and its reference in turns."""
    medians = in_turns({"ours": ours, "reference": reference}, number, device)
    unit = "CPU s" if device.type == "cpu" else "s"
    return Ratio(name, shape, medians["ours"], medians["reference"], unit)


# --- what is written ----------------------------------------------------------------------------------------------


def machine() -> str:
    """Return the processors and accelerators of this machine, in generic words."""
    family, file = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if file.exists():
        lines = (line.partition(":") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
        family = next((value.strip() for key, _, value in lines if key.strip() == "model name"), family)
    words = f"{family}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    if torch.accelerator.is_available() and torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import transformers

    from .. import __version__

    return {
        "ibke-hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_ratios(ratios: Sequence[Ratio], file: str | Path, *, command: str, about: str) -> list[Path]:
    """Write the JSON list, and a page beside it with machine, versions and command.

    Args:
        ratios: What was measured.
        file: Name of the JSON file; the page has the same name and ends in ``.md``.
        command: Command line that measured it.
        about: Model that it was measured on.

    Returns:
        The files that were written.
    """
    place = Path(file)
    write_json(place, [ratio.to_json() for ratio in ratios])
    beside = place.with_suffix(PAGE)
    write_text(beside, page(ratios, command=command, about=about))
    return [place, beside]


def page(ratios: Sequence[Ratio], *, command: str, about: str) -> str:
    """Return the results as Markdown, with machine, versions and command."""
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = (
        f"Medians of runs in turns, on {about}. Machine: {machine()}. Versions: {said}. Command:\n\n"
        f"```\n{command}\n```\n"
    )
    return f"# Costs against what the mathematics needs\n\n{head}\n{table(ratios)}\n"


def table(ratios: Iterable[Ratio]) -> str:
    """Return a Markdown table of ratios, each with the largest that is asked for."""
    rows = [
        (r.name, r.shape, f"{r.ours:.4g}", f"{r.reference:.4g}", r.unit, f"{r.ratio:.3f}", _limit(r.name))
        for r in ratios
    ]
    return markdown_table(["name", "shape", "ours", "reference", "unit", "ratio", "asked"], rows, left=2)


def _limit(name: str) -> str:
    return f"≤ {LIMITS[name]:.2f}" if name in LIMITS else "–"
