"""A library as one repository: packed, in one commit each, merged with what others push, and back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from routed_world import REQUESTS, routed_world
from saved_edits import make_edit

from ibke_hf.hub import library as hub_library
from ibke_hf.lifelong.index import LibraryError
from ibke_hf.lifelong.library import EditLibrary

ID = "org/facts"


@pytest.fixture
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    return routed_world(tiny_model("qwen3"), tiny_tokenizer)


def shards(hub: LoopbackHub) -> list[str]:
    return sorted(name for name in hub[ID].files() if name.startswith("shards/"))


def test_pushes_send_what_is_new_and_pulls_bring_it_back(
    hub: LoopbackHub, tmp_path: Path, world: SimpleNamespace
) -> None:
    here = EditLibrary(tmp_path / "here", world.router, world.tokenizer)
    first, second = here.add(*world.edits[:2], model=world.model)
    here.push(ID, metadata={"license": "cc0-1.0"})
    assert hub[ID].titles == ["initial commit", "Update the library"]
    assert set(hub[ID].files()) == {
        ".gitattributes",
        "README.md",
        "index.jsonl",
        "library.json",
        "router/config.json",
        "router/model.safetensors",
        *shards(hub),
    }
    assert len(shards(hub)) == 1
    card = ModelCard.load(ID)
    assert card.data.license == "cc0-1.0"
    assert "A library of 2 knowledge edits" in card.text and REQUESTS[1].prompt in card.text

    there = EditLibrary(tmp_path / "there", tokenizer=world.tokenizer)
    assert there.pull(ID) == [first, second] and there.pull(ID) == []
    assert [there.read(edit_id) for edit_id in (first, second)] == world.edits[:2]
    assert there.router is not None and all(entry.vectors is not None for entry in there)
    (third,) = there.add(world.edits[2], model=world.model)
    there.push(ID)
    assert len(shards(hub)) == 2 and len(hub[ID].titles) == 3

    here.remove(first)  # what others have pushed stays, what was taken out here goes
    here.push(ID)
    assert {entry.id for entry in EditLibrary(tmp_path / "new")} == set()
    new = EditLibrary(tmp_path / "new")
    assert set(new.pull(ID)) == {second, third}
    assert here.pull(ID) == [third] and first not in here


def test_a_shard_of_which_little_is_left_is_packed_anew(
    hub: LoopbackHub, tmp_path: Path, world: SimpleNamespace
) -> None:
    here = EditLibrary(tmp_path / "here")
    ids = here.add(*world.edits)
    here.push(ID)
    before = shards(hub)
    EditLibrary(tmp_path / "there").pull(ID)
    here.remove(*ids[:2])
    here.push(ID)
    assert len(shards(hub)) == 1 and shards(hub) != before
    assert EditLibrary(tmp_path / "again").pull(ID) == ids[2:]


def test_many_edits_are_few_files(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EditLibrary(tmp_path / "here")
    ids = here.add(make_edit(), make_edit().to(torch.float64))
    size = here.list()[0].nbytes
    monkeypatch.setattr(hub_library, "SHARD_BYTES", 10 * size)
    here.push(ID)
    assert len(shards(hub)) == 1
    assert set(EditLibrary(tmp_path / "there").pull(ID)) == set(ids)


def test_what_is_no_library_or_was_changed_is_refused(
    hub: LoopbackHub, tmp_path: Path, world: SimpleNamespace
) -> None:
    here = EditLibrary(tmp_path / "here")
    with pytest.raises(LibraryError, match="holds no edit to push"):
        here.push(ID)
    with pytest.raises(LibraryError, match="there is no such repository"):
        here.pull("org/nothing")
    make_edit().push_to_hub(ID)
    with pytest.raises(LibraryError, match="holds no library of edits"):
        here.pull(ID)
    here.add(world.edits[0])
    here.push("org/other")
    index = hub["org/other"].files()["index.jsonl"].decode()
    entry = here.list()[0].id
    hub["org/other"].commit(
        "main", {**hub["org/other"].files(), "index.jsonl": index.replace(entry, "0" * 64).encode()}, "x"
    )
    there = EditLibrary(tmp_path / "there")
    with pytest.raises(LibraryError, match="is not what its id says"):
        there.pull("org/other")
    assert len(there) == 0
