"""`ibke bench`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .options import add_command, count, model_options, place, positive

if TYPE_CHECKING:
    from ..benchmark.ratios import Ratio
    from ..benchmark.subject import Subject

DEFAULT = "smollm2"
WITH_MODEL = ("edit", "train", "attach", "mixed", "memory", "library")
WHAT = (*WITH_MODEL, "all", "records", "paper")
RUNS, ROWS = 7, 64
UNIEDIT = 207_419  # records of its training set


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "bench",
        "measure what editing and training cost, each against the plain passes that the mathematics needs",
        _run,
    )
    command.add_argument(
        "what",
        choices=WHAT,
        help="what is measured; records: the start of a training on as many as UniEdit has; "
        "paper: the paper's four backbones at their true dimensions, with random weights",
    )
    model_options(command, default=DEFAULT)
    command.add_argument("--layers", type=count, nargs="+", help="edited layers (default: three below the middle)")
    command.add_argument(
        "--latent-dim", type=positive, metavar="N", help="d_m of the editor (default: by the model's size)"
    )
    command.add_argument(
        "--random", action="store_true", help="random weights of the model's shape, also where it is installed"
    )
    command.add_argument("--small", action="store_true", help="the paper's backbones at toy size, to try it")
    command.add_argument(
        "--runs", type=positive, default=RUNS, help=f"rounds that a median is taken of (default: {RUNS})"
    )
    command.add_argument(
        "--rows", type=positive, default=ROWS, help=f"rows of the mixed batch, an edit each (default: {ROWS})"
    )
    command.add_argument(
        "--records",
        type=positive,
        default=UNIEDIT,
        metavar="N",
        help=f"made records to start on (default: {UNIEDIT:,})",
    )
    command.add_argument(
        "--json", type=place, metavar="FILE", help="write the list of ratios, and a page with the machine beside it"
    )


def _run(options: argparse.Namespace) -> None:
    from ..benchmark.ratios import table, write_ratios
    from ..io import require_writable

    if options.json is not None:
        require_writable(options.json)
    if options.what == "paper":
        _paper(options)
        return
    if options.what == "records":
        from ..benchmark.record_loading import record_ratios

        ratios, about = record_ratios(options.records), f"{options.records:,} made records in UniEdit's format"
    else:
        ratios, about = _with_model(options)
    print(table(ratios))
    if options.json is not None:
        files = write_ratios(ratios, options.json, command=_command(options), about=about)
        print("\n".join(f"written: {file}" for file in files))


def _paper(options: argparse.Namespace) -> None:
    """Measure the paper's backbones one after another; print each as it is measured, and write them all."""
    from ..benchmark.paper_backbones import measure_paper_backbones
    from ..benchmark.ratios import machine, versions
    from ..io import write_json
    from ..loading import require_device

    if options.device is not None:
        require_device(options.device)
    dtype = None if options.dtype == "auto" else options.dtype
    measured = []
    for entry in measure_paper_backbones(options.device, dtype=dtype, small=options.small, runs=options.runs):
        measured.append(entry)
        print("  ".join(f"{name} {_short(value)}" for name, value in entry.items()), flush=True)
    if options.json is not None:
        about = {"command": _command(options), "machine": machine(), "versions": versions()}
        write_json(options.json, {**about, "backbones": measured}, indent=2)
        print(f"written: {options.json}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_model(options: argparse.Namespace) -> tuple[list[Ratio], str]:
    """Measure on a model; return what was measured, and the model in words."""
    parts = WITH_MODEL if options.what == "all" else (options.what,)
    subject = _subject(options)
    ratios: list[Ratio] = []
    for name in parts:
        print(f"measuring {name} on {subject.about}", file=sys.stderr, flush=True)
        ratios += _measures(options)[name](subject)
    return ratios, subject.about


def _measures(options: argparse.Namespace) -> dict[str, Callable[[Subject], Sequence[Ratio]]]:
    from ..benchmark import edit_cost, memory_use, training_cost

    return {
        "edit": lambda subject: edit_cost.edit_ratios(subject, options.runs),
        "train": lambda subject: training_cost.training_ratios(subject, options.runs),
        "attach": lambda subject: edit_cost.attached_ratios(subject, options.runs),
        "mixed": lambda subject: edit_cost.mixed_ratios(subject, options.runs, options.rows),
        "memory": memory_use.memory_ratios,
        "library": _library_ratios,
    }


def _library_ratios(subject: Subject) -> Sequence[Ratio]:
    """Measure libraries of edits; what does it is loaded only here."""
    from ..benchmark.library_speed import library_ratios
    from ..benchmark.ratios import Ratio

    entries = library_ratios(subject.model, subject.tokenizer, subject.editor)
    names = ("name", "shape", "ours", "reference", "unit")
    return [Ratio(**{name: entry[name] for name in names}) for entry in entries]


def _subject(options: argparse.Namespace) -> Subject:
    from ..app.knowledge import facts_of, read_facts
    from ..benchmark.subject import new_subject, random_backbone
    from ..loading import load_model
    from ..training.needs import SHAPES
    from .options import load_options

    name = str(options.model)
    drawn = options.random or (name in SHAPES and not _is_installed(name))
    if drawn:
        from ..atlas import load_backbone

        model, tokenizer = random_backbone(name), load_backbone()[1]
        model = model if options.device is None else model.to(options.device)
        about = f"random weights of the shape of {name}"
    else:
        model, tokenizer = load_model(name, **load_options(options))
        about = name
    about += f", {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}"
    facts = [fact.form for fact in read_facts(facts_of(DEFAULT))]
    fields = {} if options.latent_dim is None else {"latent_dim": options.latent_dim}
    rows = []
    for form in facts:
        question, _, answer = form.neighbours.splitlines()[0].partition(" -> ")
        rows.append((form.prompt, form.target, form.rephrasings.splitlines()[0], question, answer.split(" | ")[0]))
    return new_subject(model, tokenizer, rows, about, layers=options.layers, editor_fields=fields)


def _is_installed(name: str) -> bool:
    from ..loading import INSTALLABLE

    return name not in INSTALLABLE or find_spec(INSTALLABLE[name][0]) is not None


def _command(options: argparse.Namespace) -> str:
    """Return the command line that measures the same."""
    if options.what == "records":
        words = ["ibke", "bench", "records", "--records", str(options.records), "--json", str(options.json)]
        return shlex.join(words)
    if options.what == "paper":
        words = ["ibke", "bench", "paper", *["--small"] * options.small, "--dtype", options.dtype]
        words += [] if options.device is None else ["--device", options.device]
        return shlex.join([*words, "--runs", str(options.runs), "--json", str(options.json)])
    words = ["ibke", "bench", options.what, "--model", str(options.model)]
    for name in ("device", "device_map", "bits", "revision", "latent_dim"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += [] if options.layers is None else ["--layers", *map(str, options.layers)]
    words += ["--random"] if options.random else []
    words += ["--dtype", options.dtype, "--runs", str(options.runs), "--rows", str(options.rows)]
    return shlex.join([*words, "--json", str(options.json)])
