"""`ibke check`: a file of facts as a test suite for a model."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, load_options, model_options, place


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "check", "ask a model the facts of a file; exit with 1 if an answer is wrong", _run
    )
    command.add_argument("facts", metavar="FACTS.yaml", help="facts: prompts, accepted answers, what must not change")
    model_options(command)
    command.add_argument("--edit", metavar="EDIT", help="folder or Hub id of a saved edit that the model carries")
    command.add_argument("--junit", type=place, metavar="FILE", help="write the outcome as JUnit XML too")


def _run(options: argparse.Namespace) -> int:
    from ..delivery.check import check_facts, failures, report, write_junit
    from ..delivery.facts import read_checked_facts
    from ..editors.saved import load_edit
    from ..io import require_writable
    from ..loading import load_model

    facts = read_checked_facts(options.facts)
    if options.junit is not None:
        require_writable(options.junit)
    edit = None if options.edit is None else load_edit(options.edit)
    name = options.model if options.model or edit is None else edit.info.backbone or None
    model, tokenizer = load_model(name, **load_options(options))
    outcomes = check_facts(model, tokenizer, facts, edit)
    print(report(outcomes))
    if options.junit is not None:
        write_junit(outcomes, options.junit, options.facts)
    return 1 if failures(outcomes) else 0
