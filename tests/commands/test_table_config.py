"""`ibke table --config`: what a YAML file sets is checked before anything is loaded, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import Run
from fuzzing import commands_of

from ibke_hf.cli import build_parser


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: three", "layers must be of type list[int] | None, found 'three'"),
        ("corpus: 3", "corpus must be of type str | None, found 3"),
        ("training: {seed: one}", "training: seed must be of type int, found 'one'"),
        ("training: {beta: [1]}", "training: beta must be of type float, found [1]"),
        ("training: {speed: 1}", "unknown setting 'speed' under training:; settings are "),
        ("training: {learning_rate: .inf}", "training: learning_rate must be a finite number, found inf"),
        ("training: 3", "training: must hold settings by name, found 3"),
        ("editors: [ft]", "editors: must hold settings by name, found ['ft']"),
        ("editors: {evil: {}}", "there is no editor 'evil'"),
        ("editors: {ft: 3}", "editors: ft: must hold fields by name, found '3'"),
        ("editors: {none: {steps: 1}}", "editors: none: the unedited model has no fields"),
        ("editors: {ft: {steps: many}}", "editors: ft: steps must be of type int, found 'many'"),
        ("editors: {ft: {steps: 0}}", "editors: ft: steps must be between 1 and"),
        ("editors: {ft: {learning_rate: .nan}}", "editors: ft: learning_rate must be a finite number, found nan"),
        ("editors: {ft: {speed: 1}}", "unknown setting 'speed' under editors: ft:"),
        ("editors: {ft: {edited_modules: x}}", "unknown setting 'edited_modules' under editors: ft:"),
        ("editors: {ft: {layers: 1}}", "editors: ft: layers must be of type list[int], found 1"),
        ("editors: {rome: {prefix_tokens: [1]}}", "editors: rome: prefix_tokens must be of type tuple"),
        ("editors: {grace: {steps: 1.5}}", "editors: grace: steps must be of type int, found 1.5"),
        ("editors: {mend: {hidden_dim: wide}}", "editors: mend: hidden_dim must be of type int, found 'wide'"),
        ("editors: {ibke_paper: {latent_dim: 0}}", "editors: ibke_paper: "),
        ("editors: {ft: {steps: 1}, ft: {steps: 2}}", "'ft' comes twice"),
    ],
)
def test_a_bad_value_is_one_line(text: str, message: str, refused: Run, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    names = ["--backbone", tmp_path / "nowhere", "--datasets", "none.json", "--out", tmp_path / "out"]
    line = refused("table", *names, "--config", config)
    assert line.startswith(f"ibke table: {config}: ")
    assert message in line


@pytest.mark.parametrize(
    ("command", "option", "good", "bad"),
    [
        ("app", "--port", ["1", "65535"], ["0", "65536", "70000", "-1", "x", "1.5"]),
        ("eval", "--seed", ["0", "4294967295"], ["-1", "4294967296", "x", "1e3"]),
        ("train", "--seed", ["0", "4294967295"], ["-1", "4294967296", "x"]),
        ("train", "--learning-rate", ["1e-4", "1"], ["0", "-1", "nan", "inf", "1e400", "x"]),
    ],
)
def test_bounds_of_numbers(command: str, option: str, good: list[str], bad: list[str], misused: Run) -> None:
    parser = dict(commands_of(build_parser()))[command,]
    action = next(action for action in parser._actions if option in action.option_strings)
    assert callable(action.type)
    for text in good:
        assert action.type(text) == float(text)
    for text in bad:
        assert f"argument {option}: " in misused(command, option, text)
