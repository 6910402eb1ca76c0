"""`ibke table`: the paper's Table II and Fig. 2 for any backbone, cell by cell."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..editors.catalogue import ARRANGEMENTS, KINDS, WITH_WEIGHTS, editor_of, edits_projections, kind_of
from ..io import locked
from .options import (
    add_command,
    edited_modules_option,
    load_options,
    model_options,
    place,
    positive,
    read_dataset,
    share_options,
    shown,
)
from .prompt_options import free_option, is_free, prompt_changes, prompt_options

ATLAS = "atlas"
WITH_SPLIT = re.compile(r"(?P<dataset>.+):(?P<split>[\w-]+)")
SETTINGS = ("layers", "corpus", "editors", "training")  # of the YAML file


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "table", "compare editors as the paper's table does; a killed run goes on where it stopped", _run
    )
    _compared_options(command.add_argument_group("what is compared"))
    asking = command.add_argument_group("how records are asked")
    prompt_options(asking)
    free_option(asking)
    _editor_options(command.add_argument_group("how editors are made"))
    share_options(command)
    command.add_argument(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help="folder of table.json, .md, .csv, .html, the plot and the cells",
    )


def _compared_options(group: Any) -> None:
    model_options(group, "--backbone", default=ATLAS)
    group.add_argument(
        "--datasets",
        nargs="+",
        metavar="[NAME=]SOURCE[:SPLIT]",
        help="files, folders or Hub ids (atlas: test, held_out, validation); as in zsre=first.json,more.json[420:] a "
        "column may have a name of its own, several sources, and slices of them",
    )
    group.add_argument(
        "--editors",
        nargs="+",
        metavar="ID[=PATH]",
        help=f"some of {', '.join(KINDS)} (default: all, ibke_paper on atlas only: elsewhere ibke is that network "
        "unless --config says more); a trained one may be given, as in ibke=my-editor; "
        f"{', '.join(ARRANGEMENTS)}: edits solved together, or found for each prompt by a router, and requests in "
        "front of it",
    )
    group.add_argument(
        "--edits", nargs="+", metavar="KIND", help="counterfactual, unknown or all (default: all; atlas: both kinds)"
    )
    group.add_argument(
        "--sequential",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="edits that the model carries (default: 1)",
    )
    group.add_argument(
        "--seeds",
        type=positive,
        default=3,
        metavar="N",
        help="seeds 0 to N-1: each draws the records and names a training run (default: 3)",
    )
    group.add_argument("--limit", type=positive, default=100, metavar="N", help="records of a cell (default: 100)")


def _editor_options(group: Any) -> None:
    group.add_argument(
        "--records", nargs="+", metavar="FILE", help="training records of the editors with weights (atlas: its own)"
    )
    group.add_argument("--validation", nargs="+", metavar="FILE", help="held-out records of their training")
    group.add_argument(
        "--steps", type=positive, metavar="N", help="their training steps, the same for all (atlas: 700)"
    )
    group.add_argument(
        "--corpus",
        metavar="FILE|ID",
        help="texts that ROME and AlphaEdit measure the model's keys on (atlas: its own)",
    )
    group.add_argument(
        "--router",
        metavar="PATH|ID",
        help="router of the rows that are routed (default: beside their editor; atlas: its own)",
    )
    edited_modules_option(group)
    group.add_argument(
        "--config", metavar="YAML", help=f"{', '.join(SETTINGS)}: fields of the editors by id, and of the training"
    )
    group.add_argument(
        "--trained",
        type=place,
        metavar="DIR",
        help="folder of the trained editors (default: editors in the output folder)",
    )
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="prompts of a forward pass (default: 64)"
    )


def _run(options: argparse.Namespace) -> None:
    from ..evaluation.report.drawing import require_plots

    require_plots()  # not after hours of work
    with locked(options.out):
        _make(options)


def _make(options: argparse.Namespace) -> None:
    from ..benchmark import merge_cells, open_folder, run_cells

    if options.merge:
        merge_cells(options.merge, options.out)
        _show(options.out)
        return
    bench, plan = _bench_and_plan(options)
    open_folder(bench, plan, options.out)
    try:
        run_cells(
            bench,
            plan,
            options.out,
            shard=options.shard,
            trained=options.trained,
            batch_size=options.batch_size,
            progress=sys.stderr.isatty(),
        )
    finally:  # what is made by now is shown, whatever stops the rest
        _show(options.out)


def _show(out: str) -> None:
    """Write and print the table of all cells that the folder holds; those planned that are missing are said to be."""
    from ..benchmark import finished_cells, planned
    from ..evaluation.report.table import Column
    from ..evaluation.report.table_files import CSV, JSON, MARKDOWN, PAGE, PLOT, write_tables

    editors, groups = planned(out)
    print(
        write_tables(
            finished_cells(out),
            out,
            editors=editors,
            columns=[Column(*group) for group in groups],
            width=shutil.get_terminal_size((140, 24)).columns,
        )
    )
    files = [Path(out) / name for name in (JSON, MARKDOWN, CSV, PAGE, PLOT)]
    print("\nwritten: " + ", ".join(str(file) for file in files if file.exists()))


def _bench_and_plan(options: argparse.Namespace) -> tuple[Any, Any]:
    from ..benchmark import Plan

    atlas = options.model == ATLAS
    kinds = options.edits or (("counterfactual", "unknown") if atlas else ("all",))
    editors = [_editor(text) for text in options.editors or _default_editors(atlas)]
    options.datasets = dict(map(_named_sources, options.datasets or _default_datasets(atlas)))
    plan = Plan(
        [name for name, _ in editors], list(options.datasets), kinds, options.sequential, options.seeds, options.limit
    )
    return (_atlas_bench if atlas else _model_bench)(options, dict(editors)), plan


def _atlas_bench(options: argparse.Namespace, editors: Mapping[str, str]) -> Any:
    from ..atlas.bench import STEPS, AtlasBench

    named = [
        f"--{name.replace('_', '-')}"
        for name in (
            "records",
            "validation",
            "corpus",
            "edited_modules",
            "config",
            "router",
            "device",
            "device_map",
            "bits",
            "revision",
        )
        if getattr(options, name)
    ]
    named += ["--dtype"] * (options.dtype != "auto")
    named += [f"--{name.replace('_', '-')}" for name in prompt_changes(options)]
    named += [f"--editors {name}={path}" for name, path in editors.items() if path]
    if named:
        raise ValueError(f"{named[0]}: atlas has its own; leave it out, or give a --backbone")
    return AtlasBench(options.steps or STEPS, free=is_free(options))


def _model_bench(options: argparse.Namespace, editors: Mapping[str, str]) -> Any:
    from ..benchmark import ModelBench
    from ..data.chat import as_asked
    from ..loading import load_editor, load_model
    from ..training.recipe import PAPER_DTYPES, read_settings

    config = read_settings(options.config, SETTINGS) if options.config else {}
    fields = _with_projections(_checked_config(config, str(options.config)), options.edited_modules)
    if options.dtype == "auto":
        options.dtype = PAPER_DTYPES.get(options.model, "auto")  # editors are trained and scored in the same precision
    recipes = _Recipes(options, config, fields)
    return ModelBench(
        lambda: load_model(options.model, **load_options(options)),
        lambda name: (
            as_asked(record, **recipes.prompt_changes) for source in options.datasets[name] for record in _read(source)
        ),
        saved={editor_of(name): path for name, path in editors.items() if path},
        load_saved=load_editor,
        training=recipes.training if options.records else None,
        train=_train,
        statistics=recipes.statistics if recipes.corpus else None,
        layers=recipes.layers,
        hyper_parameters=fields,
        settings=recipes.settings(),
        router=options.router,
    )


class _Recipes:
    """How the editors of any backbone are made, by the options and a YAML file's settings."""

    def __init__(
        self, options: argparse.Namespace, config: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._options, self._config, self._fields = options, config, fields
        self.corpus = options.corpus or config.get("corpus")
        self.layers = config.get("layers")
        self.prompt_changes = prompt_changes(options)

    def training(self, name: str, seed: int, folder: Path) -> Mapping[str, Any]:
        """Return the settings of the training of an editor with weights, as `ibke train` has them."""
        from ..training.recipe import training_settings

        options, kind, fields = self._options, kind_of(name), dict(self._fields.get(name, {}))
        flags = {
            "kind": kind.variant_of or name,
            "backbone": options.model,
            "records": options.records,
            "validation": options.validation,
            "out": str(folder),
            "layers": fields.pop("layers", self.layers if kind.several_layers else None),
            "dtype": None if options.dtype == "auto" else options.dtype,
            "device_map": options.device_map,
            "bits": options.bits,
            **self.prompt_changes,
        }
        steps = {"max_steps": options.steps} if options.steps else {}
        training = {**(self._config.get("training") or {}), **steps, "seed": seed}
        return training_settings(None, flags, {**fields, **kind.settings}, training)

    def statistics(self, model: Any, tokenizer: Any) -> Any:
        """Return the statistics of the model's keys over the corpus, for all layers that an editor needs them of."""
        from ..editors.locate.corpus import key_statistics

        layers = [self._fields.get(name, {}).get("layers") for name in ("rome", "alphaedit")]
        return key_statistics(model, tokenizer, str(self.corpus), layers, edited_modules=self._options.edited_modules)

    def settings(self) -> dict[str, Any]:
        """Return what tells the table's cells from those of another one, as JSON values."""
        options = self._options
        return {
            "backbone": options.model,
            "dtype": options.dtype,
            "trained_on": options.records,
            "validation": options.validation,
            "steps": options.steps,
            "config": self._config,
            "corpus": self.corpus,
            **({"sources": named} if (named := _renamed(options.datasets)) else {}),
            **({"edited_modules": options.edited_modules} if options.edited_modules else {}),
            **({"router": options.router} if options.router else {}),
            **self.prompt_changes,
            **({"free": True} if is_free(options) else {}),
        }


def _train(settings: Mapping[str, Any]) -> Any:
    from ..training.recipe import train_editor

    checkpoints = Path(settings["out"]).glob("checkpoints/checkpoint-*/trainer_state.json")
    return train_editor(settings, resume=any(checkpoints))


def _checked_config(config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Check a YAML file's settings before anything is loaded; return the fields of the editors' configs by editor."""
    from ..training.settings import editor_fields, require_type, training_fields

    by_editor: dict[str, dict[str, Any]] = {}
    try:
        require_type("layers", config.get("layers"), list[int] | None)
        require_type("corpus", config.get("corpus"), str | None)
        training_fields(config.get("training") or {})
        for editor, fields in (config.get("editors") or {}).items():
            kind, group = kind_of(editor), f"editors: {editor}"
            if not isinstance(fields, dict):
                raise ValueError(f"{group}: must hold fields by name, found {shown(str(fields))}")
            if fields and not kind.module:
                raise ValueError(f"{group}: the unedited model has no fields; leave it out")
            others = {field: value for field, value in fields.items() if field != "layers"}
            by_editor[editor] = editor_fields(others, editor, group) if kind.module else {}
            if "layers" in fields:
                require_type(f"{group}: layers", fields["layers"], list[int])
                by_editor[editor]["layers"] = fields["layers"]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return by_editor


def _with_projections(
    fields: Mapping[str, Mapping[str, Any]], edited_modules: str | None
) -> dict[str, dict[str, Any]]:
    """Return the fields by editor, with the projections that all edit whose fields name no others."""
    named = {"edited_modules": edited_modules} if edited_modules else {}
    return {
        name: {**(named if edits_projections(name) else {}), **fields.get(name, {})}
        for name in (KINDS if named else fields)
    }


def _named_sources(text: str) -> tuple[str, list[str]]:
    """Return the name of a column and the sources of its records; a source alone is its own name."""
    name, named, sources = text.partition("=")
    if not named or Path(text).exists():
        return text, [text]
    if not name.strip() or not all(source.strip() for source in sources.split(",")):
        raise ValueError(f"--datasets {shown(text)}: give a name and its sources, as in zsre=first.json,second.json")
    return name, sources.split(",")


def _renamed(datasets: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the sources of the columns that have names of their own."""
    return {name: sources for name, sources in datasets.items() if sources != [name]}


def _read(name: str) -> Iterable[Any]:
    split = WITH_SPLIT.fullmatch(name) if not Path(name).exists() else None
    return read_dataset(split["dataset"], split=split["split"]) if split else read_dataset(name)


def _default_editors(atlas: bool) -> list[str]:
    """Return all ids; elsewhere than on Atlas the variants are left out: they are the default of their editor."""
    return [name for name, kind in KINDS.items() if atlas or not kind.variant_of]


def _default_datasets(atlas: bool) -> tuple[str, ...]:
    from ..atlas.bench import SPLITS

    if not atlas:
        raise ValueError("--datasets: name at least one, such as uniedit:test or a file")
    return SPLITS


def _editor(text: str) -> tuple[str, str]:
    """Return id and path of ``ID=PATH``; no path where there is none."""
    name, _, path = text.partition("=")
    if path and name not in (
        *WITH_WEIGHTS,
        *(row for row, kind in ARRANGEMENTS.items() if kind.editor in WITH_WEIGHTS),
    ):
        raise ValueError(f"--editors {text}: only {', '.join(WITH_WEIGHTS)} have weights to be given")
    return name, path
