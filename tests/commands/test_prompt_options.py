"""How prompts are put to a model: `--chat`, `--chat-options` and `--leading-space`, read alike everywhere."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from ibke_hf.cli import main
from ibke_hf.commands.prompt_options import prompt_changes, prompt_options
from ibke_hf.training.settings import TrainingSettings


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prompt_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("text", ['{"enable_thinking": false}', "enable_thinking=false"])
def test_options_of_a_template_are_json_or_pairs(text: str) -> None:
    changes = {"chat": True, "chat_options": {"enable_thinking": False}}
    assert prompt_changes(parsed("--chat", "--chat-options", text)) == changes
    assert prompt_changes(parsed("--leading-space", "never")) == {"leading_space": "never"}
    assert prompt_changes(parsed()) == {}


@pytest.mark.parametrize("text", ["{", "[1]", "thinking", "=1", "[" * 100_000])
def test_options_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        parsed("--chat", "--chat-options", text)


def test_a_template_is_needed() -> None:
    with pytest.raises(ValueError, match="give --chat as well"):
        prompt_changes(parsed("--chat-options", "a=1"))
    with pytest.raises(ValueError, match="has no chat template"):
        prompt_changes(parsed("--chat"), SimpleNamespace(chat_template=None))


def test_settings_of_a_training_take_them() -> None:
    needed: dict[str, Any] = {"backbone": "b", "records": ["r"], "out": "o"}
    settings = TrainingSettings.of({**needed, "chat": True, "chat_options": {"a": 1}, "leading_space": "auto"})
    assert settings.prompt_changes() == {"chat": True, "chat_options": {"a": 1}, "leading_space": "auto"}
    assert TrainingSettings.of(needed).prompt_changes() == {}
    with pytest.raises(ValueError, match="leading_space must be one of auto"):
        TrainingSettings.of({**needed, "leading_space": "sometimes"})


@pytest.mark.parametrize("command", ["edit", "eval", "train", "table"])
def test_every_command_that_asks_has_them(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--chat", "--chat-options", "--leading-space"))
    assert ("--free" in shown) == (command in ("eval", "table"))
