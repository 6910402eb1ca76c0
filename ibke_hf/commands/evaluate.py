"""`ibke eval`: score an editor on a dataset by PROTOCOL's procedure."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..editors.catalogue import KINDS, WITHOUT_WEIGHTS, require_editor
from ..io import locked
from .options import (
    add_command,
    composition_options,
    edited_modules_option,
    load_options,
    model_options,
    place,
    positive,
    read_dataset,
    seed,
    set_company,
)
from .prompt_options import free_option, is_free, prompt_changes, prompt_options

SELECTION = (
    "dataset",
    "format",
    "split",
    "domains",
    "criteria",
    "hops",
    "limit",
    "seed",
    "chat",
    "chat_options",
    "leading_space",
)
ATLAS = "atlas"


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "eval", "score an editor on a dataset; a killed run goes on where it stopped", _run
    )
    what = command.add_argument_group("what is evaluated")
    what.add_argument(
        "--dataset", required=True, metavar="NAME|PATH", help="atlas, uniedit, a file, a folder or a Hub dataset id"
    )
    what.add_argument("--format", help="native format of the dataset (default: told from its content)")
    model_options(command)
    what.add_argument(
        "--editor",
        metavar="NAME|PATH|ID",
        help=f"{', '.join(('none', *WITHOUT_WEIGHTS))} (none: the unedited model); Atlas's ibke or mend; else a "
        "trained editor (default: ibke)",
    )
    what.add_argument(
        "--corpus", metavar="FILE|ID", help="texts that rome and alphaedit measure the keys of --model on"
    )
    edited_modules_option(what)
    what.add_argument(
        "--rounding-noise",
        type=positive,
        metavar="BITS",
        help="add noise to --model as large as rounding its weights to so many bits makes, as in another file of it",
    )
    _selection_options(command.add_argument_group("which records"))
    _asking_options(command.add_argument_group("how they are asked"))
    command.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="folder of results.json, rows.jsonl and rows.html"
    )


def _selection_options(group: Any) -> None:
    group.add_argument("--split", help="split of the dataset (atlas: test, held_out or validation; default test)")
    group.add_argument("--domains", nargs="+", metavar="NAME", help="records of these domains only")
    group.add_argument(
        "--criteria", nargs="+", metavar="NAME", help='cases of these criteria only, such as "Multi-Hop"'
    )
    group.add_argument("--hops", nargs="+", type=positive, metavar="N", help="cases of these numbers of hops only")
    group.add_argument("--limit", type=positive, metavar="N", help="so many records only")
    group.add_argument("--seed", type=seed, help="draw the N records with this seed (default: the first N)")


def _asking_options(group: Any) -> None:
    group.add_argument(
        "--sequential", type=positive, default=1, metavar="N", help="edits that the model carries at once (default 1)"
    )
    group.add_argument(
        "--mode", choices=("sequential", "joint"), default="sequential", help="one after another, or all N in one edit"
    )
    composition_options(group)
    prompt_options(group)
    free_option(group)
    group.add_argument(
        "--strict", action="store_true", help="stop at the first record that cannot be used (default: leave it out)"
    )
    group.add_argument(
        "--collision-scope",
        choices=("set", "group"),
        default="set",
        help="drop locality cases that collide with an edit of the whole selection (default) or of their group",
    )
    group.add_argument(
        "--locality-match",
        choices=("ids", "string"),
        default="ids",
        help="compare token ids, or strings as UniEdit does",
    )
    group.add_argument(
        "--span", choices=("prompt", "offsets"), default="prompt", help="how the target's tokens are found"
    )
    group.add_argument("--no-generate", action="store_true", help="teacher-forced scores only, which is quicker")
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="prompts of a forward pass (default 64)"
    )


def _run(options: argparse.Namespace) -> None:
    require_editor(options.editor or "ibke", options.model)
    _require_corpus_used(options)
    is_free(options)  # refuses what contradicts itself
    with locked(options.out):  # before anything is loaded
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    from ..data.chat import as_asked
    from ..evaluation.report.score_table import score_table
    from ..evaluation.results import PAGE, RESULTS, ROWS, evaluate_to_folder
    from ..loading import load_all

    unread: Counter[str] = Counter()
    records = list(_records(options, unread))
    model, tokenizer, editor = load_all(
        options.editor,
        options.model,
        corpus=options.corpus,
        edits=options.sequential,
        edited_modules=options.edited_modules,
        **load_options(options),
    )
    company = set_company(editor, options)
    noise = _add_noise(options, model)
    changes = prompt_changes(options, tokenizer)
    records = [as_asked(record, **changes) for record in records]
    settings = {name: getattr(options, name) for name in SELECTION}
    results = evaluate_to_folder(
        options.out,
        editor,
        model,
        tokenizer,
        records,
        unread=unread,
        sequential=options.sequential,
        mode=options.mode,
        batch_size=options.batch_size,
        collision_scope=options.collision_scope,
        locality_match=options.locality_match,
        span=options.span,
        generate=not options.no_generate,
        **({"free": True} if is_free(options) else {}),
        strict=options.strict,
        progress=sys.stderr.isatty(),
        settings={
            **settings,
            "model": options.model or model.config.name_or_path,
            "editor": options.editor or "ibke",
            "corpus": options.corpus,
            **({"edited_modules": options.edited_modules} if options.edited_modules else {}),
            **company,
            **noise,
        },
    )
    print(score_table(results))
    print("\nwritten: " + ", ".join(str(Path(options.out) / name) for name in (RESULTS, ROWS, PAGE)))


def _add_noise(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Add the noise that is asked for; return what the results say of it."""
    if options.rounding_noise is None:
        return {}
    from ..evaluation.rounding_noise import add_rounding_noise

    share = add_rounding_noise(model, options.rounding_noise)
    return {"rounding_noise": {"bits": options.rounding_noise, "share": share}}


# --- what is evaluated --------------------------------------------------------------------------------------------


def _records(options: argparse.Namespace, unread: Counter[str]) -> Iterator[Any]:
    from ..data.sources import select

    filters = {
        "domains": options.domains,
        "criteria": options.criteria,
        "hops": options.hops,
        "limit": options.limit,
        "seed": options.seed,
    }
    if options.dataset == ATLAS:
        from ..atlas import load_records

        if options.format:
            raise ValueError(f"--format {options.format}: the records of atlas have one format; leave it out")
        return select(load_records(options.split or "test"), skipped=unread, **filters)
    return read_dataset(options.dataset, format=options.format, split=options.split, skipped=unread, **filters)


def _require_corpus_used(options: argparse.Namespace) -> None:
    name = options.editor or "ibke"
    if options.corpus and (options.model is None or name not in KINDS or not KINDS[name].needs_statistics):
        raise ValueError(f"--corpus: {name} on {options.model or 'atlas'} reads none; leave it out")
