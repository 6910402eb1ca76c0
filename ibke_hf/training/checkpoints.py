"""Checkpoints: the last whole one of a folder, and one more when a run is told to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io import FileError, read_json

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(KeyboardInterrupt):
    """A run that was told to stop and has saved a checkpoint; the message says where."""


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint whose trainer state can be read.

    The state is written last; a killed run may leave half of a checkpoint.
    """
    folders = [
        path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for path in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, FileError):
            read_json(path / "trainer_state.json")
            return str(path)
    return None


@contextmanager
def on_stop_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Ask for a stop on the first Ctrl-C or SIGTERM; the second one ends the process as it always does.

    Threads other than the main one get no signals, so nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if number in received:
            raise KeyboardInterrupt
        received.add(number)
        request_stop()
        print("stopping: one more step, then a checkpoint; again to leave at once", file=sys.stderr)  # noqa: T201

    received: set[int] = set()
    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
