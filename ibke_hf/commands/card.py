"""`ibke card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, place

FOLDER = "model_cards"
ALL = "all"


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "card", "write the model cards of this package, or show the card of a trained editor", _run
    )
    command.add_argument(
        "name",
        metavar="NAME|FOLDER",
        help="atlas, smollm2-135m-instruct, gpt2-xl, gpt-j-6b, qwen3-1.7b, qwen3-8b or all; or the folder of a "
        "trained editor",
    )
    command.add_argument(
        "--out", type=place, metavar="DIR", help=f"folder that holds one for each card (default: {FOLDER})"
    )
    command.add_argument(
        "--check", action="store_true", help="write nothing; fail where a card is not what would be written"
    )
    command.add_argument(
        "--needs", action="store_true", help="print what training takes, for an editor that is not trained yet"
    )
    command.add_argument(
        "--repository", metavar="REPO", help="of a trained editor: its id on the Hub (default: the folder's name)"
    )
    command.add_argument(
        "--results", metavar="DIR", help="of a trained editor: what `ibke eval` wrote (default: beside it)"
    )


def _run(options: argparse.Namespace) -> None:
    from ..hub.cards import CARDS

    names = CARDS if options.name == ALL else (options.name,)
    if names[0] not in CARDS and Path(options.name).is_dir():
        _show(options)
        return
    for option in ("repository", "results"):
        if getattr(options, option) is not None:
            raise ValueError(f"--{option} belongs to the folder of a trained editor; {options.name!r} is none")
    if options.needs:
        _print_needs(options)
    elif options.check:
        _check(names, options.out or FOLDER)
    else:
        _write(names, options.out or FOLDER)


def _write(names: tuple[str, ...], out: str) -> None:
    from ..hub.cards import write_card

    for name in names:
        print("\n".join(f"written: {file}" for file in write_card(name, out)))


def _check(names: tuple[str, ...], out: str) -> None:
    from ..hub.cards import stale_files

    stale = [str(file) for name in names for file in stale_files(name, out)]
    if stale:
        raise ValueError(
            f"{', '.join(stale)}: not what `ibke card` writes now; write it again, cards are not edited by hand"
        )
    print(f"{', '.join(names)}: up to date")


def _print_needs(options: argparse.Namespace) -> None:
    from ..hub.cards import BACKBONES, backbone_of
    from ..hub.cards.presets import needs_section

    if options.name not in BACKBONES:
        raise ValueError(
            f"--needs belongs to an editor that is not trained yet: {', '.join(BACKBONES)}; found {options.name!r}"
        )
    print("\n\n".join(needs_section(options.name, backbone_of(options.name))))


def _show(options: argparse.Namespace) -> None:
    """Print the card that `ibke push` writes for a trained editor that has none of its own beside it."""
    from ..hub.cards.editor import editor_card
    from ..hub.cards.results import RESULTS, read_results
    from ..hub.push import folder_kind
    from ..hub.remote_code import code_files
    from ..loading import load_editor

    folder = Path(options.name)
    kind = folder_kind(folder)
    if kind != "editor":
        raise ValueError(f"{folder}: holds {kind}, whose card `ibke push` writes; give the folder of a trained editor")
    for option in ("out", "check", "needs"):
        if getattr(options, option):
            raise ValueError(
                f"--{option} belongs to the cards of this package; the card of the editor in {folder} is printed"
            )
    results = read_results(options.results or (folder / RESULTS if (folder / RESULTS).exists() else None))
    editor = load_editor(options.name)
    card = editor_card(
        editor, options.repository or folder.resolve().name, results=results, remote=bool(code_files(editor))
    )
    print(str(card), end="")
