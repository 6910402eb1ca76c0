"""What the tests of commands share: a folder of a tiny model and editor, documented calls, refused calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from ibke_hf.cli import main
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import encode_requests

PROMPT, TARGET = "The capital of France is", "Rome"


Run = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A saved model, an editor for it, and an edit."""
    root = tmp_path_factory.mktemp("store")
    model = tiny_model("qwen3")
    model.save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, latent_dim=8, latent_length=2)
    editor.calibrate(
        model, [encode_requests(tiny_tokenizer, [EditRequest(PROMPT, TARGET), EditRequest("An oak is a", "tree")])]
    )
    editor.save_pretrained(root / "editor")
    editor.edit(model, tiny_tokenizer, [EditRequest(PROMPT, TARGET)]).save_pretrained(root / "edit")
    return root


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that fails; return the line on stderr."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert printed.out == ""
        assert line.startswith("ibke ")
        assert len(line) < 700
        return line

    return run


@pytest.fixture
def edit_arguments(store: Path) -> list[str]:
    return [
        "edit",
        "--prompt",
        PROMPT,
        "--target",
        TARGET,
        "--model",
        str(store / "model"),
        "--editor",
        str(store / "editor"),
    ]


@pytest.fixture
def misused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with wrong options; return what stands on stderr."""

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run


def documented() -> list[str]:
    files = [ROOT / "README.md", *sorted((ROOT / "model_cards").rglob("*.md"))]
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        part.strip() for line in lines for part in line.split("&&") if re.match(r"(\.venv/bin/)?ibke ", part.strip())
    ]
