"""`ibke export` and `ibke merge`: an edit in the form that a serving engine takes."""

from __future__ import annotations

import argparse
from typing import Any

from ..delivery.engines import ENGINES
from .options import add_command, load_options, model_options, place, positive, shown
from .outputs import require_free

NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def add(commands: Any) -> None:
    """Add both commands."""
    _export(add_command(commands, "export", "write an edit as what a serving engine takes", _run_export))
    _merge(add_command(commands, "merge", "write a full model with an edit merged into its weights", _run_merge))


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("edit", metavar="EDIT", help="folder or Hub id of a saved edit")
    command.add_argument("--to", required=True, choices=ENGINES, help="the engine, or merged for a full model")
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder to write to")
    model_options(command)
    command.add_argument(
        "--max-rank", type=positive, metavar="R", help="truncate the adapter to a rank of at most this"
    )
    command.add_argument(
        "--name", type=_name, help="what requests call the edited model (default: the name of the folder)"
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="replace the export that --out holds; merge also into weights that the edit was not made on",
    )


def _run_export(options: argparse.Namespace) -> None:
    from ..delivery.export import export_edit
    from ..editors.saved import load_edit
    from ..loading import load_model

    edit = load_edit(options.edit)
    out = require_free(options.out, _kind(options.to), force=options.force and options.to != "merged")
    model = tokenizer = None
    if options.to == "merged" or (options.to == "peft" and options.model is not None):
        name = options.model or edit.info.backbone or None
        model, tokenizer = load_model(name, **load_options(options))
    export = export_edit(
        edit,
        options.to,
        out,
        model=model,
        tokenizer=tokenizer,
        base=options.model,
        max_rank=options.max_rank,
        name=options.name,
        force=options.force,
    )
    print("\n".join(_lines(export)))


def _lines(export: Any) -> list[str]:
    lines = [f"saved to {export.folder}" + (f", rank {export.rank}" if export.rank else "")]
    if export.relative_error:
        layer, worst = max(export.relative_error.items(), key=lambda item: item[1])
        lines.append(f"truncated: the update changes by at most {worst:.2g} of its norm ({layer})")
    return [*lines, *(f"checked: {check}" for check in export.checks), "", export.line]


def _kind(engine: str) -> str:
    return {"merged": "a model", "gguf": "an export", "ollama": "an export"}.get(engine, "an edit")


def _name(text: str) -> str:
    if not text or not set(text) <= NAME_LETTERS:
        raise argparse.ArgumentTypeError(f"a name of letters, digits, '.', '_' and '-' is wanted, found {shown(text)}")
    return text


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--edit", required=True, help="folder or Hub id of a saved edit")
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the full model")
    model_options(command)
    command.add_argument(
        "--force", action="store_true", help="merge also where the weights are not those that the edit was made on"
    )


def _run_merge(options: argparse.Namespace) -> None:
    from ..delivery.merged import write_merged
    from ..editors.saved import load_weight_edit
    from ..loading import load_model

    edit = load_weight_edit(options.edit)
    out = require_free(options.out, "a model")
    model, tokenizer = load_model(options.model, **load_options(options))
    write_merged(edit, model, tokenizer, out, force=options.force)
    print(f"saved the edited model to {options.out}")
