"""`ibke push`."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, positive, upload_options, upload_settings


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "push", "publish an editor, an edit or records on the Hub, in one commit with a card", _run
    )
    command.add_argument("folder", metavar="FOLDER", help="folder of a trained editor, of a saved edit, or of records")
    upload_options(command)
    command.add_argument(
        "--results", metavar="DIR", help="what `ibke eval` wrote, for the card of an editor (default: beside it)"
    )
    command.add_argument(
        "--max-rank", type=positive, metavar="R", help="truncate an edit to this rank, as serving engines may need"
    )


def _run(options: argparse.Namespace) -> None:
    from ..hub.push import folder_kind, push_folder

    kind, settings = folder_kind(options.folder), upload_settings(options)
    for name, value, owner in (("results", options.results, "editor"), ("max_rank", options.max_rank, "edit")):
        if value is not None and kind != owner:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to an {owner}, and {options.folder} holds {kind}; leave it out"
            )
        settings |= {} if value is None else {name: value}
    commit = push_folder(options.folder, options.repository, **settings)
    print(f"{kind}: {commit.pr_url or commit.commit_url}")
