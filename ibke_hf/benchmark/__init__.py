"""`ibke table`: many editors on many selections of records, cell by cell, in a folder that a killed run goes on in."""

from __future__ import annotations

from .benches import Bench, ModelBench
from .cells import BenchmarkError, Cell, Plan
from .runs import finished_cells, merge_cells, open_folder, planned, run_cells

__all__ = [
    "Bench",
    "BenchmarkError",
    "Cell",
    "ModelBench",
    "Plan",
    "finished_cells",
    "merge_cells",
    "open_folder",
    "planned",
    "run_cells",
]
