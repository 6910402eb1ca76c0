"""Bad input on the command line: one line that names it, and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import PROMPT, TARGET, Run
from small_world import TWO_RELATIONS, write_world

from ibke_hf.cli import build_parser, main


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"--prompt": " "}, "ibke edit: request 0: the prompt is empty"),
        ({"--target": ""}, "ibke edit: request 0: the target is empty"),
        ({"--prompt": "word " * 200}, "tokens do not fit the model's context of 128"),
        ({"--model": "/no/such/folder"}, "ibke edit: /no/such/folder: no such folder"),
        ({"--model": "./nowhere"}, "ibke edit: ./nowhere: no such folder"),
        ({"--editor": "/no/such/folder"}, "ibke edit: /no/such/folder: no such folder"),
        ({"--model": "no/such"}, "ibke edit: no/such: cannot be loaded (it is no folder here; "),
        ({"--model": "a/b/c"}, "ibke edit: a/b/c: cannot be loaded ("),
        ({"--device": "quantum"}, "ibke edit: --device quantum: this machine cannot compute there"),
        ({"--device": "cuda:99"}, "ibke edit: --device cuda:99: this machine cannot compute there"),
        ({"--device": "meta"}, "ibke edit: --device meta: this machine cannot compute there"),
        ({"--rank": "2"}, "ibke edit: --rank says how to save the edit; give --out DIR as well"),
    ],
)
def test_a_wrong_option_of_edit_is_one_line(
    edit_arguments: list[str], refused: Run, change: dict[str, str], what: str
) -> None:
    arguments = {**dict(zip(edit_arguments[1::2], edit_arguments[2::2], strict=True)), **change}
    assert what in refused("edit", *(part for pair in arguments.items() for part in pair))


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--dtype", "float8", "argument --dtype: invalid choice: 'float8'"),
        ("--rank", "0", "argument --rank: a whole number of at least 1"),
        ("--rank", "two", "argument --rank: a whole number of at least 1 is wanted, found 'two'"),
    ],
)
def test_a_value_out_of_range_is_refused_when_parsed(
    edit_arguments: list[str], misused: Run, option: str, value: str, what: str
) -> None:
    assert what in misused(*edit_arguments, option, value)


def halve(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text)


def remove(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def configure(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("which", "damage", "what"),
    [
        ("model", halve("model.safetensors"), "SafetensorError: Error while deserializing header"),
        ("model", write("model.safetensors", "hello"), "SafetensorError: Error while deserializing header"),
        ("model", remove("model.safetensors"), "no file named model.safetensors"),
        ("model", remove("config.json"), "cannot be loaded (Unrecognized model"),
        ("model", write("config.json", "{"), "not a valid JSON file"),
        ("model", configure(model_type="nonesuch"), "model type `nonesuch`"),
        ("model", configure(hidden_size=64), "You set `ignore_mismatched_sizes`"),
        ("model", configure(hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
        ("model", configure(num_attention_heads=0), "cannot be loaded ("),
        ("model", halve("tokenizer.json"), "cannot be loaded ("),
        ("model", remove("tokenizer.json"), "cannot be loaded (Couldn't instantiate the backend tokenizer"),
        ("model", remove("tokenizer.json", "tokenizer_config.json"), "the tokenizer makes no token of"),
        ("editor", halve("model.safetensors"), "SafetensorError: Error while deserializing header"),
        ("editor", remove("model.safetensors"), "no file named model.safetensors"),
        ("editor", remove("config.json"), "cannot be loaded (Unrecognized model"),
        ("editor", configure(latent_dim=0), "latent_dim must be between 1 and 65536, found 0"),
        ("editor", configure(latent_dim=16), "its file of weights holds tensors of other shapes than the config says"),
        ("editor", configure(edited_layers=[0]), "name different numbers of layers"),
        (
            "editor",
            configure(edited_modules="model.blocks.{i}.mlp"),
            "has no linear layer named 'model.blocks.0.mlp'; its linear layers are",
        ),
        ("editor", configure(edited_layers=[7, 8, 9]), "it has model.layers.{i}.mlp.down_proj for i = 0, 1, 2, 3"),
    ],
)
def test_a_broken_folder_is_one_line_that_names_it(
    store: Path, tmp_path: Path, refused: Run, which: str, damage: Callable[[Path], None], what: str
) -> None:
    broken = Path(shutil.copytree(store / which, tmp_path / "broken"))
    damage(broken)
    folders = {"model": store / "model", "editor": store / "editor", which: broken}
    line = refused(
        "edit", "--prompt", PROMPT, "--target", TARGET, "--model", folders["model"], "--editor", folders["editor"]
    )
    assert what in line
    assert str(broken) in line or "cannot be loaded" not in what


def test_folders_given_in_each_others_place_are_refused(store: Path, refused: Run) -> None:
    line = refused(
        "edit", "--prompt", PROMPT, "--target", TARGET, "--model", store / "model", "--editor", store / "model"
    )
    assert "holds a Qwen3Model, not an editor; `ibke train` makes one" in line
    line = refused(
        "edit", "--prompt", PROMPT, "--target", TARGET, "--model", store / "editor", "--editor", store / "editor"
    )
    assert f"{store / 'editor'}: cannot be loaded (" in line


def test_merge_refuses_what_it_cannot_read_or_write(store: Path, tmp_path: Path, refused: Run) -> None:
    model, out = store / "model", tmp_path / "merged"
    assert "nowhere: no adapter_config.json" in refused(
        "merge", "--edit", tmp_path / "nowhere", "--model", model, "--out", out
    )
    assert not out.exists()
    broken = Path(shutil.copytree(store / "edit", tmp_path / "broken"))
    halve("adapter_model.safetensors")(broken)
    assert "not a complete safetensors file" in refused("merge", "--edit", broken, "--model", model, "--out", out)
    (tmp_path / "file").write_text("")
    assert "File exists" in refused("merge", "--edit", store / "edit", "--model", model, "--out", tmp_path / "file")


def test_an_edit_of_another_model_is_refused(
    store: Path, tmp_path: Path, refused: Run, tiny_model: Callable[..., Any]
) -> None:
    wide = tiny_model("qwen3", intermediate_size=56)
    wide.save_pretrained(tmp_path / "wide")
    shutil.copy(store / "model" / "tokenizer.json", tmp_path / "wide")
    line = refused("merge", "--edit", store / "edit", "--model", tmp_path / "wide", "--out", tmp_path / "out")
    assert "it was made for another backbone" in line


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [1", "not valid YAML"),
        ("a:\n\t- b", "not valid YAML"),
        ("- 1", "expected values by name"),
        ("hello", "expected values by name"),
        ("5", "expected values by name"),
        ("foo: 1", "unknown setting 'foo'"),
        ("", "missing setting: backbone, out"),
        ("editor: 5", "editor: must hold settings by name"),
        ("training: {foo: 1}", "unknown setting 'foo' under training"),
        ("editor: {foo: 1}", "unknown setting 'foo' under editor"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, what: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "settings.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ibke train: ")
    assert what in line


def test_train_refuses_paths_that_are_not_there(store: Path, tmp_path: Path, refused: Run) -> None:
    assert "settings.yaml" in refused("train", "--config", tmp_path / "settings.yaml")
    line = refused("train", "--backbone", store / "model", "--records", tmp_path / "none", "--out", tmp_path / "out")
    assert f"{tmp_path / 'none'}: no record file here" in line


def test_a_missing_extra_is_named(store: Path, tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = refused("train", "--backbone", store / "model", "--records", tmp_path, "--out", tmp_path / "out")
    assert line == 'ibke train: training needs the extra "train": pip install "ibke-hf[train]"'


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("beta", "'beta' needs a JSON value"),
        ("beta=", "needs a JSON value"),
        ("beta=True", "found 'True'"),
        ("lr_scheduler_type=cosine", "such as 0.1, true or '\"cosine\"', found 'cosine'"),
        ("=1", "NAME=VALUE is wanted"),
        ("model.beta=1", "NAME=VALUE is wanted"),
        ("be ta=1", "NAME=VALUE is wanted"),
    ],
)
def test_a_setting_that_cannot_be_read_is_explained(misused: Run, setting: str, what: str) -> None:
    message = misused("atlas", "train-editor", "--set", setting)
    assert "error: argument --set: " in message
    assert what in message


def test_settings_are_read_as_json() -> None:
    options = build_parser().parse_args(
        ["atlas", "train-mend", "--set", "beta=0.2", "editor.layers=[1, 2]", 'lr_scheduler_type="cosine"', "bf16=true"]
    )
    assert options.set == [
        ("training", "beta", 0.2),
        ("editor", "layers", [1, 2]),
        ("training", "lr_scheduler_type", "cosine"),
        ("training", "bf16", True),
    ]


@pytest.mark.parametrize("setting", ["batch=2", "seed=1", "eval_steps=5", "editor.width=3"])
def test_a_setting_of_no_field_is_refused_before_training(refused: Run, tmp_path: Path, setting: str) -> None:
    line = refused("atlas", "train-editor", "--out", tmp_path, "--set", setting)
    assert line.startswith(
        f"ibke atlas train-editor: --set {setting.partition('=')[0].rpartition('.')[2]}: no such field"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["atlas", "train-editor", "--max-steps", "0"],
        ["atlas", "build-backbone", "--epochs", "-1"],
        ["train", "--batch-size", "0"],
        ["data", "build", "--facts", "a", "--out", "b", "--records", "0"],
        ["data", "build", "--facts", "a", "--out", "b", "--locality", "0"],
    ],
)
def test_numbers_below_one_are_refused(misused: Run, arguments: list[str]) -> None:
    assert "a whole number of at least 1 is wanted" in misused(*arguments)


def test_data_build_refuses_what_it_cannot_use(tmp_path: Path, refused: Run) -> None:
    facts = write_world(tmp_path / "facts", TWO_RELATIONS)
    assert "validation must be in [0, 1), found 2.0" in refused(
        "data", "build", "--facts", facts, "--out", tmp_path, "--validation", "2"
    )
    (tmp_path / "file").write_text("")
    assert "file" in refused("data", "build", "--facts", facts, "--out", tmp_path / "file", "--records", "8")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("ibke_hf.data.folders.build_folder", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["data", "build", "--facts", str(tmp_path), "--out", str(tmp_path)])


def test_an_interruption_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ibke_hf.data.folders.build_folder", interrupted)
    assert main(["data", "build", "--facts", str(tmp_path), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ibke: interrupted\n"
