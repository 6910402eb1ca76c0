"""`ibke push`."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, positive


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "push", "publish an editor, an edit or records on the Hub, in one commit with a card", _run)
    command.add_argument("folder", metavar="FOLDER", help="folder of a trained editor, of a saved edit, or of records")
    command.add_argument("repository", metavar="REPO", help="id on the Hub, made if it does not exist")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--message", help="title of the commit")
    command.add_argument("--token", help="token with write access (default: HF_TOKEN, or the one of `hf auth login`)")
    command.add_argument("--results", metavar="DIR", help="what `ibke eval` wrote, for the card of an editor (default: beside it)")
    command.add_argument("--max-rank", type=positive, metavar="R", help="truncate an edit to this rank, as serving engines may need")


def _run(given: argparse.Namespace) -> None:
    from ..hub import folder_kind, push_folder

    kind = folder_kind(given.folder)
    options = {"private": given.private or None, "revision": given.revision, "create_pr": given.create_pr, "token": given.token}
    for name, value, owner in (("results", given.results, "editor"), ("max_rank", given.max_rank, "edit")):
        if value is not None and kind != owner:
            raise ValueError(f"--{name.replace('_', '-')} belongs to an {owner}, and {given.folder} holds {kind}; leave it out")
        options |= {} if value is None else {name: value}
    options |= {} if given.message is None else {"commit_message": given.message}
    commit = push_folder(given.folder, given.repository, **options)
    print(f"{kind}: {commit.pr_url or commit.commit_url}")
