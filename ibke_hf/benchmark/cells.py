"""Which cells a table has: editors x selections of records x numbers of edits x seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar
from zlib import crc32

from ..editors.catalogue import editor_of

ALL = "all"
EDITS = (ALL, "counterfactual", "unknown")
T = TypeVar("T")


class BenchmarkError(ValueError):
    """A table that cannot be made as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Cell:
    """One evaluation.

    Attributes:
        editor: Id of the editor.
        split: Name of the dataset, or of its split.
        edits: ``"counterfactual"``, ``"unknown"`` (to the model) or ``"all"``.
        sequential: Number of edits that the model carries at once.
        seed: Draws the records, and names the training run of a trained editor.
    """

    editor: str
    split: str
    edits: str
    sequential: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder, which no other cell has."""
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in self.split)
        split = (
            plain if plain == self.split and len(plain) <= 60 else f"{plain[-60:]}-{crc32(self.split.encode()):08x}"
        )
        return f"{split}.{self.edits}.{self.sequential}.{self.editor}.{self.seed}"


@dataclass(frozen=True)
class Plan:
    """All cells of a table.

    Attributes:
        editors: Ids of the editors, see :data:`~ibke_hf.editors.catalogue.COMPARED`.
        splits: Names of the datasets.
        edits: Kinds of edits, a table of its own each.
        sequential: Numbers of edits that the model carries at once, likewise.
        seeds: Number of seeds, 0, 1, ….
        records: Records of a cell; fewer where a dataset has no more of the kind.
    """

    editors: Sequence[str]
    splits: Sequence[str]
    edits: Sequence[str] = (ALL,)
    sequential: Sequence[int] = (1,)
    seeds: int = 3
    records: int = 100

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        for name in self.editors:
            editor_of(name)
        for name in ("editors", "splits", "edits", "sequential"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                names = ", ".join(map(str, values)) or "none"
                raise BenchmarkError(f"{name} must name at least one, and none of them twice, found {names}")
        if unknown := set(self.edits) - set(EDITS):
            raise BenchmarkError(f"edits must be some of {', '.join(EDITS)}, found {', '.join(sorted(unknown))}")
        if min(self.seeds, self.records, *self.sequential) < 1:
            raise BenchmarkError("seeds, records and sequential must be at least 1")

    def cells(self, shard: tuple[int, int] = (1, 1)) -> list[Cell]:
        """Return the cells of one of n shards; those of one editor and seed stay together, so that it is trained once.

        Args:
            shard: i and n, 1 ≤ i ≤ n.
        """
        units = share_of(list(product(range(self.seeds), self.editors)), shard)
        parts = list(product(self.splits, self.edits, self.sequential))
        return [Cell(editor, *part, seed) for seed, editor in units for part in parts]


def share_of(units: Sequence[T], shard: tuple[int, int]) -> list[T]:
    """Return every n-th of some units from the i-th on.

    Args:
        units: What is made in one process each, in order.
        shard: i and n, 1 ≤ i ≤ n.

    Raises:
        BenchmarkError: For another i.
    """
    index, number = shard
    if not 1 <= index <= number:
        raise BenchmarkError(f"shard must be i/n with 1 <= i <= n, found {index}/{number}")
    return list(units[index - 1 :: number])
