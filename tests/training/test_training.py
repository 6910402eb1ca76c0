"""`ibke train`: a whole training from files to a saved editor."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from record_files import Json

from ibke_hf import EditRequest, IBKEEditor
from ibke_hf.cli import build_parser, main
from ibke_hf.editors.catalogue import editor_class
from ibke_hf.io import locked
from ibke_hf.loading import load_editor
from ibke_hf.training.checkpoints import last_complete_checkpoint
from ibke_hf.training.recipe import train_editor
from ibke_hf.training.report import verdict

# --- training ----------------------------------------------------------------------------------------------------


def test_an_editor_is_trained_saved_and_usable(
    settings: Json, tiny_model: Any, tiny_tokenizer: Any, caplog: Any
) -> None:
    logging.getLogger("ibke_hf").addHandler(caplog.handler)
    result = train_editor(settings)
    assert {"eval_loss", "eval_reliability", "eval_generality", "eval_locality"} <= result.keys()
    assert "left out 1: edit with an empty prompt or target" in caplog.text
    out = Path(settings["out"])
    assert {path.name for path in out.iterdir()} == {
        "checkpoints",
        "config.json",
        "model.safetensors",
        "training.json",
        ".lock",
    }
    assert (result["steps"], result["records_left_out"]) == (4, 0)
    assert result["before"]["locality"] == 100.0
    assert {*result["before"]} == {*result["after"]} == {"reliability", "generality", "locality"}
    editor = IBKEEditor.from_pretrained(out)
    assert editor.is_calibrated and editor.config.latent_dim == 8 and editor.config.edited_layers == [1, 2]
    backbone = tiny_model()
    with editor.edit(backbone, tiny_tokenizer, [EditRequest("The Oslo tower is in", "Rome")]).attached(backbone):
        pass
    state = json.loads((out / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert result["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mend", {"hidden_dim": 4}),
        ("serac", {"embedding_dim": 8, "counterfactual": "backbone"}),
        ("serac", {"scope_form": "cross"}),
    ],
)
def test_other_kinds_of_editors_are_trained_alike(
    kind: str, fields: Json, settings: Json, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    settings |= {"kind": kind, "editor": fields, "layers": None if kind == "serac" else [1, 2]}
    assert {"eval_loss", "eval_reliability", "eval_generality", "eval_locality"} <= train_editor(settings).keys()
    editor, backbone = load_editor(settings["out"]), tiny_model()
    assert type(editor) is editor_class(kind)
    with editor.edit(backbone, tiny_tokenizer, [EditRequest("The Oslo tower is in", "Rome")]).attached(backbone):
        pass


def test_the_counterfactual_model_starts_as_what_is_named(settings: Json, tiny_model: Any) -> None:
    settings |= {
        "kind": "serac",
        "layers": None,
        "editor": {"counterfactual": settings["backbone"], "scope": "backbone"},
    }
    settings["training"] |= {"max_steps": 1, "learning_rate": 0.0}
    train_editor(settings)
    started = load_editor(settings["out"]).counterfactual.state_dict()
    assert all(torch.equal(started[name], value) for name, value in tiny_model().state_dict().items())


def test_the_seed_gives_the_same_editor_and_resume_goes_on_from_it(settings: Json, tmp_path: Path) -> None:
    def trained(name: str, resume: bool = False, **training: Any) -> dict[str, torch.Tensor]:
        options = {**settings, "out": str(tmp_path / name), "training": {**settings["training"], **training}}
        train_editor(options, resume=resume)
        return IBKEEditor.from_pretrained(tmp_path / name).state_dict()

    torch.manual_seed(0)
    first = trained("first", load_best_model_at_end=False)
    torch.manual_seed(1)
    trained("second", load_best_model_at_end=False, max_steps=2)
    resumed = trained("second", resume=True, load_best_model_at_end=False)
    other = trained("third", load_best_model_at_end=False, seed=7)
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(settings: Json) -> None:
    settings["training"]["max_steps"] = 2
    train_editor(settings)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run; resume it \(--resume\), replace it"):
        train_editor(settings)


@pytest.mark.parametrize("name", ["backbone", "records"])
def test_what_an_editor_is_made_of_is_not_overwritten(name: str, settings: Json, tmp_path: Path) -> None:
    source = tmp_path / "backbone" if name == "backbone" else tmp_path / "folder"
    source.mkdir(exist_ok=True)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    settings |= {"records": [str(source)] if name == "records" else settings["records"]}
    for force in (False, True):
        with pytest.raises(ValueError, match=r"holds .*, which the editor would replace; choose another --out"):
            train_editor({**settings, "out": f"{source}/../{source.name}"}, force=force)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_folder_with_something_else_is_refused(settings: Json, tmp_path: Path, tiny_model: Any) -> None:
    out = Path(settings["out"])
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    settings["training"] |= {"max_steps": 1, "learning_rate": 0.0}
    with pytest.raises(ValueError, match=r"editor: holds thesis\.tex; choose another --out, or .*\(--force\)"):
        train_editor(settings)
    train_editor(settings, force=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run"):
        train_editor(settings)
    train_editor(settings, force=True)
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: holds a model \(qwen3\), which the editor would replace"):
        train_editor({**settings, "out": str(tmp_path / "other")}, force=True)


def test_two_trainings_do_not_share_a_folder(settings: Json) -> None:
    program = f"""
import sys
from ibke_hf.training.recipe import train_editor
train_editor({settings!r})
"""
    with locked(settings["out"]):
        other = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
        )
    assert other.returncode == 1
    assert "another process is writing there" in other.stderr
    assert not (Path(settings["out"]) / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_names_the_line_that_resumes(
    number: int, settings: Json, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps({**settings, "training": {**settings["training"], "eval_steps": 10_000}}))
    command = ["train", "--config", str(file), "--max-steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ibke_hf.cli", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "'loss'" in line:
            process.send_signal(number)
            break
    said = "".join(seen) + process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (line,) = [line.strip() for line in said.splitlines() if line.strip().startswith("ibke train ")]
    assert line == f"ibke train --config {file} --max-steps 100000 --resume"
    checkpoint = last_complete_checkpoint(Path(settings["out"]) / "checkpoints")
    assert checkpoint is not None
    steps = int(checkpoint.rpartition("-")[2])
    assert main(["train", "--config", str(file), "--max-steps", str(steps + 1), "--resume"]) == 0
    assert IBKEEditor.from_pretrained(settings["out"]).is_calibrated


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((20.0, 20.0, 99.0), "not good yet: 20 of 100 target tokens"),
        ((99.0, 80.0, 30.0), "not good yet: its edits change 70 of 100 answers that should stay"),
        ((99.0, 12.0, 99.0), "not good yet: its edits are learnt by heart"),
        ((99.0, 80.0, 98.0), "good enough to try"),
        ((99.0, None, None), "good enough to try"),
    ],
)
def test_the_end_of_a_training_says_whether_the_editor_is_any_good(after: tuple[Any, ...], words: str) -> None:
    names = ("reliability", "generality", "locality")
    assert verdict(dict.fromkeys(names, 10.0), dict(zip(names, after, strict=True))).startswith(words)


def test_unusable_records_are_left_out_and_counted(settings: Json, tmp_path: Path, capsys: Any) -> None:
    file = Path(settings["records"][0])
    content = json.loads(file.read_text())
    content["0"]["edit"]["prompt"] = "The tower " * 100
    file.write_text(json.dumps(content))
    settings["training"] |= {"max_steps": 2, "per_device_train_batch_size": 4}
    (tmp_path / "s.yaml").write_text(json.dumps(settings))
    assert main(["train", "--config", str(tmp_path / "s.yaml")]) == 0
    assert "1 unusable records were left out" in capsys.readouterr().out


def test_without_validation_the_training_loss_is_returned(settings: Json) -> None:
    settings |= {"validation": None, "training": {**settings["training"], "max_steps": 1}}
    assert train_editor(settings).keys() == {"steps", "parameters", "train_loss", "records_left_out"}


def test_records_that_are_none_are_an_error(settings: Json, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no record in .*none\.json"):
        train_editor({**settings, "records": [str(tmp_path / "none.json")]})


def test_a_half_precision_backbone_gets_a_loss_scale(settings: Json) -> None:
    settings |= {"dtype": "float16", "training": {**settings["training"], "max_steps": 1}}
    train_editor(settings)
    assert IBKEEditor.from_pretrained(settings["out"]).config.capture_loss_scale == 1024.0


def test_the_command_line_trains(settings: Json, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        json.dumps({"training": settings["training"], "validation": settings["validation"][0]})
    )  # JSON is YAML
    command = [
        "train",
        "--config",
        str(file),
        "--backbone",
        settings["backbone"],
        "--records",
        *settings["records"],
        "--out",
        settings["out"],
        "--latent-dim",
        "8",
        "--max-steps",
        "2",
        "--layers",
        "1",
        "2",
    ]
    assert build_parser().parse_args(command).max_steps == 2
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "trained for 2 steps, loss " in said and "unrelated facts stay (locality)" in said
    assert "not good yet" in said and f"ibke eval --model {settings['backbone']} --editor {settings['out']}" in said
    for line in said.splitlines():  # the commands that it names are ones
        if line.startswith("  ibke "):
            build_parser().parse_args(shlex.split(line)[1:])
    assert main(command) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
