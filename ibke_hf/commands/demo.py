"""`ibke demo`."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "demo", "watch edits of the embedded language model; with --compare score editors on it", _run
    )
    command.add_argument("--compare", action="store_true", help="score four editors on records of Atlas, too")
    command.add_argument(
        "--records", type=int, metavar="N", help="with --compare: records of each split (default 50; 0 for all)"
    )
    command.add_argument("--json", metavar="FILE", help="write the answers, and the scores, to this file")


def _run(given: argparse.Namespace) -> None:
    if given.records is not None and not given.compare:
        raise ValueError("--records says how many records to score editors on; give --compare as well")
    from ..app.demo import run_demo

    run_demo(json_file=given.json, compare=given.compare, records=given.records)
