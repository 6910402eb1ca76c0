"""The edits that a router picks from, and what several of them together add to a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor
from transformers.utils import logging

from ..core.composition import RIDGE, SolvedEdit
from ..core.edits import LowRankEdit
from .search import ExactSearch, Search

ROOM = 256 << 20  # bytes of solved edits that are kept at hand
logger = logging.get_logger(__name__)
Matrices = dict[str, tuple[Tensor, Tensor]]


class EditShelf:
    """Edits in an order, read when they are picked; the ones picked last are kept at hand.

    Args:
        keys: What tells each edit apart.
        layers: All layers that any of them changes.
        read: Returns the edit of a key.
        search: Finds the vectors of their requests.
        allowed: (b, n) of bool, which edits each row of a batch may carry; (1, n) for all rows alike; None: all.
        room: Bytes that are kept at hand.
        ridge: Of the solve of several.
    """

    def __init__(
        self,
        keys: Sequence[str],
        layers: Sequence[str],
        read: Callable[[str], LowRankEdit],
        search: Search,
        allowed: Tensor | None = None,
        room: int = ROOM,
        ridge: float = RIDGE,
    ) -> None:
        self.keys, self._layers, self._read, self._search = list(keys), tuple(layers), read, search
        self._places = {key: place for place, key in enumerate(self.keys)}
        self.allowed, self.room, self.ridge = allowed, room, ridge
        self._kept: OrderedDict[tuple[int, ...], Matrices] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that any of the edits changes."""
        return self._layers

    def key(self, place: int) -> str:
        """Return what tells an edit apart."""
        return self.keys[place]

    def place(self, key: str) -> int | None:
        """Return the place of an edit, None where it is not here."""
        return self._places.get(key)

    def nearest(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return similarities and places (b, ≤ number) of the nearest edits that each row may carry.

        Raises:
            ValueError: If the batch has another number of rows than were told apart.
        """
        if not self.keys:
            return vectors.new_zeros(len(vectors), 0), torch.zeros(len(vectors), 0, dtype=torch.long)
        if self.allowed is None:
            return self._search.nearest(vectors, number)
        if len(self.allowed) not in (1, len(vectors)):
            raise ValueError(
                f"{len(self.allowed)} rows of edits were attached to a batch of {len(vectors)} rows; pass rows= to "
                f"say which edits each row may carry (beam search repeats rows)"
            )
        similarities, places = self._search.nearest(vectors, len(self.keys))
        allowed = self.allowed.to(vectors.device).expand(len(vectors), -1).gather(-1, places)
        similarities, order = similarities.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True)
        return similarities[:, :number], places.gather(-1, order)[:, :number]

    def matrices(self, places: tuple[int, ...], name: str) -> tuple[Tensor, Tensor] | None:
        """Return (d_in, r) and (r, d_out) of a layer whose product is what these edits, solved together, add there."""
        with self._lock:
            if places in self._kept:
                self._kept.move_to_end(places)
                return self._kept[places].get(name)
        made = together([self._read(self.keys[place]) for place in places], self.ridge)
        size = sum(matrix.nbytes for pair in made.values() for matrix in pair)
        with self._lock:
            self._kept[places] = made
            self._bytes += size
            while self._bytes > self.room and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= sum(matrix.nbytes for pair in dropped.values() for matrix in pair)
        return made.get(name)


def together(edits: Sequence[LowRankEdit], ridge: float = RIDGE) -> Matrices:
    """Return by layer the factors of what several edits do together: solved, or summed where one carries no keys."""
    edit = whole(edits, ridge)
    factors = edit.low_rank() if isinstance(edit, SolvedEdit) else edit
    return {name: (factors.inputs[name][0].float().T, factors.outputs[name][0].float()) for name in factors.layers}


def whole(edits: Sequence[LowRankEdit], ridge: float = RIDGE) -> LowRankEdit | SolvedEdit:
    """Return several edits as one: solved, or summed where one of them does not carry its keys."""
    if len(edits) == 1:
        return edits[0]
    if all(name in edit.keys for edit in edits for name in edit.layers):
        return SolvedEdit.of(edits, ridge)
    logger.warning_once(
        "an edit does not carry the inputs that it was made for, so it is summed with others and not solved; make it "
        'again by an editor whose composition is "solve"'
    )
    return edits[0].compose(*edits[1:])


def shelf_of(
    keys: Sequence[str],
    edits: Sequence[LowRankEdit],
    vectors: Tensor,
    allowed: Tensor | None = None,
    ridge: float = RIDGE,
) -> EditShelf:
    """Return a shelf of edits that are in memory already."""
    by_key = dict(zip(keys, edits, strict=True))
    layers = dict.fromkeys(name for edit in edits for name in edit.layers)
    return EditShelf(list(keys), tuple(layers), by_key.__getitem__, ExactSearch(vectors), allowed, ridge=ridge)
