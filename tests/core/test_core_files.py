"""Files are written whole or not at all, and what is read is checked; the name of the file stands in every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibke_hf import io
from ibke_hf.core import files
from ibke_hf.core.files import FileError, read_json, written_file, written_together


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(RuntimeError), written_file(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with written_file(file) as temporary:
        temporary.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_files_of_a_folder_are_replaced_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), written_together(tmp_path) as scratch:
        (scratch / "a").write_text("new")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with written_together(tmp_path) as scratch:
        (scratch / "a").write_text("new")
        (scratch / "b").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_written_for_the_owner_alone_gets_the_mode_of_any_new_file(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with written_together(tmp_path) as scratch:
        (scratch / "a").touch(mode=0o600)  # as safetensors writes
        (scratch / "inner").mkdir()
    assert (tmp_path / "a").stat().st_mode == usual.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "inner", "usual"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff{}", "not a text in UTF-8 .* at byte 0"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": [{"b\\ud800": 1}]}', "half of a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileError, match=rf"a\.json: .*{message}.*; mend it"):
        read_json(tmp_path / "a.json", cure="mend it")
    (tmp_path / "a.json").write_text('{"face": "\\ud83d\\ude00 \\\\ud800"}')  # a pair, and a backslash
    assert read_json(tmp_path / "a.json") == {"face": "\U0001f600 \\ud800"}


def test_there_is_one_writer_and_one_reader() -> None:
    assert (io.written_file, io.read_json, io.FileError) == (files.written_file, files.read_json, files.FileError)
