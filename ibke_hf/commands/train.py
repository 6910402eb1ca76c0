"""`ibke train`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..editors.catalogue import TRAINED
from .options import (
    PRECISIONS,
    add_command,
    bits_option,
    count,
    device_map_option,
    edited_modules_option,
    place,
    positive,
    positive_float,
    seed,
    share,
    without_option,
)
from .prompt_options import prompt_changes, prompt_options

if TYPE_CHECKING:
    from ..training.settings import TrainingSettings

LAUNCH_FILES = ("devices", "cpu")  # in training/launch
SAVED_PRECISIONS = ("float32", "float16")
RECORDS = ("records", "validation", "augment", "augment_records", "without")
CHOOSE, SHARD = "choose_step_size", "shard_backbone"
TOP_LEVEL = (
    "kind",
    "backbone",
    *RECORDS,
    "out",
    "layers",
    "dtype",
    "device_map",
    "bits",
    SHARD,
    "chat_share",
    "save_dtype",
)
EDITOR_FIELDS = ("latent_dim", "edited_modules")
PROMPTS = ("chat", "chat_options", "leading_space")
TRAINING = {  # flags that set fields of the training arguments
    "max_steps": "max_steps",
    "epochs": "num_train_epochs",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "batch_size": "per_device_train_batch_size",
    "save_steps": "save_steps",
    "activation_cache": "activation_cache",
}


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "train",
        "train an editor for any backbone, on your records or on those that ship with the package",
        _run,
    )
    command.add_argument(
        "--config", metavar="YAML", help="file of settings, overridden by flags; nested: editor, training"
    )
    command.add_argument("--kind", choices=TRAINED, help="kind of editor (default: ibke)")
    command.add_argument("--backbone", help="folder or Hub id of the backbone")
    _record_options(command)
    _editor_options(command)
    _training_options(command)
    _run_options(command)


def _record_options(command: Any) -> None:
    command.add_argument(
        "--records",
        nargs="+",
        metavar="FILE",
        help="training records: files or folders of any format, or Hub ids (default: edits of facts that ship with "
        "the package, with validation records, and settings that give an editor in a few hours)",
    )
    command.add_argument(
        "--validation", nargs="+", metavar="FILE", help="held-out records for early stopping and the step size"
    )
    command.add_argument(
        "--augment", nargs="+", metavar="FILE", help="other datasets, a few records of each of which are mixed in"
    )
    command.add_argument(
        "--augment-records", type=positive, metavar="N", help="records of each of them (default: 512)"
    )
    without_option(command)
    prompt_options(command)
    command.add_argument(
        "--chat-share",
        type=share,
        metavar="SHARE",
        help="share of the records that are asked in a chat too, where the tokenizer has a template (default: 0.5)",
    )


def _editor_options(command: Any) -> None:
    command.add_argument("--out", type=place, metavar="DIR", help="folder of the trained editor")
    command.add_argument(
        "--layers", type=count, nargs="+", help="edited layers (default: the preset's, else by depth)"
    )
    command.add_argument("--dtype", choices=PRECISIONS, help="precision of the backbone (default: as saved)")
    device_map_option(command)
    bits_option(command)
    command.add_argument(
        "--shard-backbone",
        action="store_true",
        default=None,
        help="shard the backbone over the processes that torchrun or accelerate launch starts (ibke, mend)",
    )
    command.add_argument("--latent-dim", type=positive, help="d_m, the module dimension")
    edited_modules_option(command)
    command.add_argument(
        "--save-dtype",
        choices=SAVED_PRECISIONS,
        help="precision that the editor is saved in (default: float32; float16 without --records)",
    )


def _training_options(command: Any) -> None:
    command.add_argument(
        "--max-steps", type=positive, help="training steps (default: the paper's 1,000,000; 3,000 without --records)"
    )
    command.add_argument(
        "--epochs", type=positive_float, metavar="N", help="passes over the records, in place of steps"
    )
    command.add_argument("--learning-rate", type=positive_float, help="learning rate of the hypernetworks")
    command.add_argument("--batch-size", type=positive, help="records per step and device")
    command.add_argument("--seed", type=seed, help="seed of initialisation, order and noise")
    command.add_argument(
        "--save-steps",
        type=positive,
        metavar="N",
        help="steps between checkpoints and evaluations (default: 3000; 500 without --records)",
    )
    command.add_argument(
        "--choose-step-size",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="try step sizes on validation records in the end, and keep the best (default: where there are such "
        "records, except for the paper's backbones)",
    )


def _run_options(command: Any) -> None:
    command.add_argument(
        "--activation-cache",
        type=place,
        metavar="DIR",
        help="folder that keeps what the backbone computes of each text, which makes later steps cheaper (ibke, mend)",
    )
    command.add_argument(
        "--measure",
        type=positive,
        metavar="STEPS",
        help="train nothing: time so many steps without that folder, while it is filled, and when it is filled",
    )
    command.add_argument(
        "--launch-file",
        choices=LAUNCH_FILES,
        help="train nothing: print where a configuration of accelerate launch lies, for several devices or processes",
    )
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    command.add_argument(
        "--force", action="store_true", help="train into a folder that holds an earlier editor or something else"
    )


def _run(options: argparse.Namespace) -> None:
    from ..training.checkpoints import TrainingStopped
    from ..training.recipe import train_editor
    from ..training.report import in_words
    from ..training.sharding import end_processes

    prompt_changes(options)
    if options.launch_file:
        print(files("ibke_hf.training") / "launch" / f"{options.launch_file}.yaml")
        return
    if options.measure:
        with TemporaryDirectory() as folder:
            _measure(options, folder)
        return
    checked, ships = _settings(options)
    prepare = partial(_lay_out, checked, keep=options.resume) if ships else None
    try:
        report = train_editor(checked, resume=options.resume, force=options.force, prepare=prepare)
    except TrainingStopped as stopped:
        print(f"{stopped}; go on with:\n  {resuming(options)}", file=sys.stderr)
        raise
    if end_processes():
        print(in_words(report, checked))


def _settings(options: argparse.Namespace, **changes: Any) -> tuple[TrainingSettings, bool]:
    """Return the settings, and whether the records are those that ship with the package."""
    from ..atlas.starter import starter_settings
    from ..training.settings import TrainingSettings, training_settings

    flags = {name: getattr(options, name) for name in (*TOP_LEVEL, CHOOSE)}
    flags |= {name: getattr(options, name) or None for name in PROMPTS}
    training = {name: getattr(options, flag) for flag, name in TRAINING.items()}
    editor_fields = {name: getattr(options, name) for name in EDITOR_FIELDS}
    ships = False

    def defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal ships
        ships = not settings.get("records")
        return starter_settings(settings) if ships else {}

    settings = training_settings(options.config, flags | changes, editor_fields, training, defaults)
    return TrainingSettings.of(settings), ships


def _lay_out(settings: TrainingSettings, *, keep: bool) -> None:
    """Write the records that ship with the package to the output folder, and say what to expect."""
    from ..atlas.starter import expectations, write_starter_records

    counts = write_starter_records(settings, keep=keep)
    print(expectations(settings, counts), end="\n\n", flush=True)


def _measure(options: argparse.Namespace, folder: str) -> None:
    from ..atlas.starter import write_starter_records
    from ..training.speed import in_words, measure_speed

    settings, ships = _settings(options, out=folder)
    if ships:
        write_starter_records(settings, keep=False)
    print(in_words(measure_speed(settings, options.measure), options.measure))


def resuming(options: argparse.Namespace) -> str:
    """Return the command line that goes on with a run."""
    from ..training.report import prompt_flags

    parts = ["ibke", "train"]
    for name in ("config", *TOP_LEVEL, *EDITOR_FIELDS, *TRAINING):
        value = getattr(options, name)
        if value is not None:
            values = value if isinstance(value, list) else [value] * (value is not True)
            parts += [f"--{name.replace('_', '-')}", *map(str, values)]
    chosen = getattr(options, CHOOSE)
    parts += [] if chosen is None else ["--choose-step-size" if chosen else "--no-choose-step-size"]
    return shlex.join([*parts, *prompt_flags(options), "--resume"])
