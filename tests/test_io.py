"""Files as they are read, written and owned."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ibke_hf.io import FileError, locked

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
