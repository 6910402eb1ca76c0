"""`ibke families`: what works on which family of decoders."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .options import add_command


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "families", "try every family of decoders at toy size, and write what works on which", _run
    )
    command.add_argument(
        "--families", nargs="+", metavar="TYPE", help="some model types, such as llama rwkv (default: all)"
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        help="folder of families.json and FAMILIES.md; the other families that it holds stay where --families names "
        "some (default: print the page)",
    )


def _run(options: argparse.Namespace) -> None:
    import logging
    import warnings

    from transformers.utils.logging import get_verbosity, set_verbosity

    from ..atlas import load_backbone
    from ..benchmark.families import all_families, families_report, merged, page, status_beside, write_report

    unknown = sorted(set(options.families or ()) - set(all_families()))
    if unknown:
        raise ValueError(f"--families {unknown[0]}: transformers has no decoder of this model type")
    beside = status_beside(options.out) if options.out is not None and options.families else None
    loggers, verbosity = logging.getLogger("ibke_hf"), get_verbosity()
    level = loggers.level
    try:  # toy configs are odd on purpose: no warnings of them
        set_verbosity(logging.ERROR)
        loggers.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = families_report(
                load_backbone()[1], options.families, progress=lambda line: print(line, file=sys.stderr, flush=True)
            )
    finally:
        set_verbosity(verbosity)
        loggers.setLevel(level)
    if options.out is None:
        print(page(report))
        return
    write_report(report if beside is None else merged(beside, report), options.out)
    print(f"wrote {options.out}/FAMILIES.md and families.json")
