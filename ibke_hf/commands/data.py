"""`ibke data`: records of a user's own facts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.build import CASE_KINDS
from ..io import locked
from .options import add_command, place, positive, positive_float, seed, share, shown, without_option
from .outputs import require_free

RATES = {
    "question_rate": "prompts asked as questions",
    "cue_rate": 'records whose questions end in " The answer is: ", as ZSRE\'s do',
    "novel_rate": "counterfactual edits to a name that nobody has",
    "near_rate": "locality cases about the edit's own relation that are as near to it as can be",
}


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
    rates = command.add_argument_group("shares of the records, from 0 to 1 (default 0)")
    for name, meaning in RATES.items():
        rates.add_argument(f"--{name.replace('_', '-')}", type=share, default=0.0, metavar="SHARE", help=meaning)
    command.add_argument(
        "--weights",
        type=weight,
        nargs="+",
        default=[],
        metavar="GROUP.KIND=NUMBER",
        help="how often a kind of case is made beside the others of its group, such as generality.rephrase=3 "
        "(default 1 each)",
    )
    without_option(command)
    command.add_argument("--seed", type=seed, default=0, help="seed of every draw (default 0)")
    command.add_argument("--force", action="store_true", help="replace the records that --out holds")

    facts = add_command(
        actions, "facts", "turn ParaRel's and LRE's published triples into tables of facts", _run_facts
    )
    facts.add_argument("--pararel", metavar="DIR", help="ParaRel's triples and patterns, a file each per property")
    facts.add_argument("--lre", metavar="DIR", help="LRE's factual relations, a JSON file each")
    facts.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="folder of the tables, with a folder per domain"
    )
    without_option(facts)
    facts.add_argument("--force", action="store_true", help="write the tables among what --out holds")


def weight(text: str) -> tuple[str, str, float]:
    """Read the weight of a kind of case: its group, the kind and a number above 0."""
    name, _, number = text.partition("=")
    group, _, kind = name.partition(".")
    if kind not in CASE_KINDS.get(group, ()):
        kinds = (f"{group}.{kind}" for group, kinds in CASE_KINDS.items() for kind in kinds)
        raise argparse.ArgumentTypeError(f"one of {', '.join(kinds)} is wanted before =, found {shown(name)}")
    return group, kind, positive_float(number)


def shares_of(weights: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """Return the weights by group and kind."""
    shares: dict[str, dict[str, float]] = {}
    for group, kind, number in weights:
        shares.setdefault(group, {})[kind] = number
    return shares


def _run_facts(options: argparse.Namespace) -> None:
    from ..data.public_facts import write_tables
    from ..data.subjects import edited_subjects

    out = Path(options.out)
    require_free(out, "files", force=options.force)
    with locked(out):
        subjects = edited_subjects(options.without or ())
        counts = write_tables(out, pararel=options.pararel, lre=options.lre, without=subjects)
    written = {name: counts.pop(name) for name in ("triples", "relations")}
    print(f"{out}: {written['triples']:,} triples of {written['relations']} relations")
    print("\n".join(f"left out {number:,}: {reason}" for reason, number in counts.items()))


def _run_build(options: argparse.Namespace) -> None:
    from ..data.folders import build_folder
    from ..data.subjects import edited_subjects

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
            without=edited_subjects(options.without or ()),
            shares=shares_of(options.weights),
            **{name: getattr(options, name) for name in RATES},
        )
    print("\n".join(f"{Path(options.out) / name}: {number} records" for name, number in counts.items()))
