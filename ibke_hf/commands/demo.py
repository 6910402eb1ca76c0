"""`ibke demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..io import locked, require_writable
from .options import add_command, count, place


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "demo", "watch edits of the embedded language model; with --compare score editors on it", _run
    )
    command.add_argument("--compare", action="store_true", help="score four editors on records of Atlas, too")
    command.add_argument(
        "--records", type=count, metavar="N", help="with --compare: records of each split (default 50; 0 for all)"
    )
    command.add_argument("--json", type=place, metavar="FILE", help="write the answers, and the scores, to this file")


def _run(options: argparse.Namespace) -> None:
    if options.records is not None and not options.compare:
        raise ValueError("--records says how many records to score editors on; give --compare as well")
    from ..app.demo import run_demo

    if options.json is None:
        run_demo(compare=options.compare, records=options.records)
        return
    file = Path(options.json)
    require_writable(file)  # before the lock makes its folder, and not after all scoring
    with locked(file.parent, lock=f".{file.name}.lock"):
        run_demo(json_file=file, compare=options.compare, records=options.records)
