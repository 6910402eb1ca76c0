"""A library on disk: content-addressed, whole after a kill at any moment, open to several processes at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_edits import hits
from routed_world import REQUESTS, UNRELATED, prompt_vectors, routed_world
from saved_edits import make_edit

from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.layers import BackboneError
from ibke_hf.lifelong.index import INDEX, LibraryError
from ibke_hf.lifelong.library import EditLibrary
from ibke_hf.lifelong.router import digest_of

ADDER = """
import sys, torch
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.edit_values import EditInfo
from ibke_hf.core.records import EditRequest
from ibke_hf.lifelong.library import EditLibrary
library, seed = EditLibrary(sys.argv[1]), int(sys.argv[2])
for number in range(int(sys.argv[3])):
    generator = torch.Generator().manual_seed(1000 * seed + number)
    factors = ({"layer.0": torch.randn(1, 2, 8, generator=generator)} for _ in range(2))
    info = EditInfo(requests=(EditRequest(f"fact {seed} {number} is", "so"),))
    print(library.add(LowRankEdit(*factors, info))[0], flush=True)
"""


@pytest.fixture
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> SimpleNamespace:
    return routed_world(tiny_model("qwen3", eos_token_id=None), tiny_tokenizer)


def adder(folder: Path, seed: int, number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ADDER, str(folder), str(seed), str(number)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_an_edit_comes_back_bit_for_bit_and_is_there_once(tmp_path: Path, world: SimpleNamespace) -> None:
    library = EditLibrary(tmp_path / "library")
    ids = library.add(*world.edits)
    assert library.add(world.edits[0]) == ids[:1]
    assert [entry.id for entry in library.list()] == ids and len(library) == 3
    again = EditLibrary(tmp_path / "library")
    for edit_id, edit in zip(ids, world.edits, strict=True):
        stored = again.read(edit_id)
        assert stored == edit and stored.info == edit.info
        assert all(torch.equal(stored.keys[name], edit.keys[name]) for name in edit.keys)
    assert [entry.requests for entry in again] == [(request,) for request in REQUESTS]


def test_edits_of_each_low_rank_editor_are_taken_and_others_refused(tmp_path: Path, world: SimpleNamespace) -> None:
    library = EditLibrary(tmp_path)
    independent = world.editor.edit(world.model, world.tokenizer, REQUESTS, mode="independent")
    solved = world.editor.edit(world.model, world.tokenizer, REQUESTS, mode="sequential")
    assert len(library.add(independent)) == len(library.add(solved)) == 3
    assert len(library.add(make_edit())) == 1
    with pytest.raises(TypeError, match="holds low-rank edits, found dict"):
        library.add({})


def test_removing_exporting_and_naming_by_a_beginning(tmp_path: Path, world: SimpleNamespace) -> None:
    library = EditLibrary(tmp_path / "library")
    first, second, third = library.add(*world.edits)
    library.remove(second[:12])
    assert second not in library and [entry.id for entry in library] == [first, third]
    assert not library.file(second).exists()
    with pytest.raises(LibraryError, match="holds no such edit"):
        library.read(second)
    with pytest.raises(LibraryError, match="holds no such edit"):
        library.remove(first, "0" * 64)
    assert first in library
    library.export(tmp_path / "one", first)
    assert hits(world.model, world.tokenizer, LowRankEdit.from_pretrained(tmp_path / "one"), REQUESTS[:1]) == hits(
        world.model, world.tokenizer, world.edits[0], REQUESTS[:1]
    )
    library.export(tmp_path / "both")
    assert LowRankEdit.from_pretrained(tmp_path / "both").info.requests == (REQUESTS[0], REQUESTS[2])
    assert library.add(world.edits[1]) == [second] and len(library) == 3
    library.remove(*(entry.id for entry in library))
    with pytest.raises(LibraryError, match="holds no edit to export"):
        library.export(tmp_path / "none")


def test_a_kill_at_any_moment_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    rng, reported, folder = random.Random(0), [], tmp_path / "library"
    for seed in range(3):
        process = adder(folder, seed, 10_000)
        assert process.stdout is not None
        reported.append(process.stdout.readline().strip())  # it has begun
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        reported += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        library = EditLibrary(folder)
        assert set(reported) <= {entry.id for entry in library}
        assert library.check() == ["no router, which finds the edits of a prompt: ibke train-router"]
    assert len(reported) > 3


def test_every_prefix_of_the_index_is_readable_and_written_on(tmp_path: Path) -> None:
    library = EditLibrary(tmp_path)
    ids = library.add(make_edit())
    whole = (tmp_path / INDEX).read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / INDEX).write_bytes(whole[:length])
        cut = EditLibrary(tmp_path)
        assert [entry.id for entry in cut] == []
        assert cut.add(make_edit()) == ids
        assert [entry.id for entry in EditLibrary(tmp_path)] == ids


def test_two_processes_add_at_once(tmp_path: Path) -> None:
    processes = [adder(tmp_path, seed, 25) for seed in range(2)]
    reported = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    library = EditLibrary(tmp_path)
    assert len(reported) == 50 and {entry.id for entry in library} == set(reported)


def test_one_process_sees_what_another_object_writes(tmp_path: Path) -> None:
    one, two = EditLibrary(tmp_path), EditLibrary(tmp_path)
    ids = one.add(make_edit())
    assert [entry.id for entry in two] == ids
    two.remove(ids[0])
    assert one.list() == []
    (tmp_path / "edits" / "ab").mkdir(exist_ok=True)
    (tmp_path / "edits" / "ab" / f"{'ab' * 32}.safetensors").touch()  # of a process that was killed before the index
    assert one.compact() == 1
    assert two.list() == []


def test_an_attached_library_finds_the_edits_of_prompts(tmp_path: Path, world: SimpleNamespace) -> None:
    library = EditLibrary(tmp_path / "library", world.router, world.tokenizer)
    library.add(*world.edits)
    expected = [
        hits(world.model, world.tokenizer, edit, [request])[0]
        for edit, request in zip(world.edits, REQUESTS, strict=True)
    ]
    library._with_vectors = lambda model, entries: [  # type: ignore[method-assign]
        entry.with_vectors(
            digest_of(world.router),
            prompt_vectors(model, world.tokenizer, world.router, [r.prompt for r in entry.requests]),
        )
        for entry in entries
    ]
    with library.attached(world.model, threshold=0.99):
        assert hits_of(world) == expected
    again = EditLibrary(tmp_path / "library")  # router and vectors lie in the folder: nothing is read anew
    with again.attached(world.model, threshold=0.99):
        assert hits_of(world) == expected
    again.tokenizer = world.tokenizer
    (similarity, best), *_ = again.search(REQUESTS[1].prompt, world.model)
    assert best.requests == (REQUESTS[1],) and similarity > 0.99
    assert again.search(UNRELATED, world.model)[0][0] < 0.99
    assert again.check(world.model) == []


def hits_of(world: SimpleNamespace) -> list[bool]:
    plain: Any = SimpleNamespace(attached=nullcontext)
    return [hits(world.model, world.tokenizer, plain, [request])[0] for request in REQUESTS]


def test_what_is_wrong_is_said_with_its_cure(
    tmp_path: Path, world: SimpleNamespace, tiny_model: Callable[..., Any]
) -> None:
    library = EditLibrary(tmp_path / "library")
    ids = library.add(*world.edits)
    with pytest.raises(LibraryError, match=r"has no router.*ibke train-router"), library.attached(world.model):
        pass
    routed = EditLibrary(tmp_path / "library", world.router)
    with pytest.raises(LibraryError, match="backbone's tokenizer"), routed.attached(world.model):
        pass
    routed.tokenizer = world.tokenizer
    other = tiny_model("qwen3", seed=5)
    faults = routed.check(other)
    assert len(faults) == 3 and all("whose weights differ" in fault for fault in faults)
    with pytest.raises(BackboneError), routed.attached(tiny_model("gpt2")):
        pass
    file = routed.file(ids[0])
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert any("its file was changed" in fault for fault in routed.check())
    file.unlink()
    assert any(ids[0][:12] in fault for fault in routed.check())
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else.txt").touch()
    with pytest.raises(LibraryError, match="holds something else"):
        EditLibrary(tmp_path / "something")
    (tmp_path / "library" / "library.json").write_text(json.dumps({"format_version": 9}))
    with pytest.raises(LibraryError, match="format 9 is newer"):
        EditLibrary(tmp_path / "library")
    (tmp_path / "library" / "library.json").unlink()
    (tmp_path / "library" / INDEX).open("a").write('{"add": "../../x"}\n')
    with pytest.raises(LibraryError, match="is no digest"):
        EditLibrary(tmp_path / "library")


def test_an_edit_that_is_not_finite_is_not_added(tmp_path: Path) -> None:
    library, edit = EditLibrary(tmp_path), make_edit()
    name = next(iter(edit.inputs))
    edit.inputs[name][0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="nothing is added"):
        library.add(edit)
    assert library.list() == []


def test_ten_thousand_entries_open_fast(tmp_path: Path) -> None:
    library = EditLibrary(tmp_path)
    library.add(make_edit())
    entry = library.list()[0].with_vectors("router", torch.randn(1, 128))
    line = entry.line()
    lines = [json.dumps({**line, "add": f"{number:064x}"}) for number in range(10_000)]
    (tmp_path / INDEX).write_text("\n".join(lines) + "\n")
    started = time.process_time()
    assert len(EditLibrary(tmp_path)) == 10_000
    assert time.process_time() - started < 5
