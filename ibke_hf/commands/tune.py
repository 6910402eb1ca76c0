"""`ibke tune`: hyper-parameters of the editors without weights, for any model."""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ..editors.catalogue import KINDS, WITHOUT_WEIGHTS
from .options import add_command, load_options, model_options, place, positive, read_dataset

TABLE_CONFIG = "table.yaml"


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "tune", "choose the hyper-parameters of editors without weights on validation records", _run
    )
    model_options(command, "--backbone")
    command.add_argument(
        "--records", nargs="+", required=True, metavar="FILE", help="validation records, as `ibke eval` takes them"
    )
    command.add_argument("--limit", type=positive, default=20, metavar="N", help="first records of each (default 20)")
    command.add_argument(
        "--editors",
        nargs="+",
        choices=WITHOUT_WEIGHTS,
        default=list(WITHOUT_WEIGHTS),
        metavar="NAME",
        help=f"default: all, {', '.join(WITHOUT_WEIGHTS)}",
    )
    command.add_argument(
        "--trials", metavar="YAML", help="lists of settings by editor (default: four for each that suit any model)"
    )
    command.add_argument(
        "--sequential",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="edits that the model carries, each number tuned for itself (default 1)",
    )
    command.add_argument("--corpus", metavar="FILE|ID", help="texts that rome and alphaedit measure the keys on")
    command.add_argument(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help=f"folder of the trials, the choice, and {TABLE_CONFIG} for `ibke table --config`; a killed run goes on",
    )


def _run(options: argparse.Namespace) -> None:
    from ..benchmark.tuning import TrialBench, choose_settings
    from ..editors.locate.corpus import key_statistics
    from ..io import write_text
    from ..loading import load_model

    trials = _trials(options)
    _require_corpus(options)

    class Trials(TrialBench):
        """The model and records of the options."""

        def load(self) -> tuple[Any, Any]:
            return load_model(options.model, **load_options(options))

        @cached_property
        def statistics(self) -> Any:
            layers = [
                settings.get("layers") for name in trials if KINDS[name].needs_statistics for settings in trials[name]
            ]
            return key_statistics(*self.loaded, options.corpus, layers)

    records = [record for source in options.records for record in read_dataset(source, limit=options.limit)]
    by_edits = dict.fromkeys(options.sequential, trials)
    chosen = choose_settings(options.out, by_edits, Trials(records))
    fields = chosen[str(min(options.sequential))]
    corpus = {"corpus": options.corpus} if options.corpus else {}
    write_text(Path(options.out) / TABLE_CONFIG, _yaml({**corpus, "editors": fields}))
    print(json.dumps(chosen, indent=2))


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(settings, sort_keys=False))


def _trials(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return what is tried of each editor, its fields checked before anything is loaded.

    Raises:
        ValueError: Names the file and what is wrong in it.
    """
    from ..benchmark.tuning import TRIALS_FOR_ANY
    from ..training.settings import editor_fields, read_settings

    if options.trials is None:
        return {name: [dict(settings) for settings in TRIALS_FOR_ANY[name]] for name in options.editors}
    given = read_settings(options.trials, WITHOUT_WEIGHTS)
    missing = [name for name in options.editors if not given.get(name)]
    if missing:
        raise ValueError(
            f"{options.trials}: has no settings to try of {', '.join(missing)}; add them, or leave them "
            f"out of --editors"
        )
    for name in options.editors:
        if not isinstance(given[name], list) or not all(isinstance(fields, dict) for fields in given[name]):
            raise ValueError(
                f"{options.trials}: {name}: must be a list of settings by field, found {given[name]!r:.80}"
            )
        for number, fields in enumerate(given[name]):
            others = {field: value for field, value in fields.items() if field != "layers"}
            editor_fields(others, name, f"{options.trials}: trial {number} of {name}")
    return {name: given[name] for name in options.editors}


def _require_corpus(options: argparse.Namespace) -> None:
    measured = [name for name in options.editors if KINDS[name].needs_statistics]
    if measured and not options.corpus:
        raise ValueError(
            f"{' and '.join(measured)} measure the model's keys on texts: give them with --corpus, or choose "
            f"others with --editors"
        )
