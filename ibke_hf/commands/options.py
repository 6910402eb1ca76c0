"""What several commands share: options, and loading the model and the editor that they name."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUB_DATASETS = {"uniedit": "qizhou/UniEdit"}
WITHOUT_HUB = ("zsre", "counterfact", "mquake")  # PROTOCOL names files for these, and no dataset of the Hub
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with the parsed arguments."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(run=run, title=command.prog.removeprefix("ibke "))
    return command


def model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`load_model` reads."""
    command.add_argument("--model", help="folder or Hub id of the model (default: the embedded Atlas backbone)")
    command.add_argument("--device", help="device to load the model to, such as cpu (default: where it loads)")
    command.add_argument(
        "--dtype", default="auto", choices=PRECISIONS, help="precision to load the model in (default: as saved)"
    )


def load_model(given: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model and tokenizer that the options name, by default Atlas's.

    Raises:
        ValueError: If the device cannot compute or the model cannot be loaded.
        FileNotFoundError: If the folder does not exist.
    """
    if given.device:
        _require_device(given.device)
    if given.model is None:
        from ..atlas import ASSETS, load_backbone

        with _loading(str(ASSETS / "backbone")):
            model, tokenizer = load_backbone()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with _loading(given.model):
            model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
            tokenizer = AutoTokenizer.from_pretrained(given.model)
    return (model.to(given.device) if given.device else model), tokenizer


def upload_options(command: argparse.ArgumentParser) -> None:
    """Add the repository's id and the options that :func:`upload_settings` reads."""
    command.add_argument("repository", metavar="REPO", help="id on the Hub, made if it does not exist")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--message", help="title of the commit")
    command.add_argument("--token", help="token with write access (default: HF_TOKEN, or the one of `hf auth login`)")


def upload_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keyword arguments of :func:`~ibke_hf.hub.upload.upload`."""
    settings = {
        "private": given.private or None,
        "revision": given.revision,
        "create_pr": given.create_pr,
        "token": given.token,
    }
    return settings | ({} if given.message is None else {"commit_message": given.message})


def load_atlas_editor(name: str) -> Any:
    """Load a trained editor of Atlas, ``ibke`` or ``mend``."""
    from ..atlas import ASSETS, load_editor

    with _loading(str(ASSETS / name)):
        return load_editor(name)


def load_saved_editor(name: str) -> Any:
    """Load a saved editor, of whatever type its config names, from a folder or the Hub.

    Raises:
        ValueError: If it cannot be loaded or is none.
        FileNotFoundError: If the folder does not exist.
    """
    from transformers import AutoModel

    from ..editors.catalogue import register_trained

    register_trained()
    with _loading(name):
        editor = AutoModel.from_pretrained(name, dtype="float32").eval()
    if not hasattr(editor, "edit"):
        raise ValueError(f"{name}: holds a {type(editor).__name__}, not an editor; `ibke train` makes one")
    return editor


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


def statistics_of(model: Any, tokenizer: Any, corpus: str, layers: Sequence[Sequence[int] | None] = (None,)) -> Any:
    """Measure a model's keys on a corpus, or read them from the cache; see :class:`~ibke_hf.editors.locate.key_statistics.KeyStatistics`.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        corpus: See :func:`~ibke_hf.data.texts.read_texts`.
        layers: Those of each editor that needs them; None for its own choice.
    """
    from huggingface_hub.constants import HF_HOME

    from ..data.texts import read_texts
    from ..editors.locate.key_statistics import KeyStatistics, default_layers

    needed = sorted({i for own in layers for i in (default_layers(model) if own is None else own)})
    return KeyStatistics.of(
        model, tokenizer, read_texts(corpus), needed, cache=Path(HF_HOME) / "ibke_hf", progress=sys.stderr.isatty()
    )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Name what was being loaded, whatever transformers, safetensors and their kin raise about a broken folder."""
    from transformers.utils import logging

    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such folder")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name}: cannot be loaded ({textwrap.shorten(str(error), 300, placeholder=' ...')})"
        ) from error


def _require_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"--device {device}: this machine cannot compute there ({reason}); leave it out or use cpu"
        ) from error


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, found {text!r}")
    return int(text)
