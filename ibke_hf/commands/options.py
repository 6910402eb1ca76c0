"""What several commands share: options, and loading the model and the editor that they name."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HUB_DATASETS = {"uniedit": "qizhou/UniEdit"}
WITHOUT_HUB = ("zsre", "counterfact", "mquake")  # PROTOCOL names files for these, and no dataset of the Hub
LONGEST_NUMBER, LONGEST_SHOWN = 20, 80  # letters
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with the parsed arguments; what `run` returns is the exit code, None for 0."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(run=run, title=command.prog.removeprefix("ibke "))
    return command


def model_options(command: argparse.ArgumentParser, flag: str = "--model", default: str | None = None) -> None:
    """Add the options that :func:`load_options` reads, the model's name under `flag`."""
    command.add_argument(
        flag,
        dest="model",
        default=default,
        metavar="PATH|ID",
        help="folder, Hub id or GGUF file of the model, or smollm2 (default: the one that --editor was trained for, "
        "else the embedded Atlas backbone)",
    )
    command.add_argument("--device", help="device to load the model to, such as cpu (default: where it loads)")
    device_map_option(command)
    command.add_argument(
        "--dtype", default="auto", choices=PRECISIONS, help="precision to load the model in (default: as saved)"
    )
    bits_option(command)
    command.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model, if you trust it"
    )


def device_map_option(command: Any) -> None:
    """Add where the parts of the model go."""
    command.add_argument(
        "--device-map",
        metavar="MAP",
        help="spread the model over devices: auto, or a YAML file with the device, cpu or disk of each module (needs "
        "accelerate)",
    )


def bits_option(command: Any) -> None:
    """Add the bits that the model's weights are quantised to."""
    command.add_argument(
        "--bits", type=int, choices=(8, 4), help="quantise the model's weights as they are loaded (needs bitsandbytes)"
    )


def edited_modules_option(command: Any) -> None:
    """Add the name template of the projections that an editor which is made for the model edits."""
    command.add_argument(
        "--edited-modules",
        metavar="NAME",
        help="projections that an editor made for the model edits, {i} for the layer, as in "
        "model.layers.{i}.mlp.down_proj (default: by structure)",
    )


def composition_options(command: Any) -> None:
    """Add how edits are carried together, which :func:`set_company` gives to an editor."""
    command.add_argument(
        "--composition",
        choices=("auto", "sum", "solve"),
        help="how ibke and mend carry several edits: solved together, or summed as in the paper (default: as the "
        "editor's config says, where auto solves)",
    )
    command.add_argument(
        "--ridge",
        type=positive_float,
        metavar="R",
        help="of the solve: small keeps each edit where it was made, large keeps all else (default: as the editor's "
        "config says)",
    )


def set_company(editor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Give an editor what :func:`composition_options` read.

    Returns:
        Composition and ridge of the editor, nothing where it has no choice.

    Raises:
        ValueError: If it has no choice and one was made, or a ridge was given for a sum.
    """
    config: Any = getattr(editor, "config", None)
    chosen = {name: getattr(options, name) for name in ("composition", "ridge") if getattr(options, name) is not None}
    if not hasattr(config, "composition"):
        if chosen:
            raise ValueError(
                f"--{next(iter(chosen))}: edits of {options.editor} are carried together in one way; leave it out"
            )
        return {}
    for name, value in chosen.items():
        setattr(config, name, value)
    if options.ridge is not None and config.composition == "sum":
        raise ValueError("--ridge: edits that are summed are not solved; leave it out, or give --composition solve")
    return {"composition": config.composition, "ridge": config.ridge}


def without_option(command: Any) -> None:
    """Add the records whose subjects have no part in what is made."""
    command.add_argument(
        "--without",
        nargs="+",
        metavar="FILE",
        help="records whose subjects are left out, such as those that are to measure an editor",
    )


def share_options(command: Any) -> None:
    """Add the shares that the cells of a long run are made in, here or on several machines."""
    command.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="i/n", help="make the cells of one of n shares only"
    )
    command.add_argument("--merge", nargs="+", metavar="DIR", help="join the cells of these folders and run nothing")


def _shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"i/n with 1 <= i <= n is wanted, such as 1/4, found {text!r}")
    return int(index), int(number)


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keyword arguments of :func:`~ibke_hf.loading.load_model`."""
    names = ("device", "device_map", "dtype", "bits", "revision", "trust_remote_code")
    return {name: getattr(options, name) for name in names}


def upload_options(command: argparse.ArgumentParser) -> None:
    """Add the repository's id and the options that :func:`upload_settings` reads."""
    command.add_argument("repository", metavar="REPO", help="id on the Hub, made if it does not exist")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--message", help="title of the commit")
    command.add_argument("--token", help="token with write access (default: HF_TOKEN, or the one of `hf auth login`)")


def upload_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keyword arguments of :func:`~ibke_hf.hub.upload.upload`."""
    settings = {
        "private": options.private or None,
        "revision": options.revision,
        "create_pr": options.create_pr,
        "token": options.token,
    }
    return settings | ({} if options.message is None else {"commit_message": options.message})


def read_dataset(name: str, **filters: Any) -> Iterator[Any]:
    """Read the records of a dataset by its short name, path or Hub id.

    Args:
        name: Such as ``uniedit``, a file or a folder.
        filters: Of :func:`~ibke_hf.data.sources.read_records`.

    Raises:
        ValueError: If no Hub dataset is known by the short name.
    """
    from ..data.sources import read_records

    if not Path(name).exists():
        if name.lower() in WITHOUT_HUB:
            raise ValueError(
                f"dataset {name}: no Hub dataset is known for it; give the path of a file or folder in its "
                f"native format"
            )
        name = HUB_DATASETS.get(name.lower(), name)
    return read_records(name, **filters)


def whole_number(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        digits = text.strip()
        if not (digits.isascii() and digits.removeprefix("-").isdecimal() and len(digits) <= LONGEST_NUMBER):
            number = None
        else:
            number = int(digits)
        if number is None or number < least:
            raise argparse.ArgumentTypeError(f"a whole number of at least {least} is wanted, found {shown(text)}")
        if number > most:
            raise argparse.ArgumentTypeError(f"a whole number of at most {most} is wanted, found {shown(text)}")
        return number

    return read


def place(text: str) -> str:
    """Read the name of a file or folder to write to."""
    if not text.strip() or "\0" in text or not _can_be_a_name(text):
        raise argparse.ArgumentTypeError(f"the name of a file or folder is wanted, found {shown(text)}")
    return text


def _can_be_a_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a character
        return False
    return True


def shown(text: str) -> str:
    """Quote what a user gave, shortened."""
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}...")


positive, count, port = whole_number(1), whole_number(0), whole_number(1, 65535)
seed = whole_number(0, 2**32 - 1)  # what every generator of random numbers takes


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, found {shown(text)}")
    return number


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is wanted, found {shown(text)}")
    return number
