"""`ibke sweep`: the grid of Atlas trainings behind the paper's Figures 3 to 7."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, place, positive, share_options


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "sweep",
        "train a grid of Atlas editors, for figures of hyper-parameters, ablations and domains; a killed run goes on",
        _run,
    )
    command.add_argument(
        "--grid", metavar="YAML", help="the trainings (default: those of the paper's figures, one night of two cores)"
    )
    command.add_argument("--steps", type=positive, metavar="N", help="steps of each training (default: the grid's)")
    command.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1 (default: the grid's)")
    command.add_argument(
        "--limit", type=positive, metavar="N", help="records of each split that editors are scored on (default: all)"
    )
    share_options(command)
    command.add_argument("--dry-run", action="store_true", help="name the trainings that are missing, and make none")
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the cells and sweep.json")


def _run(options: argparse.Namespace) -> None:
    from ..atlas.grid import GRID, read_grid
    from ..atlas.sweep import SWEEP, finished, merge_sweeps, planned, run_sweep
    from ..benchmark.cells import share_of

    out = Path(options.out)
    if options.merge:
        merge_sweeps(options.merge, out)
    else:
        grid = read_grid(options.grid or GRID, steps=options.steps, seeds=options.seeds)
        if options.dry_run:
            done = {line["name"] for line in finished(out)}
            missing = [cell.name for cell in share_of(grid.trainings(), options.shard) if cell.name not in done]
            print("\n".join([*missing, f"{len(missing)} trainings of {grid.steps} steps are missing"]))
            return
        run_sweep(grid, out, shard=options.shard, limit=options.limit)
    names = {line["name"] for line in finished(out)}
    print(f"{len(names)} of {len(names.union(planned(out)))} trainings are done\nwritten: {out / SWEEP}")
