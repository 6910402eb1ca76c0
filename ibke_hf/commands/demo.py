"""`ibke demo`."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "demo", "watch edits of the embedded language model, and a small comparison of editors", _run
    )
    command.add_argument("--json", metavar="FILE", help="write the scores to this file")
    command.add_argument(
        "--records", type=int, default=100, metavar="N", help="records of each split (default 100; 0 for all)"
    )


def _run(given: argparse.Namespace) -> None:
    from ..app.demo import run_demo

    run_demo(json_file=given.json, records=given.records)
