"""The `ibke` command: parse, call, print. Errors go to stderr with exit code 2 and no traceback."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (2 for errors that the user can mend, 130 when interrupted)."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except KeyboardInterrupt:
        print("ibke: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"ibke {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


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
    command.set_defaults(run=run)
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
    command.add_argument("--dtype", default="auto", help="precision to load the model in: auto, float32, bfloat16 or float16")


def _edit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", required=True, help='what to ask, such as "The capital of Australia is"')
    command.add_argument("--target", required=True, help="what the edited model is to answer")
    command.add_argument("--subject", help="the entity that the fact is about, for editors that need it")
    _model_options(command)
    command.add_argument("--editor", help="folder or Hub id of a trained editor (default: Atlas's)")
    command.add_argument("--out", metavar="DIR", help="save the edit here, as a LoRA adapter")
    command.add_argument("--rank", type=int, help="truncate the saved edit to this rank")


def _run_edit(given: argparse.Namespace) -> None:
    from .inspection import top_predictions
    from .records import EditRequest

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

    model, tokenizer = _load_model(given)
    LowRankEdit.from_pretrained(given.edit).merge_into(model)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    print(f"saved the edited model to {given.out}")


def _load_model(given: argparse.Namespace) -> tuple[Any, Any]:
    if given.model is None:
        from .atlas import load_backbone

        model, tokenizer = load_backbone()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.model)
    return (model.to(given.device) if given.device else model), tokenizer


def _load_editor(given: argparse.Namespace) -> Any:
    if given.editor is None:
        from .atlas import load_editor

        return load_editor()
    from transformers import AutoModel

    from .editors import mend  # noqa: F401  registers both model types with AutoModel

    return AutoModel.from_pretrained(given.editor, dtype="float32").eval()


# --- train --------------------------------------------------------------------------------------------------------


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="YAML", help="file of settings, overridden by flags; nested: editor, training")
    command.add_argument("--backbone", help="folder or Hub id of the backbone")
    command.add_argument("--records", nargs="+", metavar="FILE", help="training records: UniEdit files or folders of them")
    command.add_argument("--validation", nargs="+", metavar="FILE", help="held-out records for early stopping")
    command.add_argument("--out", metavar="DIR", help="folder of the trained editor")
    command.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the preset's, else by depth)")
    command.add_argument("--dtype", default=None, help="precision of the backbone: auto, float32, bfloat16 or float16")
    command.add_argument("--max-steps", type=int, help="training steps")
    command.add_argument("--learning-rate", type=float, help="learning rate of the hypernetworks")
    command.add_argument("--batch-size", type=int, help="records per step and device")
    command.add_argument("--latent-dim", type=int, help="d_m, the module dimension")
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
    command.add_argument("--records", type=int, default=1000, help="number of training records (default 1000)")
    command.add_argument("--validation", type=float, default=0.1, help="share of the subjects kept for validation (default 0.1)")
    command.add_argument("--generality", type=int, default=3, help="generality cases a record (default 3)")
    command.add_argument("--locality", type=int, default=2, help="locality cases a record (default 2)")
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
    command.add_argument("--epochs", type=int, default=None, help="passes over the taught facts")
    command.add_argument("--max-steps", type=int, default=None, help="stop after so many steps, for trials")
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
        command.add_argument("--max-steps", type=int, default=None, help="training steps (default: the recipe's)")
        command.add_argument("--records", type=int, default=None, help="number of training records (default: the recipe's)")
        command.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other fields of the recipe, for trials")
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

    training = {} if given.max_steps is None else {"max_steps": given.max_steps}
    options: dict[str, Any] = {}
    for item in given.set:
        name, _, value = item.partition("=")
        group, _, field = name.rpartition(".")
        (options if group == "editor" else training)[field] = json.loads(value)
    if given.records is not None:
        training["records"] = given.records
    report = train_atlas_editor(
        given.editor_name, given.out or ASSETS / given.editor_name, seed=given.seed, options=options, resume=given.resume, **training
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
