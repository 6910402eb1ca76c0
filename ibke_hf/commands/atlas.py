"""`ibke atlas`: how the embedded world was made."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from ..atlas import RIVALS
from .options import add_command, place, positive, seed

NOT_TO_SET = (
    "output_dir",
    "seed",
    "max_steps",
    "use_cpu",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)


def add(commands: Any) -> None:
    """Add the command and its actions."""
    actions = commands.add_parser("atlas", help="rebuild the embedded world").add_subparsers(
        dest="action", required=True, metavar="action"
    )
    command = add_command(
        actions,
        "build-data",
        "write the evaluation records of the embedded world, or training records",
        _run_build_data,
    )
    command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
    command.add_argument("--training", type=positive, metavar="N", help="write N training records to --out instead")
    command.add_argument("--generality", type=positive, default=4, help="generality cases of these (default 4)")
    command.add_argument("--locality", type=positive, default=2, help="locality cases of these (default 2)")
    command.add_argument("--seed", type=seed, default=0, help="seed of these (default 0)")
    command = add_command(actions, "build-backbone", "pretrain the embedded language model", _run_build_backbone)
    command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
    command.add_argument("--epochs", type=positive, help="passes over the taught facts")
    command.add_argument("--max-steps", type=positive, help="stop after so many steps, for trials")
    command.add_argument("--seed", type=seed, default=0)
    command = add_command(
        actions, "tune", "choose the hyper-parameters of the editors without weights on validation records", _run_tune
    )
    command.add_argument(
        "--editors",
        nargs="+",
        choices=RIVALS,
        default=RIVALS,
        metavar="NAME",
        help=f"default: all, {', '.join(RIVALS)}; the results of the others stay as they are",
    )
    command.add_argument(
        "--sequential",
        nargs="+",
        type=positive,
        default=None,
        metavar="N",
        help="edits that the model carries, each number tuned for itself (default: 1 10 100)",
    )
    command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
    command = add_command(
        actions, "report", "score the embedded editors on all test and held-out records", _run_report
    )
    command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
    for name in ("ibke", "mend"):
        action = "train-editor" if name == "ibke" else "train-mend"
        command = add_command(actions, action, f"train the embedded {name.upper()} editor", _run_train_atlas)
        command.set_defaults(editor_name=name)
        command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
        command.add_argument("--seed", type=seed, default=0)
        command.add_argument("--max-steps", type=positive, help="training steps (default: the recipe's)")
        command.add_argument("--records", type=positive, help="number of training records (default: the recipe's)")
        command.add_argument(
            "--set",
            type=_setting,
            nargs="*",
            default=[],
            metavar="NAME=VALUE",
            help="other fields of the recipe, for trials: JSON values; editor.NAME for fields of the editor",
        )
        command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    command = add_command(
        actions, "train-router", "train the router that finds the edits of the embedded editors", _run_train_router
    )
    command.add_argument("--out", type=place, metavar="DIR", help="default: the package's own assets")
    command.add_argument("--seed", type=seed, default=0)
    command.add_argument("--max-steps", type=positive, help="training steps (default: the recipe's)")
    command.add_argument("--records", type=positive, help="number of training records (default: the recipe's)")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def _run_train_router(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS
    from ..atlas.editors import train_atlas_router

    chosen = {"steps": options.max_steps, "records": options.records}
    settings = {name: value for name, value in chosen.items() if value is not None}
    out = options.out or ASSETS / "router"
    print(json.dumps(train_atlas_router(out, seed=options.seed, resume=options.resume, **settings), indent=2))


def _run_build_data(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS, load_split
    from ..atlas.datasets import write_evaluation_records, write_training_records

    if options.training is None:
        counts = write_evaluation_records(load_split(), options.out or ASSETS / "records")
    elif options.out is None:
        raise ValueError("--training writes records that the package doesn't hold: say where to with --out")
    else:
        cases = {"generality": options.generality, "locality": options.locality}
        written = write_training_records(load_split(), options.out, options.training, options.seed, **cases)
        counts = {"train": written}
    print(json.dumps(counts, indent=2))


def _run_build_backbone(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS, load_split
    from ..atlas.backbone import build_backbone

    split = load_split()
    limits = {
        name: value
        for name, value in (("epochs", options.epochs), ("max_steps", options.max_steps))
        if value is not None
    }
    report = build_backbone(split.world, split.taught, options.out or ASSETS / "backbone", seed=options.seed, **limits)
    print(json.dumps(report, indent=2))


def _run_tune(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS
    from ..atlas.tuning import EDITS, tune

    print(json.dumps(tune(options.out or ASSETS, options.editors, options.sequential or EDITS), indent=2))


def _run_report(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS
    from ..atlas.report import markdown_table, write_report

    print(markdown_table(write_report(options.out or ASSETS)))


def _run_train_atlas(options: argparse.Namespace) -> None:
    from ..atlas import ASSETS
    from ..atlas.editors import train_atlas_editor

    _require_fields(options)
    training = {name: value for group, name, value in options.set if group == "training"}
    editor_fields = {name: value for group, name, value in options.set if group == "editor"}
    training |= {name: value for name in ("max_steps", "records") if (value := getattr(options, name)) is not None}
    report = train_atlas_editor(
        options.editor_name,
        options.out or ASSETS / options.editor_name,
        seed=options.seed,
        options=editor_fields,
        resume=options.resume,
        **training,
    )
    print(json.dumps(report, indent=2))


def _require_fields(options: argparse.Namespace) -> None:
    """Refuse a `--set` that names no field, or one that the command decides itself."""
    from ..core.configuration_ibke import IBKEConfig
    from ..editors.mend import MENDConfig
    from ..training.trainer import IBKETrainingArguments

    config = IBKEConfig if options.editor_name == "ibke" else MENDConfig
    known = {
        "training": {
            field.name for field in fields(IBKETrainingArguments) if field.init and field.name not in NOT_TO_SET
        },
        "editor": {"layers", *(field.name for field in fields(config))},
    }
    for group, name, _ in options.set:
        if name not in known[group]:
            raise ValueError(f"--set {name}: no such field of the {group} recipe, or one that the command sets itself")


def _setting(text: str) -> tuple[str, str, Any]:
    """Return group (training or editor), name and value of ``NAME=VALUE``."""
    name, _, value = text.partition("=")
    group, _, field = name.rpartition(".")
    if not field.isidentifier() or group not in ("", "training", "editor"):
        raise argparse.ArgumentTypeError(
            f"NAME=VALUE is wanted, such as beta=0.2 or editor.latent_dim=128, found {text!r}"
        )
    try:
        return group or "training", field, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{name!r} needs a JSON value, such as 0.1, true or '\"cosine\"', found {value!r}"
        ) from error
