"""The `ibke` command: help, documented calls, edit and merge end to end."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import PROMPT, TARGET, Run, documented
from paths import ROOT
from transformers import AutoModelForCausalLM

from ibke_hf.app.knowledge import questions_around
from ibke_hf.cli import build_parser, main
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.records import EditRequest
from ibke_hf.editors.saved import load_weight_edit
from ibke_hf.evaluation.inspection import answer

# --- help and documentation -----------------------------------------------------------------------------------------


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, (*path, name))


@pytest.mark.parametrize("path", list(commands(build_parser())), ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*path, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(" ".join(("usage: ibke", *path)))
    assert printed.err == ""


def test_commands_of_the_documentation_are_found() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not beside the tests")
    assert {command.split()[1] for command in documented()} >= {"demo", "edit", "merge", "train", "data", "atlas"}


@pytest.mark.parametrize("command", documented())
def test_every_documented_command_parses(command: str) -> None:
    assert callable(build_parser().parse_args(shlex.split(command, comments=True)[1:]).run)


def test_a_command_that_is_none_is_refused(misused: Run) -> None:
    assert "invalid choice: 'teach'" in misused("teach")
    assert "the following arguments are required: command" in misused()
    assert "the following arguments are required: action" in misused("data")
    assert "the following arguments are required: --out" in misused("merge", "--edit", "x")
    assert "argument --prompt: a value is wanted, found '--'" in misused("edit", "--prompt=--", "--target", "x")


def test_parsing_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ibke_hf.cli import build_parser; build_parser(); sys.exit(bool({'torch', "
        "'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_the_process_exits_with_2_and_without_a_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ibke_hf.cli",
        "data",
        "build",
        "--facts",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ibke data build: {tmp_path / 'none'}: no relations.tsv")
    assert done.stderr.count("\n") == 1


# --- edit and merge -------------------------------------------------------------------------------------------------


def test_edit_shows_before_and_after_and_saves(
    store: Path, edit_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any
) -> None:
    assert (
        main(
            [*edit_arguments, "--out", str(tmp_path / "edit"), "--rank", "2", "--subject", "France", "--device", "cpu"]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == f"{PROMPT} -> {TARGET}"
    assert lines[2].split() == ["asked", "before", "after"]
    assert lines[3].startswith("request")
    assert lines[-1].startswith(f"saved to {tmp_path / 'edit'}")
    edit = LowRankEdit.from_pretrained(tmp_path / "edit")
    assert set(edit.ranks.values()) == {2}
    assert edit.info.requests == (EditRequest(PROMPT, TARGET, "France"),)
    model = AutoModelForCausalLM.from_pretrained(store / "model").eval()
    (first, *_) = answer(model, tiny_tokenizer, PROMPT).split()
    assert first in printed.out


def test_edit_asks_around_the_request(edit_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(edit_arguments) == 0
    roles = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:] if line[:1].strip()]
    assert roles == ["request", "rephrasing", "neighbour", "neighbour"]
    asked = ["--rephrasing", "France has the capital", "--neighbour", "An oak is a"]
    assert main([*edit_arguments, *asked]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[3:] if line[:1].strip()] == [
        "request",
        "rephrasing",
        "neighbour",
    ]
    assert "France has the capital" in printed and "An oak is a" in printed


def test_neighbours_are_asked_in_the_same_words_where_the_world_is_known() -> None:
    rephrasing, neighbours = questions_around("The capital of Estonia is", atlas=True)
    assert rephrasing == "What is the capital of Estonia?"
    assert all(re.fullmatch("The capital of .+ is", text) and "Estonia" not in text for text in neighbours)
    _, neighbours = questions_around("The capital of Australia is", atlas=False)
    assert len(neighbours) == 2 and neighbours[0].startswith("The capital of")


def test_edit_saves_nothing_unless_asked(edit_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*edit_arguments, "--dtype", "bfloat16"]) == 0
    assert "saved" not in capsys.readouterr().out


def test_an_editor_made_for_the_model_edits_the_projections_that_are_named(
    store: Path, tmp_path: Path, refused: Run
) -> None:
    asked = ["edit", "--prompt", PROMPT, "--target", TARGET, "--model", str(store / "model")]
    template = "model.layers.{i}.self_attn.o_proj"
    assert main([*asked, "--editor", "ft", "--edited-modules", template, "--out", str(tmp_path / "edit")]) == 0
    layers = load_weight_edit(tmp_path / "edit").layers
    assert layers and all(name.endswith("self_attn.o_proj") for name in layers)
    assert "no linear layer named 'none.0.x'" in refused(*asked, "--editor", "ft", "--edited-modules", "none.{i}.x")
    assert "edited_modules must contain {i}" in refused(*asked, "--editor", "ft", "--edited-modules", "mlp")
    line = refused(*asked, "--editor", store / "editor", "--edited-modules", template)
    assert "has no choice of projections any more; leave it out, or give --editor" in line


def test_merge_writes_a_full_model_that_carries_the_edit(store: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    out = tmp_path / "deep" / "merged"
    assert main(["merge", "--edit", str(store / "edit"), "--model", str(store / "model"), "--out", str(out)]) == 0
    merged, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, store / "model"))
    batch = tiny_tokenizer([PROMPT], return_tensors="pt")
    with torch.no_grad():
        expected = merged(**batch).logits
        assert not torch.allclose(plain(**batch).logits, expected, atol=1e-4)
        with LowRankEdit.from_pretrained(store / "edit").attached(plain):
            torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert (out / "tokenizer.json").exists()
    modes = {file.stat().st_mode for file in (*out.iterdir(), *(store / "edit").iterdir())}
    assert len(modes) == 1  # whoever may read the config may read the weights


def test_a_merge_that_is_cut_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Any, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", cut)
    out = tmp_path / "merged"
    assert main(["merge", "--edit", str(store / "edit"), "--model", str(store / "model"), "--out", str(out)]) == 130
    assert not list(out.iterdir())
