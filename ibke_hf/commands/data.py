"""`ibke data`: records of a user's own facts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, positive


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
        "--out", required=True, metavar="DIR", help="folder of the record files, train and validation"
    )
    command.add_argument("--records", type=positive, default=1000, help="number of training records (default 1000)")
    command.add_argument(
        "--validation", type=float, default=0.1, help="share of the subjects kept for validation (default 0.1)"
    )
    command.add_argument("--generality", type=positive, default=3, help="generality cases a record (default 3)")
    command.add_argument("--locality", type=positive, default=2, help="locality cases a record (default 2)")
    command.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")


def _run_build(given: argparse.Namespace) -> None:
    from ..data.folders import build_folder

    counts = build_folder(
        given.facts,
        given.out,
        records=given.records,
        validation=given.validation,
        generality=given.generality,
        locality=given.locality,
        seed=given.seed,
    )
    print("\n".join(f"{Path(given.out) / name}: {number} records" for name, number in counts.items()))
