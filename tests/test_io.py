"""Files as they are read, written and owned."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ibke_hf.io import FileError, locked, parse_json, read_json_list, read_yaml

OWNER = """
import sys
from ibke_hf.io import locked
with locked(sys.argv[1]):
    print("owned", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_owns_is_refused_at_once_and_free_when_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "owned\n"
    with pytest.raises(FileError, match=f"{folder}: another process is writing there"), locked(folder):
        pass
    owner.kill()
    owner.communicate()
    with locked(folder) as free:
        assert free == folder


def test_the_owner_may_ask_again_and_another_thread_may_not(tmp_path: Path) -> None:
    refused = []

    def ask() -> None:
        try:
            with locked(tmp_path):
                pass
        except FileError as error:
            refused.append(error)

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        for _ in range(2):  # the inner block has not given the folder away
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
    assert len(refused) == 2
    ask()
    assert len(refused) == 2


def test_two_owners_of_two_files_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path, lock=".a.lock"), locked(tmp_path, lock=".b.lock"):
        pass


def test_a_folder_that_nothing_was_written_to_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new" / "folder"), locked(tmp_path / "new" / "folder"):
        raise ZeroDivisionError
    assert not (tmp_path / "new" / "folder").exists()
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a", "expected values by name, found list; correct it"),
        (b"a: [", "not valid YAML .*correct it"),
        (b"a: 1\na: 2", "'a' comes twice.*line 2"),
        (b"a: {b: 1, b: 2}", "'b' comes twice"),
        (b"\xff", "not a text in UTF-8 .*save it in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"a: 2020-01-01", "2020-01-01 is a date; put it in quotes"),
        (b"a: 2020-99-99", "cannot be read .*month"),
        (b"a: !!bool x", "cannot be read"),
        (b"a: " + b"9" * 5000, "cannot be read"),
        (b"yes: 1", "True is no name; put it in quotes"),
        (b'a: "\\ud800"', "half of a surrogate pair"),
        (b"a: &a [*a]", "more than 100,000 values, or an alias of itself"),
        (b"a: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_of_plain_values_is_named_with_the_cure(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(FileError, match=rf"settings\.yaml: .*{message}") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)


def test_yaml_holds_plain_values_by_name_and_may_repeat_them_by_aliases(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: [1.5, null, true, text]}")
    assert read_yaml(file) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": [1.5, None, True, "text"]}}
    file.write_text("")
    assert read_yaml(file) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "expected a JSON array, found dict"), ("[", "not valid JSON"), ("[" * 100_000, "nested too deeply")],
)
def test_what_is_no_json_array_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(text)
    with pytest.raises(FileError, match=rf"facts\.json: .*{message}.*; write it again"):
        read_json_list(file, cure="write it again")


def test_half_of_a_character_in_json_is_refused() -> None:
    assert parse_json('"\\ud83d\\ude00"', name="it") == "\U0001f600"
    with pytest.raises(FileError, match=r"it: .*half of a surrogate pair"):
        parse_json('["\\ud800"]', name="it")
