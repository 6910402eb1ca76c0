"""Arrays of 16 bit on disk by key: one file of data that is memory-mapped, one index of a JSON line each.

Several processes append to one store, one at a time, and read what the others have written. Data come first, then
their line in the index: what a killed process leaves half-written has no line, and is written over. A line holds a
checksum, so that data lost with the machine's power are noticed and made again.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)
DATA, INDEX, LOCK = "data.bin", "index.jsonl", ".append.lock"
LOCK_SECONDS = 30.0  # that a process waits for another to append, before it goes on without
SMALLEST_EXPONENT = -100  # a row of values below 2^-100 is stored as if it were that large, and so loses digits
STORED_EXPONENT = 15  # the largest value of a stored row is below 2^15, within the range of fp16


@dataclass(frozen=True)
class Entry:
    """One array of a store.

    Attributes:
        offset: First byte in the data.
        shape: Rows and columns, 16 bit each.
        checksum: CRC-32 of the bytes.
        numbers: Further values, see :meth:`ActivationStore.put`.
    """

    offset: int
    shape: tuple[int, int]
    checksum: int
    numbers: tuple[float, ...]

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + 2 * self.shape[0] * self.shape[1]


class ActivationStore:
    """The arrays of one folder; of a damaged or full one, what is missing is not found and made again.

    Args:
        folder: Where the files are; made if it is missing.
        limit: Bytes that the folder beside and its neighbours may hold together.

    Attributes:
        is_full: Whether something was not stored for want of room, or since the files cannot be written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.is_full = folder, limit, False
        folder.mkdir(parents=True, exist_ok=True)
        for name in (DATA, INDEX):
            (folder / name).touch()
        self._entries: dict[str, Entry] = {}
        self._indexed = self._end = 0  # bytes of the index that were read, and of the data that it knows of
        self._map: mmap.mmap | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def size(self) -> int:
        """Bytes of this store's data and index."""
        return self._end + self._indexed

    def refresh(self) -> None:
        """Read what was appended to the index since the last time."""
        with (self.folder / INDEX).open("rb") as file:
            file.seek(self._indexed)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._indexed += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line of zeros, after a loss of power
                fields = json.loads(line)
                rows, columns = map(int, fields["shape"])
                entry = Entry(
                    int(fields["offset"]), (rows, columns), int(fields["crc"]), tuple(fields.get("numbers", ()))
                )
                self._entries[str(fields["key"])] = entry
                self._end = max(self._end, entry.end)

    def get(self, key: str) -> tuple[Tensor, tuple[float, ...]] | None:
        """Return a copy of the array (rows, columns) of a key, fp16, with its numbers; None where there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        data = self._bytes(entry)
        if data is None or zlib.crc32(data) != entry.checksum:
            logger.warning_once(f"{self.folder}: holds damaged data, which are made again")  # type: ignore[attr-defined]
            del self._entries[key]
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.float16).view(entry.shape), entry.numbers

    def _bytes(self, entry: Entry) -> memoryview | None:
        if self._map is None or len(self._map) < entry.end:
            with (self.folder / DATA).open("rb") as file:
                if entry.end > file.seek(0, 2):
                    return None
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[entry.offset : entry.end]

    def put(self, arrays: Mapping[str, tuple[Tensor, tuple[float, ...]]]) -> None:
        """Append arrays that are not there yet, as long as there is room.

        Args:
            arrays: By key, a tensor (rows, columns) of fp16, and a few numbers that are kept with it.
        """
        if self.is_full or all(key in self._entries for key in arrays):
            return
        try:
            with FileLock(self.folder / LOCK, timeout=LOCK_SECONDS):
                self._append(arrays)
        except Timeout:
            logger.warning_once(f"{self.folder}: another process does not let go of it; some texts are not stored")  # type: ignore[attr-defined]
        except OSError as error:
            self.is_full = True
            logger.warning(f"{self.folder}: cannot be written ({error.strerror}); nothing more is stored there")

    def _append(self, arrays: Mapping[str, tuple[Tensor, tuple[float, ...]]]) -> None:
        self.refresh()
        room = self.limit - self._used()
        lines = []
        with (self.folder / DATA).open("r+b") as file:
            file.seek(self._end)
            for key, (array, numbers) in arrays.items():
                if key in self._entries:
                    continue
                data = array.contiguous().numpy().tobytes()
                entry = Entry(file.tell(), (array.shape[0], array.shape[1]), zlib.crc32(data), numbers)
                line = _line(key, entry)
                room -= len(data) + len(line)
                if room < 0:
                    self.is_full = True
                    break
                file.write(data)
                lines.append(line)
        with (self.folder / INDEX).open("r+b") as file:
            file.truncate(self._indexed)  # drops the half of a line that a killed process has left
            file.seek(self._indexed)
            file.write(b"".join(lines))
        self.refresh()
        if self.is_full:
            logger.warning(
                f"{self.folder.parent}: what {len(self)} texts need fills its {self.limit / 1e9:.3g} GB; further ones "
                "are computed at every step (activation_cache_gb sets the room)"
            )

    def _used(self) -> int:
        """Bytes that are taken: by this store, and by those of other backbones beside it."""
        others = (path for path in self.folder.parent.glob(f"*/{DATA}") if path.parent != self.folder)
        indices = self.folder.parent.glob(f"*/{INDEX}")
        return self._end + sum(path.stat().st_size for path in (*others, *indices))


def _line(key: str, entry: Entry) -> bytes:
    fields: dict[str, Any] = {"key": key, "offset": entry.offset, "shape": entry.shape, "crc": entry.checksum}
    if entry.numbers:
        fields["numbers"] = entry.numbers
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def to_half(rows: Tensor) -> Tensor:
    """Encode rows (n, d) as fp16 (n, 1 + d): an exponent, and the values over that power of two.

    Each row uses the whole range of fp16, so that gradients of any size keep eleven bits.
    """
    _, exponents = torch.frexp(rows.float().abs().amax(-1, keepdim=True))
    exponents = exponents.clamp(min=SMALLEST_EXPONENT)
    scaled = rows.float() * torch.exp2((STORED_EXPONENT - exponents).float())
    return torch.cat((exponents.half(), scaled.half()), -1)


def from_half(stored: Tensor) -> Tensor:
    """Decode what :func:`to_half` gives, (n, 1 + d) -> fp32 (n, d)."""
    return stored[:, 1:].float() * torch.exp2(stored[:, :1].float() - STORED_EXPONENT)
