"""`ibke edit`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import (
    add_command,
    composition_options,
    edited_modules_option,
    load_options,
    model_options,
    place,
    positive,
    set_company,
)
from .outputs import require_free
from .prompt_options import prompt_changes, prompt_options

if TYPE_CHECKING:
    from ..delivery.facts import CheckedFact

WIDTH = 46  # of a column of answers


def add(commands: Any) -> None:
    """Add the command."""
    summary = "edit a fact of a model, or those of a file that it gets wrong, and save the edit as a LoRA adapter"
    _edit(add_command(commands, "edit", summary, _run_edit))


def _edit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", help="what the edited model is to answer")
    command.add_argument(
        "--from",
        dest="facts",
        metavar="FACTS.yaml",
        help="in place of --prompt and --target: edit the facts of a file of `ibke check` that the model gets wrong",
    )
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
    composition_options(command)
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


def _run_edit(options: argparse.Namespace) -> int | None:
    from ..delivery.facts import read_checked_facts
    from ..loading import load_all

    _require_one_source(options)
    facts = None if options.facts is None else read_checked_facts(options.facts)
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
    set_company(editor, options)
    if facts is not None:
        return _edit_failing(options, model, tokenizer, editor, facts)
    _edit_one(options, model, tokenizer, editor)
    return None


def _require_one_source(options: argparse.Namespace) -> None:
    """Check that a fact is given, or a file of facts, and nothing that belongs to the other."""
    if options.facts is None:
        missing = [f"--{name}" for name in ("prompt", "target") if getattr(options, name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)}: give the fact to be edited, or --from FACTS.yaml for several")
        return
    names = ("prompt", "target", "subject", "rephrasing", "neighbour", "chat", "chat_options", "leading_space")
    if given := [name for name in names if getattr(options, name)]:
        raise ValueError(f"--{given[0].replace('_', '-')}: what --from names says it of each fact; leave it out")


def _edit_failing(
    options: argparse.Namespace, model: Any, tokenizer: Any, editor: Any, facts: Sequence[CheckedFact]
) -> int:
    """Edit the facts of a file that the model gets wrong, solved together or jointly, and ask all of them again."""
    from ..core.conflicts import conflict_warning, conflicting_requests
    from ..delivery.check import check_facts, failures, report, to_edit

    wrong = to_edit(facts, check_facts(model, tokenizer, facts))
    if not wrong:
        print(f"nothing to edit: the model has all {len(facts)} facts of {options.facts}")
        return 0
    requests = [fact.request(tokenizer) for fact in wrong]
    print("\n".join(f"{request.prompt} -> {request.target}" for request in requests) + "\n")
    composition = getattr(getattr(editor, "config", None), "composition", None)
    if composition is None and (warning := conflict_warning(conflicting_requests([[one] for one in requests]))):
        print(warning, file=sys.stderr)  # an editor that has a composition says so itself
    edit = editor.edit(model, tokenizer, requests, mode="joint" if composition in (None, "sum") else "sequential")
    _require_rank(options, edit)
    outcomes = check_facts(model, tokenizer, facts, edit)
    print(report(outcomes))
    _save(options, edit)
    return 1 if failures(outcomes) else 0


def _edit_one(options: argparse.Namespace, model: Any, tokenizer: Any, editor: Any) -> None:
    from ..core.records import EditRequest, PromptFormat
    from ..editors.catalogue import ATLAS

    prompt_format = PromptFormat(**prompt_changes(options, tokenizer))
    request = EditRequest(options.prompt, options.target, options.subject, prompt_format)
    edit = editor.edit(model, tokenizer, [request])
    _require_rank(options, edit)
    print(f"{request.prompt} -> {request.target}\n")
    questions = _questions(options, atlas=model.config.name_or_path == ATLAS)
    print(_answers(model, tokenizer, edit, questions, prompt_format))
    _save(options, edit)


def _require_rank(options: argparse.Namespace, edit: Any) -> None:
    if options.rank and not _is_low_rank(edit):
        raise ValueError(f"--rank: an edit of {options.editor} has no rank; leave it out")


def _is_low_rank(edit: Any) -> bool:
    from ..core.composition import SolvedEdit
    from ..core.edits import LowRankEdit

    return isinstance(edit, LowRankEdit | SolvedEdit)


def _save(options: argparse.Namespace, edit: Any) -> None:
    if options.out is not None:
        edit.save_pretrained(options.out, **({"rank": options.rank} if options.rank else {}))
        more = " or with PEFT" if _is_low_rank(edit) else ""
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
