"""`ibke drift`: what an edit does to everything else."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, load_options, model_options, place, positive


def add(commands: Any) -> None:
    """Add the command."""
    summary = "measure what an edit does to everything else, and store it with the edit"
    command = add_command(commands, "drift", summary, _run)
    command.add_argument("--edit", required=True, help="folder or Hub id of a saved edit; a folder gets the scores")
    model_options(command)
    command.add_argument(
        "--text",
        metavar="FILE|ID",
        help="text to read: lines, JSON Lines or a dataset (default: prose of this package)",
    )
    command.add_argument(
        "--tasks",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="A,B",
        help="tasks of lm-eval-harness too, such as ibke_common_facts of this package",
    )
    command.add_argument("--limit", type=positive, metavar="N", help="examples of each task, or lines of the text")
    command.add_argument("--json", type=place, metavar="FILE", help="write the scores there too")


def _run(options: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from tabulate import tabulate

    from ..data.texts import NUMBER, read_texts
    from ..delivery.drift import PLAIN_TEXT, measure_drift, store
    from ..delivery.harness import require_harness, task_drift
    from ..editors.saved import load_edit
    from ..hub.cards.edit import drift_rows
    from ..io import require_writable, write_json
    from ..loading import load_model

    if options.tasks:
        require_harness()
    if options.json is not None:
        require_writable(options.json)
    text = options.text or PLAIN_TEXT
    texts = read_texts(text, options.limit or NUMBER)
    edit = load_edit(options.edit)
    model, tokenizer = load_model(options.model or edit.info.backbone or None, **load_options(options))
    drift = measure_drift(model, tokenizer, edit, texts, Path(text).stem)
    if options.tasks:
        tasks = task_drift(model, tokenizer, edit, options.tasks, limit=options.limit)
        drift = replace(drift, tasks=tasks)
    print(tabulate(drift_rows(drift.scores()), ["", "before", "after"], tablefmt="plain", disable_numparse=True))
    if options.json is not None:
        write_json(options.json, drift.scores())
    kept = store(options.edit, drift)
    print(f"\nstored in {options.edit}/edit.json" if kept else "\nnot stored: there is no edit.json here to hold it")
