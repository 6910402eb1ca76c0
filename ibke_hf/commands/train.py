"""`ibke train`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..editors.catalogue import TRAINED
from .options import PRECISIONS, add_command, positive


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "train", "train an editor for any backbone on record files", _run)
    command.add_argument(
        "--config", metavar="YAML", help="file of settings, overridden by flags; nested: editor, training"
    )
    command.add_argument("--kind", choices=TRAINED, help="kind of editor (default: ibke)")
    command.add_argument("--backbone", help="folder or Hub id of the backbone")
    command.add_argument(
        "--records", nargs="+", metavar="FILE", help="training records: files or folders of any format, or Hub ids"
    )
    command.add_argument("--validation", nargs="+", metavar="FILE", help="held-out records for early stopping")
    command.add_argument(
        "--augment", nargs="+", metavar="FILE", help="other datasets, a few records of each of which are mixed in"
    )
    command.add_argument(
        "--augment-records", type=positive, metavar="N", help="records of each of them (default: 512)"
    )
    command.add_argument("--out", metavar="DIR", help="folder of the trained editor")
    command.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the preset's, else by depth)")
    command.add_argument("--dtype", choices=PRECISIONS, help="precision of the backbone (default: as saved)")
    command.add_argument("--max-steps", type=positive, help="training steps")
    command.add_argument("--learning-rate", type=float, help="learning rate of the hypernetworks")
    command.add_argument("--batch-size", type=positive, help="records per step and device")
    command.add_argument("--latent-dim", type=positive, help="d_m, the module dimension")
    command.add_argument("--seed", type=int, help="seed of initialisation, order and noise")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")


def _run(given: argparse.Namespace) -> None:
    from ..training.recipe import train_editor, training_settings

    names = ("kind", "backbone", "records", "validation", "augment", "augment_records", "out", "layers", "dtype")
    flags = {name: getattr(given, name) for name in names}
    training = {
        "max_steps": given.max_steps,
        "learning_rate": given.learning_rate,
        "seed": given.seed,
        "per_device_train_batch_size": given.batch_size,
    }
    settings = training_settings(given.config, flags, {"latent_dim": given.latent_dim}, training)
    print(json.dumps(train_editor(settings, resume=given.resume), indent=2))
