"""`ibke demo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..editors.catalogue import ATLAS
from ..io import locked, require_writable
from .options import add_command, count, place


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "demo", "watch edits of a language model; with --compare score editors on the embedded one", _run
    )
    command.add_argument(
        "--model",
        default=ATLAS,
        metavar="NAME|PATH|ID",
        help="the model that is edited (default: the embedded one); smollm2: real mistakes of a real model, corrected",
    )
    command.add_argument(
        "--editor",
        metavar="NAME|PATH|ID",
        help="folder or Hub id of a trained editor, or ft (default: the one trained for the model, if it is at hand, "
        "else ft)",
    )
    command.add_argument(
        "--mistakes", type=count, metavar="N", help="mistakes that are corrected (default 3; 0 for all that are known)"
    )
    command.add_argument(
        "--find-mistakes",
        metavar="FILE",
        help="only ask the model the facts of this list, and write those that it gets wrong to --json",
    )
    command.add_argument("--compare", action="store_true", help="score four editors on records of Atlas, too")
    command.add_argument(
        "--records", type=count, metavar="N", help="with --compare: records of each split (default 50; 0 for all)"
    )
    command.add_argument("--json", type=place, metavar="FILE", help="write the answers, and the scores, to this file")


def _run(options: argparse.Namespace) -> None:
    atlas = options.model == ATLAS
    if options.records is not None and not options.compare:
        raise ValueError("--records says how many records to score editors on; give --compare as well")
    if options.compare and not atlas:
        raise ValueError(f"--compare scores editors of {ATLAS}; `ibke table` compares them on {options.model}")
    if options.editor and atlas:
        raise ValueError(f"--editor {options.editor}: {ATLAS} has its own; leave it out, or give a --model")
    if options.mistakes is not None and atlas:
        raise ValueError("--mistakes says how many mistakes of another model are corrected; give a --model as well")
    if options.find_mistakes and (atlas or options.json is None):
        raise ValueError("--find-mistakes takes a --model to ask, and --json for the file that is written")
    work = _finding(options) if options.find_mistakes else _showing(options)
    if options.json is None:
        work()
        return
    file = Path(options.json)
    require_writable(file)  # before the lock makes its folder, and not after all scoring
    with locked(file.parent, lock=f".{file.name}.lock"):
        work()


def _showing(options: argparse.Namespace) -> Callable[[], Any]:
    from ..app.demo import SHOWN, run_demo
    from ..app.workbench import load_workbench

    how: dict[str, Any] = {"json_file": options.json, "compare": options.compare, "records": options.records}
    how["shown"] = SHOWN if options.mistakes is None else options.mistakes
    if options.model == ATLAS:
        return lambda: run_demo(**how)
    return lambda: run_demo(load_workbench(options.editor, options.model), **how)


def _finding(options: argparse.Namespace) -> Callable[[], Any]:
    from ..app.demo import write_mistakes

    return lambda: write_mistakes(options.model, options.find_mistakes, options.json)
