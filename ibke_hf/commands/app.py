"""`ibke app`: the page of the editor's Space, on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_command, port


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "app", "open a page to edit facts of a model and see before and after", _run)
    command.add_argument(
        "--editor",
        help="folder or Hub id of a trained editor, or ft (default: Atlas's; with --model the one trained for it, if "
        "it is at hand, else ft)",
    )
    command.add_argument(
        "--model",
        "--backbone",
        dest="backbone",
        help="folder, Hub id, GGUF file or name of its model, such as smollm2 (default: the one that the editor was "
        "trained for)",
    )
    command.add_argument("--port", type=port, help="port to serve on (default: the first free one from 7860 on)")


def _run(options: argparse.Namespace) -> None:
    from ..app.page import launch

    launch(options.editor, options.backbone, server_port=options.port)
