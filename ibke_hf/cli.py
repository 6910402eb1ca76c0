"""The `ibke` command: parse, call, print. Errors go to stderr with exit code 2 and no traceback."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

NOT_TO_SET = ("output_dir", "seed", "max_steps", "use_cpu", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
              "save_total_limit")  # fmt: skip
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
USER_ERRORS = (ValueError, OSError, ImportError, ArithmeticError)
# of libraries that are not loaded yet, or that derive from no class of the above
LIBRARY_ERRORS = {"YAMLError", "SafetensorError", "StrictDataclassError", "HTTPError", "OutOfMemoryError"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (2 for errors that the user can mend, 130 when interrupted)."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except KeyboardInterrupt:
        print("ibke: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"ibke {given.title}: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def _is_for_the_user(error: Exception) -> bool:
    return isinstance(error, USER_ERRORS) or any(kind.__name__ in LIBRARY_ERRORS for kind in type(error).__mro__)


def _message(error: Exception) -> str:
    """Return one line, but for facts: one for each bad row."""
    from .data.facts import FactsError

    return str(error) if isinstance(error, FactsError) else " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; tests parse every command of the documentation with it."""
    parser = argparse.ArgumentParser(prog="ibke", description="Correct facts inside language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _demo(_command(commands, "demo", "watch edits of the embedded language model, and a small comparison of editors", _run_demo))
    _edit(_command(commands, "edit", "edit one fact of a model and save the edit as a LoRA adapter", _run_edit))
    _merge(_command(commands, "merge", "write a full model with an edit merged into its weights", _run_merge))
    _train(_command(commands, "train", "train an editor for any backbone on record files", _run_train))
    data = commands.add_parser("data", help="make edit records").add_subparsers(dest="action", required=True, metavar="action")
    _data_build(_command(data, "build", "turn tables of facts into edit records in UniEdit's schema", _run_data_build))
    atlas = commands.add_parser("atlas", help="rebuild the embedded world").add_subparsers(dest="action", required=True, metavar="action")
    _atlas(atlas)
    return parser


def _command(commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.set_defaults(run=run, title=command.prog.removeprefix("ibke "))
    return command


# --- demo ---------------------------------------------------------------------------------------------------------


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the scores to this file")
    command.add_argument("--records", type=int, default=100, metavar="N", help="records of each split (default 100; 0 for all)")


def _run_demo(given: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(json_file=given.json, records=given.records)


# --- edit and merge -----------------------------------------------------------------------------------------------


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="folder or Hub id of the model (default: the embedded Atlas backbone)")
    command.add_argument("--device", help="device to load the model to, such as cpu (default: where it loads)")
    command.add_argument("--dtype", default="auto", choices=PRECISIONS, help="precision to load the model in (default: as saved)")


def _edit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", required=True, help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", required=True, help="what the edited model is to answer")
    command.add_argument("--subject", help="the entity that the fact is about, for editors that need it")
    _model_options(command)
    command.add_argument("--editor", help="folder or Hub id of a trained editor (default: Atlas's)")
    command.add_argument("--out", metavar="DIR", help="save the edit here, as a LoRA adapter")
    command.add_argument("--rank", type=_positive, help="truncate the saved edit to this rank")


def _run_edit(given: argparse.Namespace) -> None:
    from .inspection import top_predictions
    from .records import EditRequest

    if given.rank and not given.out:
        raise ValueError("--rank says how to save the edit; give --out DIR as well")
    model, tokenizer = _load_model(given)
    editor = _load_editor(given)
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
    _model_options(command)


def _run_merge(given: argparse.Namespace) -> None:
    from .edits import LowRankEdit

    edit = LowRankEdit.from_pretrained(given.edit)
    Path(given.out).mkdir(parents=True, exist_ok=True)  # transformers would only log that it is a file
    model, tokenizer = _load_model(given)
    edit.merge_into(model)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(f"saved the edited model to {given.out}")


def _load_model(given: argparse.Namespace) -> tuple[Any, Any]:
    if given.device:
        _require_device(given.device)
    if given.model is None:
        from .atlas import ASSETS, load_backbone

        with _loading(str(ASSETS / "backbone")):
            model, tokenizer = load_backbone()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with _loading(given.model):
            model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
            tokenizer = AutoTokenizer.from_pretrained(given.model)
    return (model.to(given.device) if given.device else model), tokenizer


def _load_editor(given: argparse.Namespace) -> Any:
    if given.editor is None:
        from .atlas import ASSETS, load_editor

        with _loading(str(ASSETS / "ibke")):
            return load_editor()
    from transformers import AutoModel

    from .editors import mend  # noqa: F401  registers both model types with AutoModel

    with _loading(given.editor):
        editor = AutoModel.from_pretrained(given.editor, dtype="float32").eval()
    if not hasattr(editor, "edit"):
        raise ValueError(f"{given.editor}: holds a {type(editor).__name__}, not an editor; `ibke train` makes one")
    return editor


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Name what was being loaded, whatever transformers, safetensors and their kin raise about a broken folder."""
    from transformers.utils import logging

    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such folder")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: cannot be loaded ({textwrap.shorten(str(error), 300, placeholder=' ...')})") from error


def _require_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(f"--device {device}: this machine cannot compute there ({reason}); leave it out or use cpu") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, found {text!r}")
    return int(text)


# --- train --------------------------------------------------------------------------------------------------------


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="YAML", help="file of settings, overridden by flags; nested: editor, training")
    command.add_argument("--backbone", help="folder or Hub id of the backbone")
    command.add_argument("--records", nargs="+", metavar="FILE", help="training records: UniEdit files or folders of them")
    command.add_argument("--validation", nargs="+", metavar="FILE", help="held-out records for early stopping")
    command.add_argument("--out", metavar="DIR", help="folder of the trained editor")
    command.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the preset's, else by depth)")
    command.add_argument("--dtype", choices=PRECISIONS, help="precision of the backbone (default: as saved)")
    command.add_argument("--max-steps", type=_positive, help="training steps")
    command.add_argument("--learning-rate", type=float, help="learning rate of the hypernetworks")
    command.add_argument("--batch-size", type=_positive, help="records per step and device")
    command.add_argument("--latent-dim", type=_positive, help="d_m, the module dimension")
    command.add_argument("--seed", type=int, help="seed of initialisation, order and noise")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")


def _run_train(given: argparse.Namespace) -> None:
    from .training import train_editor, training_settings

    flags = {key: getattr(given, key) for key in ("backbone", "records", "validation", "out", "layers", "dtype")}
    training = {"max_steps": given.max_steps, "learning_rate": given.learning_rate, "seed": given.seed,
                "per_device_train_batch_size": given.batch_size}  # fmt: skip
    settings = training_settings(given.config, flags, {"latent_dim": given.latent_dim}, training)
    print(json.dumps(train_editor(settings, resume=given.resume), indent=2))


# --- data and atlas -----------------------------------------------------------------------------------------------


def _data_build(command: argparse.ArgumentParser) -> None:
    command.add_argument("--facts", required=True, metavar="DIR", help="tables: relations.tsv, templates.tsv, triples.tsv, entities.tsv")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the record files, train and validation")
    command.add_argument("--records", type=_positive, default=1000, help="number of training records (default 1000)")
    command.add_argument("--validation", type=float, default=0.1, help="share of the subjects kept for validation (default 0.1)")
    command.add_argument("--generality", type=_positive, default=3, help="generality cases a record (default 3)")
    command.add_argument("--locality", type=_positive, default=2, help="locality cases a record (default 2)")
    command.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")


def _run_data_build(given: argparse.Namespace) -> None:
    from .data.folders import build_folder

    counts = build_folder(given.facts, given.out, records=given.records, validation=given.validation, generality=given.generality,
                          locality=given.locality, seed=given.seed)  # fmt: skip
    print("\n".join(f"{Path(given.out) / name}: {number} records" for name, number in counts.items()))


def _atlas(actions: Any) -> None:
    command = _command(actions, "build-data", "write the evaluation records of the embedded world", _run_build_data)
    command.add_argument("--out", metavar="DIR", help="default: the package's own assets")
    command = _command(actions, "build-backbone", "pretrain the embedded language model", _run_build_backbone)
    command.add_argument("--out", metavar="DIR", help="default: the package's own assets")
    command.add_argument("--epochs", type=_positive, help="passes over the taught facts")
    command.add_argument("--max-steps", type=_positive, help="stop after so many steps, for trials")
    command.add_argument("--seed", type=int, default=0)
    command = _command(actions, "tune-ft", "choose the learning rate of the fine-tuning baseline on validation records", _run_tune_ft)
    command.add_argument("--out", metavar="DIR", help="default: the package's own assets")
    command = _command(actions, "report", "score the embedded editors on all test and held-out records", _run_report)
    command.add_argument("--out", metavar="DIR", help="default: the package's own assets")
    for name in ("ibke", "mend"):
        action = "train-editor" if name == "ibke" else "train-mend"
        command = _command(actions, action, f"train the embedded {name.upper()} editor", _run_train_atlas)
        command.set_defaults(editor_name=name)
        command.add_argument("--out", metavar="DIR", help="default: the package's own assets")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--max-steps", type=_positive, help="training steps (default: the recipe's)")
        command.add_argument("--records", type=_positive, help="number of training records (default: the recipe's)")
        command.add_argument("--set", type=_setting, nargs="*", default=[], metavar="NAME=VALUE",
                             help="other fields of the recipe, for trials: JSON values; editor.NAME for fields of the editor")  # fmt: skip
        command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def _run_build_data(given: argparse.Namespace) -> None:
    from .atlas import ASSETS, load_split
    from .atlas.datasets import write_evaluation_records

    print(json.dumps(write_evaluation_records(load_split(), given.out or ASSETS / "records"), indent=2))


def _run_build_backbone(given: argparse.Namespace) -> None:
    from .atlas import ASSETS, load_split
    from .atlas.backbone import build_backbone

    split = load_split()
    options = {name: value for name, value in (("epochs", given.epochs), ("max_steps", given.max_steps)) if value is not None}
    report = build_backbone(split.world, split.taught, given.out or ASSETS / "backbone", seed=given.seed, **options)
    print(json.dumps(report, indent=2))


def _run_tune_ft(given: argparse.Namespace) -> None:
    from .atlas import ASSETS
    from .atlas.tuning import tune_ft

    print(json.dumps(tune_ft(given.out or ASSETS), indent=2))


def _run_report(given: argparse.Namespace) -> None:
    from .atlas import ASSETS
    from .atlas.report import markdown_table, write_report

    print(markdown_table(write_report(given.out or ASSETS)))


def _run_train_atlas(given: argparse.Namespace) -> None:
    from .atlas import ASSETS
    from .atlas.training import train_atlas_editor

    _require_fields(given)
    training = {name: value for group, name, value in given.set if group == "training"}
    options = {name: value for group, name, value in given.set if group == "editor"}
    training |= {name: value for name in ("max_steps", "records") if (value := getattr(given, name)) is not None}
    report = train_atlas_editor(
        given.editor_name, given.out or ASSETS / given.editor_name, seed=given.seed, options=options, resume=given.resume, **training
    )
    print(json.dumps(report, indent=2))


def _require_fields(given: argparse.Namespace) -> None:
    """Refuse a `--set` that names no field, or one that the command decides itself."""
    from .configuration_ibke import IBKEConfig
    from .editors.mend import MENDConfig
    from .trainer import IBKETrainingArguments

    config = IBKEConfig if given.editor_name == "ibke" else MENDConfig
    known = {
        "training": {field.name for field in fields(IBKETrainingArguments) if field.init and field.name not in NOT_TO_SET},
        "editor": {"layers", *(field.name for field in fields(config))},
    }
    for group, name, _ in given.set:
        if name not in known[group]:
            raise ValueError(f"--set {name}: no such field of the {group} recipe, or one that the command sets itself")


def _setting(text: str) -> tuple[str, str, Any]:
    """Return group (training or editor), name and value of ``NAME=VALUE``."""
    name, _, value = text.partition("=")
    group, _, field = name.rpartition(".")
    if not field.isidentifier() or group not in ("", "training", "editor"):
        raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, such as beta=0.2 or editor.latent_dim=128, found {text!r}")
    try:
        return group or "training", field, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f'{name!r} needs a JSON value, such as 0.1, true or \'"cosine"\', found {value!r}') from error


if __name__ == "__main__":
    sys.exit(main())
