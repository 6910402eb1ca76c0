"""Damaged record files of every format, seeded: each is read or refused by name, none ends in a traceback or hangs."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED

from ibke_hf.data.fields import RecordError
from ibke_hf.data.sources import FORMATS, read_records

SEED, INPUTS, SECONDS = 11, 60, 60
FILES = {
    "uniedit": "uniedit/SYNTHETIC_schema_example.json",
    "mquake": "mquake/mquake_cf_3k_200.json",
    "counterfact": "counterfact/rome_native_200.json",
    "flat counterfact": "counterfact/easyedit_flat_500.json",
    "zsre": "zsre/zsre_mend_train_500.json",
    "knowedit": "knowedit/wiki_recent_train.json",
    "qaedit": "qaedit/qaedit_700.json",
}
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**30,
    float("nan"),
    "",
    " ",
    "\ud83d",
    "\x00",
    "{}{}",
    "中" * 500,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [["x", "y"]],
)
DEEP = "[" * 100_000 + "]" * 100_000


def real(name: str, number: int = 2) -> Any:
    file = SHARED / "data" / FILES[name]
    if not file.exists():
        pytest.skip(f"the sample of real records is not beside this checkout: {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # one record a line
        content = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:number]]
    return dict(list(content.items())[:number]) if isinstance(content, dict) else content[:number]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value but its root."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def change_one(content: Any, rng: random.Random) -> None:
    """Replace, remove or repeat one value."""
    *way, last = rng.choice(list(places(content)))
    parent = content
    for key in way:
        parent = parent[key]
    kind = rng.random()
    if kind < 0.6:
        parent[last] = rng.choice(ODD)
    elif kind < 0.8:
        del parent[last]
    elif isinstance(parent, dict):
        parent[f"{last}x"] = parent[last]
    else:
        parent.append(parent[last])


def damage_text(data: bytearray, rng: random.Random) -> None:
    """Cut the text of a file, or put something into it that is none."""
    kind, at = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        data[at:at] = DEEP.encode()
    else:
        data[at:at] = rng.choice((b"\xff\xfe", b'"\\ud800"', b"1" * 5000, b"NaN", b"\x00"))


def damaged(content: Any, rng: random.Random) -> bytes:
    """A copy with a few values changed, and now and then its text."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        if list(places(content)):
            change_one(content, rng)
    data = bytearray(json.dumps(content).encode())
    if rng.random() < 0.25:
        damage_text(data, rng)
    return bytes(data)


def refusal(file: Path, format_name: str | None) -> str:
    """Read a file; return why it is refused, "" if its records are usable."""
    try:
        records = list(read_records(file, format=format_name))
    except RecordError as error:
        return str(error)
    for request in (request for record in records for request in record.requests):
        assert request.prompt.strip() and request.target.strip()
        (request.prompt + request.target).encode()  # no lone surrogate came through
    return ""


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    content, rng, started = real(name), random.Random(f"{SEED} {name}"), time.monotonic()
    refused = 0
    for number in range(INPUTS):
        file = tmp_path / f"{number}.json"
        file.write_bytes(damaged(content, rng))
        for format_name in (None, name.rpartition(" ")[2]):
            if why := refusal(file, format_name):
                refused += 1
                assert str(file) in why
    assert 0 < refused < 2 * INPUTS
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b'[{"case_id": ' + b"1" * 5000 + b"}]", "digits"),
        ('[{"prompt": "Zürich"}]'.encode("latin-1"), "not a text in UTF-8 .*save the file as UTF-8"),
        (b"\xff\xfe[\x00]\x00", "not a text in UTF-8"),
        (b"", "file|expecting"),
        (b"[1, 2]", "record"),
        (b"null", "record|expecting"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, format_name: str, data: bytes, what: str) -> None:
    file = tmp_path / "odd.json"
    file.write_bytes(b'{"a": ' + data + b"}" if format_name == "uniedit" and data[:1] == b"[" else data)
    with pytest.raises(RecordError, match=rf"odd\.json: (.|\n)*({what})"):
        list(read_records(file, format=format_name))
