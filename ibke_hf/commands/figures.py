"""`ibke figures`: the paper's Figures 2 to 7 from run outputs; `ibke claims`: what they say of the paper's claims."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .options import add_command, load_options, model_options, place, positive, read_dataset

OF_TABLE, OF_SWEEP, OF_EDITORS = ("2",), ("3", "4", "5a", "5b"), ("6", "7a", "7b", "ranks")
ATLAS = "atlas"


def add(commands: Any) -> None:
    """Add both commands."""
    command = add_command(
        commands, "figures", "draw the paper's Figures 2 to 7 from run outputs, with the data behind each", _run
    )
    command.add_argument(
        "--figures",
        nargs="+",
        choices=(*OF_TABLE, *OF_SWEEP, *OF_EDITORS),
        metavar="N",
        help="some of 2, 3, 4, 5a, 5b, 6, 7a, 7b, ranks (default: those that there are data for)",
    )
    command.add_argument("--table", metavar="FILE", help="table.json of `ibke table`, for Figure 2")
    command.add_argument("--sweep", metavar="DIR", help="folder or sweep.json of `ibke sweep`, for Figures 3 to 7")
    command.add_argument(
        "--editors",
        nargs="+",
        metavar="[LABEL=]PATH",
        help="editors of Figures 6 and 7 and of ranks (default: those that the sweep kept with and without IB, or by "
        "rank, else the one of the model: atlas, or what --model names)",
    )
    model_options(command, default=ATLAS)
    command.add_argument(
        "--records",
        nargs="+",
        metavar="FILE",
        help="edits of Figures 6 and 7 and of ranks (default: Atlas test and held-out)",
    )
    command.add_argument(
        "--limit",
        type=positive,
        default=100,
        metavar="N",
        help="edits that Figure 7 and that of ranks measure (default: 100)",
    )
    command.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the figures")
    command = add_command(
        commands, "claims", "hold the paper's claims against measured data, and write CLAIMS.md", _run_claims
    )
    command.add_argument(
        "folder", metavar="DIR", help="folder of table.json, sweep.json and figures/, such as model_cards/atlas"
    )
    command.add_argument("--out", type=place, metavar="FILE", help="default: CLAIMS.md in the folder")


def _run(options: argparse.Namespace) -> None:
    from ..analysis.figures import trade_off, write_figure, write_index
    from ..evaluation.report.drawing import require_plots
    from ..io import read_json_list

    require_plots()
    wanted = options.figures or [*OF_TABLE, *OF_SWEEP, *OF_EDITORS]
    _require_sources(options, wanted)
    makers: dict[str, Callable[[], Any]] = {}
    if options.table:
        makers["2"] = lambda: trade_off(read_json_list(options.table))
    if options.sweep:
        makers |= _of_sweep(options)
    if any(name in wanted for name in OF_EDITORS):
        makers |= _of_editors(options)
    for name in wanted:
        if name not in makers:
            print(f"figure {name}: left out, {_needs(name)} is not given", file=sys.stderr)
            continue
        print(f"figure {name} …", file=sys.stderr)
        try:
            data = makers[name]()
        except ValueError as error:
            if options.figures:
                raise
            print(f"figure {name}: left out, {error}", file=sys.stderr)
            continue
        print("written: " + ", ".join(map(str, write_figure(data, options.out))))
        print(f"all figures of the folder: {write_index(options.out)}")


def _needs(name: str) -> str:
    return "--table" if name in OF_TABLE else "--sweep"


def _require_sources(options: argparse.Namespace, wanted: list[str]) -> None:
    """Refuse a figure that was asked for by name and has no data."""
    for name in wanted if options.figures else ():
        if (name in OF_TABLE and not options.table) or (name in OF_SWEEP and not options.sweep):
            raise ValueError(f"figure {name} needs {_needs(name)}")


def _of_sweep(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    from ..analysis import trainings
    from ..analysis.files import read_sweep

    lines = read_sweep(options.sweep)
    return {
        "3": lambda: trainings.hyper_parameters(lines),
        "4": lambda: trainings.ablation(lines),
        "5a": lambda: trainings.domains(lines),
        "5b": lambda: trainings.criteria(lines),
    }


def _of_editors(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    from ..analysis import editors
    from ..analysis.ranks import quality_by_rank
    from ..loading import load_model

    atlas = options.model == ATLAS
    if not atlas and not options.records:
        raise ValueError("--records: name the edits of Figures 6 and 7; only Atlas has its own")
    model, tokenizer = load_model(None if atlas else options.model, **load_options(options))
    compared = _compared(options, model)
    records = _records(options)
    measured = records[:: max(len(records) // options.limit, 1)][: options.limit]

    def told(text: str) -> None:
        print(text, file=sys.stderr)

    return {
        "6": lambda: editors.latent_maps(compared, model, tokenizer, records),
        "7a": lambda: editors.scale_factor_maps(compared, model, tokenizer, measured),
        "7b": lambda: editors.pruning(compared, model, tokenizer, measured, told=told),
        "ranks": lambda: quality_by_rank(_by_rank(options, compared, model), model, tokenizer, measured, told=told),
    }


def _compared(options: argparse.Namespace, model: Any) -> list[Any]:
    """Load the editors that Figures 6 and 7 compare: those named, those of the sweep, or the model's own."""
    from ..analysis.editors import Compared, label_of
    from ..analysis.files import kept_editors
    from ..loading import load_editor

    if options.editors:
        named = [text.rpartition("=")[::2] for text in options.editors]
        loaded = [(label, load_editor(path, backbone=model)) for label, path in named]
        compared = [Compared(label or label_of(editor), {0: editor}) for label, editor in loaded]
        if len({one.label for one in compared}) < len(compared):
            raise ValueError("--editors: two have the same label; name them, as in first=PATH second=PATH")
        return compared
    kept = kept_editors(options.sweep) if options.sweep and options.model == ATLAS else {}
    if kept:
        return [
            Compared(label, {seed: load_editor(str(folder), backbone=model) for seed, folder in folders.items()})
            for label, folders in kept.items()
        ]
    if options.model != ATLAS:
        raise ValueError("--editors: name the editor of the model for Figures 6 and 7")
    editor = load_editor("ibke", backbone=model)
    return [Compared(f"shipped editor, {label_of(editor)}", {0: editor})]


def _by_rank(options: argparse.Namespace, compared: list[Any], model: Any) -> dict[str, Any]:
    """Return the editors of the figure of ranks: one whose edits are cut, and those trained with cut ones."""
    from ..analysis.files import kept_by_rank
    from ..analysis.ranks import AFTERWARDS, IN_THE_LOOP, RANKS
    from ..loading import load_editor

    if options.editors or not options.sweep or options.model != ATLAS:
        loaded = [editor for one in compared for editor in one.editors.values()]
        trained = {editor.config.edit_rank: {0: editor} for editor in loaded}
    else:
        trained = {
            rank: {seed: load_editor(str(folder), backbone=model) for seed, folder in folders.items()}
            for rank, folders in kept_by_rank(options.sweep).items()
        } or {0: compared[0].editors}
    whole = trained.get(0)
    lines = {AFTERWARDS: dict.fromkeys((*RANKS, 0), whole)} if whole else {}
    if any(trained):
        lines[IN_THE_LOOP] = trained
    return lines


def _records(options: argparse.Namespace) -> list[Any]:
    if options.records:
        return [record for name in options.records for record in read_dataset(name)]
    from ..atlas import load_records

    return [record for split in ("test", "held_out") for record in load_records(split)]


def _run_claims(options: argparse.Namespace) -> None:
    from ..analysis.claims import as_markdown, claims_of
    from ..analysis.files import read_evidence
    from ..io import write_text

    claims = claims_of(read_evidence(options.folder))
    out = Path(options.out or Path(options.folder) / "CLAIMS.md")
    write_text(out, as_markdown(claims))
    for claim in claims:
        print(f"{claim.word:<17} {claim.text}")
    print(f"written: {out}")
