"""`ibke edit` and `ibke merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, load_atlas_editor, load_model, load_saved_editor, model_options, positive


def add(commands: Any) -> None:
    """Add both commands."""
    _edit(add_command(commands, "edit", "edit one fact of a model and save the edit as a LoRA adapter", _run_edit))
    _merge(add_command(commands, "merge", "write a full model with an edit merged into its weights", _run_merge))


def _edit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", required=True, help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", required=True, help="what the edited model is to answer")
    command.add_argument("--subject", help="the entity that the fact is about, for editors that need it")
    model_options(command)
    command.add_argument("--editor", help="folder or Hub id of a trained editor (default: Atlas's)")
    command.add_argument("--out", metavar="DIR", help="save the edit here, as a LoRA adapter")
    command.add_argument("--rank", type=positive, help="truncate the saved edit to this rank")


def _run_edit(given: argparse.Namespace) -> None:
    from ..core.records import EditRequest
    from ..evaluation.inspection import top_predictions

    if given.rank and not given.out:
        raise ValueError("--rank says how to save the edit; give --out DIR as well")
    model, tokenizer = load_model(given)
    editor = load_atlas_editor("ibke") if given.editor is None else load_saved_editor(given.editor)
    edit = editor.edit(model, tokenizer, [EditRequest(given.prompt, given.target, given.subject)])
    before = top_predictions(model, tokenizer, given.prompt)
    with edit.attached(model):
        after = top_predictions(model, tokenizer, given.prompt)
    print(f"{given.prompt} -> {given.target}\n\n{'before':<32}after")
    for (old, p_old), (new, p_new) in zip(before, after, strict=True):
        print(f"{old!r:<24}{p_old:6.1%}  {new!r:<24}{p_new:6.1%}")
    if given.out:
        edit.save_pretrained(given.out, rank=given.rank)
        print(f"\nsaved to {given.out}: load it with LowRankEdit.from_pretrained or with PEFT")


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--edit", required=True, help="folder or Hub id of a saved edit")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the full model")
    model_options(command)


def _run_merge(given: argparse.Namespace) -> None:
    from ..core.edits import LowRankEdit

    edit = LowRankEdit.from_pretrained(given.edit)
    Path(given.out).mkdir(parents=True, exist_ok=True)  # transformers would only log that it is a file
    model, tokenizer = load_model(given)
    edit.merge_into(model)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(f"saved the edited model to {given.out}")
