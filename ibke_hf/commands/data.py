"""`ibke data`: records of a user's own facts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..io import locked
from .options import add_command, place, positive, seed
from .outputs import require_free


def add(commands: Any) -> None:
    """Add the command and its actions."""
    actions = commands.add_parser("data", help="make edit records").add_subparsers(
        dest="action", required=True, metavar="action"
    )
    command = add_command(actions, "build", "turn tables of facts into edit records in UniEdit's schema", _run_build)
    command.add_argument(
        "--facts", required=True, metavar="DIR", help="tables: relations.tsv, templates.tsv, triples.tsv, entities.tsv"
    )
    command.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="folder of the record files, train and validation"
    )
    command.add_argument("--records", type=positive, default=1000, help="number of training records (default 1000)")
    command.add_argument(
        "--validation", type=float, default=0.1, help="share of the subjects kept for validation (default 0.1)"
    )
    command.add_argument("--generality", type=positive, default=3, help="generality cases a record (default 3)")
    command.add_argument("--locality", type=positive, default=2, help="locality cases a record (default 2)")
    command.add_argument("--seed", type=seed, default=0, help="seed of every draw (default 0)")
    command.add_argument("--force", action="store_true", help="replace the records that --out holds")


def _run_build(options: argparse.Namespace) -> None:
    from ..data.folders import build_folder

    out = Path(options.out)
    if any((out / split).exists() for split in ("train", "validation")):  # beside other files it harms nothing
        require_free(out, "records", force=options.force)
    with locked(out):
        counts = build_folder(
            options.facts,
            out,
            records=options.records,
            validation=options.validation,
            generality=options.generality,
            locality=options.locality,
            seed=options.seed,
            replace=options.force,
        )
    print("\n".join(f"{Path(options.out) / name}: {number} records" for name, number in counts.items()))
