"""Runs of `ibke table` on a tiny model: records, a plan, and the scores of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from training_runs import record

from ibke_hf.benchmark import ModelBench, Plan, run_cells
from ibke_hf.evaluation.scores import REPORTED

RECORDS = [replace(record(i), kind=("counterfactual", "unknown")[i % 2]) for i in range(8)]


PLAN = Plan(("none", "ft"), ("places",), ("counterfactual", "unknown"), seeds=2, records=2)


def run(bench: ModelBench, out: Path, plan: Plan = PLAN, **options: Any) -> list[dict[str, Any]]:
    return run_cells(bench, plan, out, progress=False, **options)


def scores(cells: Iterable[dict[str, Any]]) -> list[Any]:
    return [[cell[name] for name in ("editor", "split", "edits", "sequential", "seed", *REPORTED)] for cell in cells]
