"""`ibke library`: add, list, search, ask, export, push, pull, check and remove, and `ibke train-router`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import PROMPT, TARGET, Run
from loopback_hub import LoopbackHub
from record_files import CITIES, write_records

from ibke_hf import EditRequest
from ibke_hf.cli import main
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.lifelong.library import EditLibrary
from ibke_hf.lifelong.router import Router


@pytest.fixture
def router(store: Path, tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    layers = IBKEEditor.from_pretrained(store / "editor").config.module_names()
    torch.manual_seed(0)
    Router.for_backbone(tiny_model("qwen3"), layers, width=8, heads=2, dim=8, threshold=-1.0).save_pretrained(
        tmp_path / "a-router"
    )
    return tmp_path / "a-router"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: Any) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_a_library_from_its_first_edit_to_the_hub_and_back(
    store: Path, tmp_path: Path, router: Path, said: Run, refused: Run, hub: LoopbackHub
) -> None:
    folder, model = tmp_path / "facts", ("--model", store / "model")
    with_editor = (*model, "--editor", store / "editor", "--router", router)
    out = said("library", "add", folder, "--prompt", PROMPT, "--target", TARGET, *with_editor)
    (entry,) = EditLibrary(folder).list()
    assert out == f"added edit {entry.id[:12]}; 1 in {folder}\n"
    said("library", "add", folder, "--edit", store / "edit")
    assert len(EditLibrary(folder)) == 2
    assert all(part in said("library", "list", folder) for part in (entry.id[:12], PROMPT, TARGET))
    assert "and 1 more" in said("library", "list", folder, "--limit", 1)
    assert entry.id[:12] in said("library", "search", folder, "france rome", "--words")
    assert "a prompt carries edits nearer than -1.00" in said("library", "search", folder, PROMPT, *model)
    answers = said("library", "ask", folder, PROMPT, *model)
    assert answers.split()[:4] == ["asked", "before", "after", "edits"] and entry.id[:12] in answers
    checked = said("library", "serve-check", folder, *model)
    assert "edits: 2" in checked and "% of a forward pass" in checked and "memory of a row" in checked
    said("library", "export", folder, entry.id[:8], "--out", tmp_path / "adapter")
    assert LowRankEdit.from_pretrained(tmp_path / "adapter").info.requests == entry.requests
    assert "holds an edit" in refused("library", "export", folder, "--out", tmp_path / "adapter")

    assert "library: " in said("library", "push", folder, "org/facts")
    assert said("library", "pull", tmp_path / "copy", "org/facts") == f"2 new edits; 2 in {tmp_path / 'copy'}\n"
    said("library", "remove", folder, entry.id[:8])
    assert entry.id not in EditLibrary(folder)
    assert "holds no such edit" in refused("library", "remove", folder, entry.id)


def test_edits_that_are_at_odds_are_named_when_one_is_added(
    store: Path, tmp_path: Path, router: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "facts"
    model = ["--model", str(store / "model"), "--editor", str(store / "editor"), "--router", str(router)]

    def warned(prompt: str, target: str) -> str:
        assert main(["library", "add", str(folder), "--prompt", prompt, "--target", target, *model]) == 0
        return next((line for line in capsys.readouterr().err.splitlines() if "at odds" in line), "")

    assert not warned("An oak is", "a tree") and not warned(PROMPT, TARGET)
    line = warned(PROMPT.upper(), "Nowhere")
    ids = [entry.id[:12] for entry in EditLibrary(folder).list()]
    assert f"edit {ids[2]} ({PROMPT.upper()!r} -> 'Nowhere') overrides one of the same prompt, edit {ids[1]}" in line
    library = EditLibrary(folder)
    assert [(one.first, one.second) for one in library.conflicts(ids[1])] == [(1, 2)]
    assert library.conflicts(ids[0]) == []


def test_keys_tell_conflicts_of_a_library_that_requests_do_not(
    store: Path, tmp_path: Path, router: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    editor, model = IBKEEditor.from_pretrained(store / "editor"), tiny_model("qwen3")
    library = EditLibrary(tmp_path / "facts", Router.from_pretrained(router).eval(), tiny_tokenizer)
    requests = [
        EditRequest("An oak is", "a tree"),
        EditRequest("An oak is", "a bird"),
        EditRequest("Iron is", "a metal"),
    ]
    edits = list(editor.edit(model, tiny_tokenizer, requests, mode="independent", composition="solve"))
    edits[1] = replace(edits[1], info=replace(edits[1].info, requests=(EditRequest("Oaks are", "a bird"),)))
    ids = library.add(*edits, model=model)
    (conflict,) = library.conflicts(ids[1])
    assert (conflict.kind, conflict.first, conflict.second) == ("same keys", 0, 1)


def test_what_is_wrong_is_said_in_a_line(store: Path, tmp_path: Path, said: Run, refused: Run) -> None:
    folder, model = tmp_path / "facts", ("--model", store / "model")
    for action in (("list", folder), ("search", folder, "x"), ("ask", folder, "x"), ("push", folder, "a/b")):
        assert "no library; make one: ibke library add" in refused("library", *action)
    assert "give one of --prompt" in refused("library", "add", folder)
    assert "belong together" in refused("library", "add", folder, "--prompt", PROMPT)
    assert "has no router that finds them" in refused(
        "library", "add", folder, "--prompt", PROMPT, "--target", TARGET, *model, "--editor", store / "editor"
    )
    assert "has no router" in refused("library", "ask", folder, PROMPT, *model)
    file = next((folder / "edits").glob("*/*.safetensors"))
    file.write_bytes(b"x")
    assert "its file was changed; pull or add it again; and 1 more" in refused(
        "library", "serve-check", folder, *model
    )
    assert "give one of --editor and --layers" in refused(
        "train-router", "--records", "x", "--validation", "x", "--out", tmp_path / "router"
    )


def test_a_router_is_trained_from_records(store: Path, tmp_path: Path, said: Run) -> None:
    records = write_records(tmp_path / "records.json", CITIES)
    arguments = ["--records", records, "--validation", records, "--max-steps", 2, "--batch-size", 4]
    out = said(
        "train-router", "--editor", store / "editor", "--model", store / "model", *arguments, "--out", tmp_path / "r"
    )
    assert "of " in out and "validation records found: request" in out
    assert Router.from_pretrained(tmp_path / "r").config.lowest.endswith("down_proj")
