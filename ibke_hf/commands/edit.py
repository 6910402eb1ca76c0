"""`ibke edit`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .options import add_command, edited_modules_option, load_options, model_options, place, positive
from .outputs import require_free
from .prompt_options import prompt_changes, prompt_options

WIDTH = 46  # of a column of answers


def add(commands: Any) -> None:
    """Add the command."""
    _edit(add_command(commands, "edit", "edit one fact of a model and save the edit as a LoRA adapter", _run_edit))


def _edit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", required=True, help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", required=True, help="what the edited model is to answer")
    command.add_argument("--subject", help="the entity that the fact is about, for editors that need it")
    prompt_options(command)
    model_options(command)
    command.add_argument(
        "--editor",
        metavar="NAME|PATH|ID",
        help="ft, rome, grace, t_patcher, lemoe or alphaedit for any model, ibke or mend for Atlas; or the folder or "
        "Hub id of a trained editor (default: ibke)",
    )
    command.add_argument(
        "--corpus", metavar="FILE|ID", help="texts that rome and alphaedit measure the keys of --model on"
    )
    edited_modules_option(command)
    command.add_argument(
        "--rephrasing",
        action="append",
        metavar="TEXT",
        help="the same question in other words, to be asked too; repeat it",
    )
    command.add_argument(
        "--neighbour",
        action="append",
        metavar="TEXT",
        help="a question whose answer is to stay, to be asked too; repeat it",
    )
    command.add_argument(
        "--out", type=place, metavar="DIR", help="save the edit here, if it is a low-rank one as a LoRA adapter"
    )
    command.add_argument("--rank", type=positive, help="truncate the saved edit to this rank")
    command.add_argument("--force", action="store_true", help="replace the edit that --out holds")


def _run_edit(options: argparse.Namespace) -> None:
    from ..core.edits import LowRankEdit
    from ..core.records import EditRequest, PromptFormat
    from ..editors.catalogue import ATLAS
    from ..loading import load_all

    if options.rank and options.out is None:
        raise ValueError("--rank says how to save the edit; give --out DIR as well")
    if options.editor == "none":
        raise ValueError("--editor none stands for the unedited model; name an editor")
    if options.out is not None:
        require_free(options.out, "an edit", force=options.force)
    model, tokenizer, editor = load_all(
        options.editor,
        options.model,
        corpus=options.corpus,
        edited_modules=options.edited_modules,
        **load_options(options),
    )
    prompt_format = PromptFormat(**prompt_changes(options, tokenizer))
    request = EditRequest(options.prompt, options.target, options.subject, prompt_format)
    edit = editor.edit(model, tokenizer, [request])
    if options.rank and not isinstance(edit, LowRankEdit):
        raise ValueError(f"--rank: an edit of {options.editor} has no rank; leave it out")
    print(f"{request.prompt} -> {request.target}\n")
    questions = _questions(options, atlas=model.config.name_or_path == ATLAS)
    print(_answers(model, tokenizer, edit, questions, prompt_format))
    if options.out is not None:
        edit.save_pretrained(options.out, **({"rank": options.rank} if options.rank else {}))
        more = " or with PEFT" if isinstance(edit, LowRankEdit) else ""
        print(f"\nsaved to {options.out}: load it with {type(edit).__name__}.from_pretrained{more}")


def _questions(options: argparse.Namespace, *, atlas: bool) -> list[tuple[str, str]]:
    """Return what is asked before and after, each with its role; what nobody typed is chosen."""
    from ..app.knowledge import questions_around

    rephrasing, neighbours = questions_around(options.prompt, atlas=atlas)
    questions = [("request", options.prompt)]
    questions += [("rephrasing", text) for text in options.rephrasing or (rephrasing,)]
    return questions + [("neighbour", text) for text in options.neighbour or neighbours]


def _answers(model: Any, tokenizer: Any, edit: Any, questions: Sequence[tuple[str, str]], prompt_format: Any) -> str:
    """Return the whole answers to the questions, without the edit and with it, as a table."""
    from tabulate import tabulate

    from ..evaluation.inspection import answer

    before = [answer(model, tokenizer, prompt, prompt_format=prompt_format) for _, prompt in questions]
    with edit.attached(model):
        after = [answer(model, tokenizer, prompt, prompt_format=prompt_format) for _, prompt in questions]
    rows = [
        (role, prompt, _first_line(old), _first_line(new))
        for (role, prompt), old, new in zip(questions, before, after, strict=True)
    ]
    return tabulate(
        rows,
        ["", "asked", "before", "after"],
        tablefmt="plain",
        disable_numparse=True,
        maxcolwidths=[None, *[WIDTH] * 3],
    )


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")
