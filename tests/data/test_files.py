"""Record files read item by item: the same as json.loads, in bounded memory, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.data import files
from ibke_hf.data.fields import RecordError
from ibke_hf.data.files import json_items, record_files, stem

VALUES: list[Any] = [
    {"a": [1, 2.5e-3, None, True], "ü😀": 'tab\t \\ " \u2028 \x00'},
    [],
    {},
    "",
    -12345678901234567890,
    0.1,
    1e300,
    "x" * 70,
    [[["deep"]]],
    False,
    {"k": {"k": {"k": '{"[,]:'}}},
]


def write(file: Path, text: str) -> Path:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 18])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("style", [{}, {"indent": 4}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_items_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, suffix: str, style: Any
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    keyed = {f'key " {i}': value for i, value in enumerate(VALUES)}
    for content in (keyed, VALUES, {}, [], {"": 1}):
        file = write(tmp_path / f"some name{suffix}", "\n " + json.dumps(content, **style) + " \r\n")
        expected = list(content.items() if isinstance(content, dict) else enumerate(content))
        assert list(json_items(file)) == expected


@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, suffix: str) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    file = write(tmp_path / f"a{suffix}", "\n".join(map(json.dumps, VALUES)) + "\n\n")
    assert list(json_items(file, "list")) == list(enumerate(VALUES))
    assert list(json_items(write(tmp_path / f"b{suffix}", ""))) == []


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    assert list(json_items(write(tmp_path / "a.json", '\ufeff{"a": 1}'))) == [("a", 1)]


@pytest.mark.parametrize("chunk", [1, 4, 1 << 18])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expecting {: line 1 column 1"),
        ("3", "expecting {: line 1 column 1"),
        ('{"a": 1', "expecting , or }: line 1 column 8"),
        ('{"a": 1,}', "expecting a key in double quotes: line 1 column 9"),
        ('{"a" 1}', "expecting :: line 1 column 6"),
        ('{"a": 1}\n\n x', "extra data: line 3 column 2"),
        ("[1 2]", "expecting , or ]: line 1 column 4"),
        ("[1,\n 2,\n  ]", "Expecting value: line 3 column 3"),
        ("[tru]", "Expecting value: line 1 column 2"),
        ('["a\n"]', "Invalid control character at: line 1 column 4"),
        ('["abc', "Unterminated string starting at: line 1 column 2"),
        ('[\n{"a": {"b": }}]', "Expecting value: line 2 column 13"),
    ],
)
def test_broken_json_is_named_by_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str, what: str
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    file = write(tmp_path / "a.json", text)
    with pytest.raises(RecordError) as caught:
        list(json_items(file))
    assert str(caught.value) == f"{file}: not valid JSON ({what})"


def test_items_before_the_break_are_yielded(tmp_path: Path) -> None:
    items = json_items(write(tmp_path / "a.json", '[{"a": 1}, {"b": oops}]'))
    assert next(items) == (0, {"a": 1})
    with pytest.raises(RecordError, match="Expecting value: line 1 column 18"):
        next(items)


def test_json_nested_too_deeply_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"a.json: not valid JSON \(nested too deeply"):
        list(json_items(write(tmp_path / "a.json", "[" + "[" * 200_000 + "]" * 200_000 + "]")))


def test_names(tmp_path: Path) -> None:
    for name in ("b.json", "a b.json.gz", "c.jsonl", "d.jsonl.gz", "e.txt", "f.json.part"):
        (tmp_path / name).touch()
    assert [file.name for file in record_files(tmp_path)] == ["a b.json.gz", "b.json", "c.jsonl", "d.jsonl.gz"]
    assert stem("folder.d/civil engineering.v2.json.gz") == "civil engineering"


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    rng = random.Random(0)
    file = write(tmp_path / "a.json", json.dumps([{"text": rng.randbytes(2000).hex()} for _ in range(3000)]))
    assert file.stat().st_size > 12e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_items(file)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
