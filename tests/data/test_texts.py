"""Texts of files and of folders that `datasets` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibke_hf.data.texts import read_texts


def test_texts_of_files(tmp_path: Path) -> None:
    plain, lines, wrong = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("one\n\n two \nthree\n", encoding="utf-8")
    lines.write_text('{"text": "one"}\n{"text": "zwei"}\n', encoding="utf-8")
    wrong.write_text('{"txt": "one"}\n', encoding="utf-8")
    assert read_texts(plain) == ["one", "two", "three"]
    assert read_texts(plain, 2) == ["one", "two"]
    assert read_texts(lines) == ["one", "zwei"]
    with pytest.raises(ValueError, match="'text'"):
        read_texts(wrong)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_texts("nothing.txt")


def test_texts_of_a_folder_that_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert read_texts(tmp_path / "corpus") == ["one", "two"]
