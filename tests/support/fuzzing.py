"""Seeded bad inputs for the command line: odd values, damaged files, and the judge of what comes of them."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ibke_hf import loading
from ibke_hf.cli import main

SECONDS = 60  # that one input may take; a busy machine takes ten times as long as an idle one
EXIT_CODES = {0, 1, 2}
DEEP = 100_000  # levels of nesting, more than a parser goes down
ODD: list[Any] = [None, True, [], {}, [[]], [None], {"a": 1}, [1], [-1, "a"], "", " ", "x", "\ud800", "\0", "é\n"]
ODD += ["x" * 5000, "(a+)+$", "[", "-1", "1e-3", "null", 0, -1, 1, 3, 0.5, 1e300, float("nan"), float("inf")]
ODD += [2**31, 2**63, 10**40]
WORDS = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "1",
    "2",
    "nan",
    "inf",
    "1e400",
    "9" * 30,
    "²",
    "٣",
    "\ud800",
    "\0",
    "a/b/c",
    "../..",
]
WORDS += [
    "/proc/x",
    "evil",
    "[1]",
    "{}",
    "ft",
    "none",
    "serac",
    "atlas",
    "auto",
    "cpu",
    "meta",
    "true",
    "70000",
    "x=y",
]
WORDS += ["1/0", "é\n", "/dev/null/x", "x:y", "--"]
WORK = (  # what takes long and reads nothing that a user gives
    "ibke_hf.app.demo.run_demo",
    "ibke_hf.app.page.launch",
    "ibke_hf.atlas.backbone.build_backbone",
    "ibke_hf.atlas.tuning.tune",
    "ibke_hf.atlas.report.write_report",
    "ibke_hf.atlas.editors.train_atlas_editor",
    "ibke_hf.benchmark.families.families_report",
    "ibke_hf.training.editor_trainer.EditorTrainer.train",
)

UNCLEAR = re.compile(  # words of Python for what a program got wrong, which tell nobody what to mend
    r"division by zero|is not in list|codec can't|has no attribute|not (iterable|subscriptable|callable)"
    r"|cannot import name|unpack|unhashable|out of range$|unsupported operand|not supported between"
    r"|positional argument|keyword argument"
    r"|invalid literal|could not convert|must be str|recursion depth|NoneType|ibke [a-z ]+: *('[^']*'|\d+)?$"
)
Fuzz = Callable[..., None]


class InputTimeoutError(BaseException):
    """An input that ran past its time; no handler of a command catches it."""


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Fuzz]:
    """Run one command after another; at the end, fail with every input that ended in anything but a clear line."""
    monkeypatch.chdir(tmp_path)
    for name in WORK:
        monkeypatch.setattr(name, _leave_out)
    faults: list[str] = []

    def run(*arguments: Any) -> None:
        words = [str(argument) for argument in arguments]
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as it is outside of a test
        previous = signal.signal(signal.SIGALRM, _time_out)
        signal.alarm(SECONDS)
        try:
            code: Any = main(words)
        except SystemExit as stop:
            code = stop.code
        except (Exception, InputTimeoutError) as error:  # noqa: BLE001  whatever is no clear line
            faults.append(f"{' '.join(map(repr, words))}: {_described(error)}")
            return
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        # what a library says is quoted after the cure
        lines = [
            line.partition("; save or download it again; ")[0]
            for line in capsys.readouterr().err.splitlines()
            if line.startswith("ibke ")
        ]
        if code not in EXIT_CODES or (lines and UNCLEAR.search(lines[-1])):
            faults.append(f"{' '.join(map(repr, words))}: exit code {code!r}, {lines[-1:]}")

    yield run
    assert not faults, f"{len(faults)} inputs:\n" + "\n".join(faults)


def _time_out(*_: Any) -> None:
    raise InputTimeoutError(f"ran past {SECONDS} seconds")


def _leave_out(*_: Any, **__: Any) -> None:
    raise ValueError("the work is left out of this test")


def _described(error: BaseException) -> str:
    """Name an error and the line that it comes from, with the last line of the package on the way there."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    package = [place for place in places if "ibke_hf" in place]
    return f"{type(error).__name__}: {str(error)[:300]} at {places[-1]}, from {package[-1] if package else 'outside'}"


@pytest.fixture
def one_model(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the tiny model once, whatever model is asked for."""
    model = loading.load_model(store / "model")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)


def commands_of(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield the words and the parser of every command."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield path, parser
    for group in groups:
        for name, command in group.choices.items():
            yield from commands_of(command, (*path, name))


def mutated(value: Any, rng: random.Random) -> Any:
    """Put an odd value, or none, in place of a random part of a JSON value."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.25:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else list(range(len(value))))
    copy: Any = value.copy()
    if rng.random() < 0.2:
        del copy[key]
    elif rng.random() < 0.1 and isinstance(copy, dict):
        copy[rng.choice(["x", "", "\ud800"])] = rng.choice(ODD)
    else:
        copy[key] = mutated(value[key], rng)
    return copy


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage a file: a part of its JSON, else cut, flipped, foreign or deeply nested."""
    if rng.random() < 0.6:
        try:
            return json.dumps(mutated(json.loads(content), rng)).encode()
        except ValueError:
            pass
    at = rng.randrange(len(content) + 1)
    return rng.choice(
        [
            content[:at],
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            content[:at] + rng.choice(WORDS).encode("utf-8", "surrogatepass") + content[at:],
            b"[" * DEEP,
            b'{"a":' * DEEP,
            b"\xff\xfe" + content,
            b"",
        ]
    )


def damaged_copy(folder: Path, target: Path, rng: random.Random, suffixes: tuple[str, ...] = ()) -> Path:
    """Copy a folder with one of its files damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    files = sorted(file for file in target.rglob("*") if file.is_file() and (not suffixes or file.suffix in suffixes))
    file = rng.choice(files)
    file.write_bytes(damaged(file.read_bytes(), rng))
    return target
