"""`ibke library`: a folder of edits, each found when a prompt is about it; and `ibke train-router`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .options import (
    add_command,
    load_options,
    model_options,
    place,
    positive,
    positive_float,
    seed,
    upload_options,
    upload_settings,
)
from .prompt_options import prompt_changes, prompt_options

WIDTH = 60  # of a column of texts
ID = 12  # letters of an id that are shown


def add(commands: Any) -> None:
    """Add the commands."""
    summary = "keep thousands of edits of a model, of which each prompt carries those that it is about"
    library = commands.add_parser("library", help=summary, description=summary.capitalize() + ".")
    actions = library.add_subparsers(dest="action", required=True, metavar="action")
    _add(_action(actions, "add", "edit facts, or take saved edits, into a library", _run_add))
    _remove(_action(actions, "remove", "take edits out of a library", _run_remove))
    listing = _action(actions, "list", "list the edits of a library", _run_list)
    listing.add_argument("--limit", type=positive, metavar="N", help="at most so many (default: all)")
    _search(_action(actions, "search", "list the edits nearest to a text, by words or by the router", _run_search))
    _ask(_action(actions, "ask", "ask the model without the library and with it", _run_ask))
    _export(_action(actions, "export", "write edits as one LoRA adapter that acts on every prompt", _run_export))
    upload_options(_action(actions, "push", "publish a library as one repository of the Hub", _run_push))
    _pull(_action(actions, "pull", "add the edits of a repository of the Hub to a library", _run_pull))
    model_options(_action(actions, "serve-check", "check that a library can be served with a model", _run_check))
    _train(add_command(commands, "train-router", "train the router that finds the edits of a prompt", _run_train))


def _action(
    actions: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    command = add_command(actions, name, summary, run)
    command.add_argument("library", type=place, metavar="LIBRARY", help="folder of the library")
    return command


def _router_option(command: Any) -> None:
    command.add_argument(
        "--router", metavar="PATH|ID", help="router that finds the edits (default: the library's, else the editor's)"
    )


# --- add ------------------------------------------------------------------------------------------------------------


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", help="what the model is to answer")
    command.add_argument("--subject", help="the entity that the fact is about")
    command.add_argument("--edit", nargs="+", metavar="DIR|ID", help="saved edits, in place of a prompt and a target")
    command.add_argument("--records", nargs="+", metavar="FILE", help="records whose requests are edited, each alone")
    command.add_argument("--limit", type=positive, metavar="N", help="records at most (default: all)")
    command.add_argument(
        "--editor", metavar="NAME|PATH|ID", help="ibke or mend for Atlas, or a trained editor (default: ibke)"
    )
    _router_option(command)
    prompt_options(command)
    model_options(command)


def _run_add(options: argparse.Namespace) -> None:
    from ..core.edits import LowRankEdit
    from ..core.records import EditRequest, PromptFormat
    from ..editors.catalogue import ATLAS
    from ..lifelong.index import LibraryError
    from ..loading import load_all, router_beside

    given = [bool(options.prompt or options.target), bool(options.edit), bool(options.records)]
    if sum(given) != 1:
        raise ValueError("give one of --prompt with --target, --edit, and --records")
    if options.edit:
        library = _library(options)
        ids = library.add(*(LowRankEdit.from_pretrained(name) for name in options.edit))
        print(f"added {_counted(ids)}; {len(library)} in {options.library}")
        _warn_of_conflicts(library, ids)
        return
    if bool(options.prompt) != bool(options.target):
        raise ValueError("--prompt and --target belong together; give both")
    model, tokenizer, editor = load_all(options.editor, options.model, **load_options(options))
    requests = _requests(options, EditRequest, PromptFormat(**prompt_changes(options, tokenizer)))
    if hasattr(getattr(editor, "config", None), "composition"):
        editor.config.composition = "solve"  # edits carry the inputs that they were made for
    router = router_beside(options.editor, atlas=model.config.name_or_path == ATLAS)
    library = _library(options, tokenizer, router)
    ids = _edited(library, editor, model, tokenizer, requests)
    _warn_of_conflicts(library, ids)
    if library.router is None:
        raise LibraryError(
            f"added {_counted(ids)}, but {library.folder} has no router that finds them: ibke train-router"
        )
    print(f"added {_counted(ids)}; {len(library)} in {options.library}")


def _warn_of_conflicts(library: Any, ids: Sequence[str]) -> None:
    """Name the edits that new ones are at odds with."""
    from ..core.conflicts import conflict_warning

    if warning := conflict_warning(library.conflicts(*ids), [entry.id[:ID] for entry in library.list()]):
        print(f"{warning} (ibke library remove)", file=sys.stderr)


def _requests(options: argparse.Namespace, kind: Any, prompt_format: Any) -> list[Any]:
    if options.prompt:
        return [kind(options.prompt, options.target, options.subject, prompt_format)]
    from itertools import islice

    from .options import read_dataset

    records = (record for name in options.records for record in read_dataset(name))
    return [request for record in islice(records, options.limit) for request in record.requests]


def _edited(
    library: Any, editor: Any, model: Any, tokenizer: Any, requests: Sequence[Any], at_once: int = 32
) -> list[str]:
    """Edit some requests at a time; each lot is in the library before the next is made."""
    from tqdm.auto import tqdm

    ids: list[str] = []
    starts = range(0, len(requests), at_once)
    for start in tqdm(starts, unit="lot", disable=len(starts) < 2):
        ids += library.edit(editor, model, tokenizer, requests[start : start + at_once])
    return ids


def _counted(ids: Sequence[str]) -> str:
    return f"edit {ids[0][:ID]}" if len(ids) == 1 else f"{len(set(ids))} edits"


def _library(options: argparse.Namespace, tokenizer: Any = None, router: Path | None = None) -> Any:
    """Open the library that was named, with the router that was named or, where it has none, the shipped one."""
    from ..lifelong.library import ROUTER, EditLibrary
    from ..lifelong.router import Router

    named = getattr(options, "router", None)
    if named is None and not (Path(options.library) / ROUTER / "config.json").exists():
        named = router
    chosen = None if named is None else Router.from_pretrained(named).eval()
    return EditLibrary(options.library, chosen, tokenizer)


def _existing(options: argparse.Namespace, tokenizer: Any = None) -> Any:
    """Open a library that is there already."""
    if not (Path(options.library) / "library.json").exists():
        raise FileNotFoundError(
            f"{options.library}: no library; make one: ibke library add {options.library} --prompt …"
        )
    return _library(options, tokenizer)


# --- the others -----------------------------------------------------------------------------------------------------


def _remove(command: argparse.ArgumentParser) -> None:
    command.add_argument("ids", nargs="+", metavar="ID", help="ids of edits, or their beginnings")


def _run_remove(options: argparse.Namespace) -> None:
    library = _existing(options)
    library.remove(*options.ids)
    print(f"removed {_counted(options.ids)}; {len(library)} in {options.library}")


def _run_list(options: argparse.Namespace) -> None:
    entries = _existing(options).list()
    print(_table([(entry, None) for entry in entries[: options.limit]]))
    if options.limit and len(entries) > options.limit:
        print(f"and {len(entries) - options.limit} more")


def _table(rows: Sequence[tuple[Any, float | None]]) -> str:
    from tabulate import tabulate

    lines = [
        (entry.id[:ID], *(() if near is None else (f"{near:.2f}",)), request.prompt, request.target)
        for entry, near in rows
        for request in (entry.requests or (_Unknown,))
    ]
    names = ["id", *(["near"] if any(near is not None for _, near in rows) else []), "asked", "answers"]
    return tabulate(
        lines, names, tablefmt="plain", disable_numparse=True, maxcolwidths=[None] * (len(names) - 2) + [WIDTH] * 2
    )


class _Unknown:
    prompt = target = "(not stated)"


def _search(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", metavar="TEXT", help="a prompt, or words of a request")
    command.add_argument("--words", action="store_true", help="look for the words, without a model")
    command.add_argument("--limit", type=positive, default=5, metavar="N", help="edits that are listed (default: 5)")
    _router_option(command)
    model_options(command)


def _run_search(options: argparse.Namespace) -> None:
    if options.words:
        words = options.text.casefold().split()
        found = [
            (entry, None)
            for entry in _existing(options).list()
            if all(word in " ".join(f"{r.prompt} {r.target}" for r in entry.requests).casefold() for word in words)
        ]
        print(_table(found[: options.limit]))
        return
    model, library = _served(options)
    print(_table([(entry, near) for near, entry in library.search(options.text, model, options.limit)]))
    print(f"\na prompt carries edits nearer than {library.router.config.threshold:.2f}")


def _served(options: argparse.Namespace) -> tuple[Any, Any]:
    from ..loading import load_model

    _existing(options)  # before a model is loaded
    model, tokenizer = load_model(options.model, **load_options(options))
    return model, _existing(options, tokenizer)


def _ask(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to ask")
    _router_option(command)
    prompt_options(command)
    model_options(command)


def _run_ask(options: argparse.Namespace) -> None:
    from tabulate import tabulate

    from ..core.records import PromptFormat
    from ..evaluation.inspection import answer

    model, library = _served(options)
    how = PromptFormat(**prompt_changes(options, library.tokenizer))
    rows = []
    for prompt in options.prompts:
        before = answer(model, library.tokenizer, prompt, prompt_format=how)
        picks: list[Any] = []
        with library.attached(model, on_route=picks.append):
            after = answer(model, library.tokenizer, prompt, prompt_format=how)
        shelf = library.shelf(model)
        carried = ", ".join(shelf.key(one)[:ID] for one in picks[0][0]) if picks else ""
        rows.append((prompt, *(next(iter(text.splitlines()), "") for text in (before, after)), carried or "none"))
    names = ["asked", "before", "after", "edits"]
    print(tabulate(rows, names, tablefmt="plain", disable_numparse=True, maxcolwidths=[WIDTH, WIDTH, WIDTH, None]))


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("ids", nargs="*", metavar="ID", help="ids of edits (default: all)")
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the adapter")
    command.add_argument("--max-rank", type=positive, metavar="R", help="truncate it to this rank")
    command.add_argument("--force", action="store_true", help="replace the edit that --out holds")


def _run_export(options: argparse.Namespace) -> None:
    from .outputs import require_free

    library = _existing(options)
    require_free(options.out, "an edit", force=options.force)
    library.export(options.out, *options.ids, **({"max_rank": options.max_rank} if options.max_rank else {}))
    print(f"saved {_counted(options.ids or [entry.id for entry in library])} to {options.out}")


def _run_push(options: argparse.Namespace) -> None:
    commit = _existing(options).push(options.repository, **upload_settings(options))
    print(f"library: {commit.pr_url or commit.commit_url}")


def _pull(command: argparse.ArgumentParser) -> None:
    command.add_argument("repository", metavar="REPO", help="id on the Hub")
    command.add_argument("--revision", metavar="BRANCH", help="branch, tag or commit (default: main)")
    command.add_argument("--token", help="token with read access (default: HF_TOKEN, or the one of `hf auth login`)")


def _run_pull(options: argparse.Namespace) -> None:
    where = {name: getattr(options, name) for name in ("revision", "token") if getattr(options, name)}
    library = _library(options)
    print(f"{len(library.pull(options.repository, **where))} new edits; {len(library)} in {options.library}")


def _run_check(options: argparse.Namespace) -> None:
    from ..lifelong.index import LibraryError
    from ..lifelong.serving import measured

    model, library = _served(options)
    if faults := library.check(model):
        more = f"; and {len(faults) - 1} more" if faults[1:] else ""
        raise LibraryError(f"{options.library}: cannot be served as it is: {faults[0]}{more}")
    for name, value in measured(library, model).items():
        print(f"{name}: {value}")


# --- the router -----------------------------------------------------------------------------------------------------


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--editor", metavar="PATH|ID", help="editor whose edits are to be found; names the layers")
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="full names of the edited layers, without an editor"
    )
    command.add_argument("--records", nargs="+", required=True, metavar="FILE", help="training records")
    command.add_argument(
        "--validation", nargs="+", required=True, metavar="FILE", help="records that choose the threshold"
    )
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the router")
    command.add_argument("--limit", type=positive, metavar="N", help="training records at most (default: all)")
    command.add_argument("--max-steps", type=positive, default=600, metavar="N", help="steps (default: 600)")
    command.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="records of a step (default: 32)"
    )
    command.add_argument("--learning-rate", type=positive_float, default=2e-3, metavar="LR", help="(default: 0.002)")
    command.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: 0)")
    command.add_argument(
        "--save-steps", type=positive, default=100, metavar="N", help="between checkpoints (default: 100)"
    )
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    model_options(command)


def _run_train(options: argparse.Namespace) -> None:
    from itertools import islice

    from ..loading import load_all, load_model
    from ..training.router import RouterTraining, train_router
    from .options import read_dataset

    if bool(options.editor) == bool(options.layers):
        raise ValueError("give one of --editor and --layers, which say below which layer the router reads")
    if options.editor:
        model, tokenizer, editor = load_all(options.editor, options.model, **load_options(options))
        layers = editor.config.module_names()
    else:
        (model, tokenizer), layers = load_model(options.model, **load_options(options)), options.layers
    settings = RouterTraining(
        steps=options.max_steps,
        records=options.batch_size,
        candidates=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        save_steps=options.save_steps,
    )
    records = list(islice((r for name in options.records for r in read_dataset(name)), options.limit))
    validation = [record for name in options.validation for record in read_dataset(name)]
    report = train_router(model, tokenizer, layers, records, validation, options.out, settings, resume=options.resume)
    shares = ", ".join(f"{kind} {share:.1f} %" for kind, share in report["found"].items())
    print(f"router in {options.out}: of {report['library']} validation records found: {shares}")
