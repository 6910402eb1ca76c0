"""`ibke spaces`: pages of ours as Spaces of the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, place, upload_options, upload_settings


def add(commands: Any) -> None:
    """Add the command and its actions."""
    actions = commands.add_parser("spaces", help="publish a Space, or run it here").add_subparsers(
        dest="action", required=True, metavar="action"
    )
    command = add_command(
        actions, "push", "publish a Space with the code of this package that it needs, in one commit", _run_push
    )
    command.add_argument(
        "folder", metavar="FOLDER", help="the Space, such as spaces/edit_quality of a clone of this project"
    )
    upload_options(command)
    command = add_command(actions, "build", "write a Space to a folder, where `python app.py` runs it", _run_build)
    command.add_argument(
        "folder", metavar="FOLDER", help="the Space, such as spaces/edit_quality of a clone of this project"
    )
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="new or empty folder")


def _run_push(options: argparse.Namespace) -> None:
    from ..hub.spaces import push_space

    commit = push_space(options.folder, options.repository, **upload_settings(options))
    print(f"space: {commit.pr_url or commit.commit_url}")


def _run_build(options: argparse.Namespace) -> None:
    from ..hub.spaces import assemble

    folder = assemble(options.folder, options.out)
    print(f"{folder}: run it by `python app.py` there, with what requirements.txt lists")
