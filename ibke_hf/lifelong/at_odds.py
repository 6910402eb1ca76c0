"""What edits of a library are at odds with: the requests of all others, and the keys of those that are nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import torch

from ..core.conflicts import Conflict, conflicting_requests, conflicts
from ..core.edits import LowRankEdit
from .index import Entry

NEAREST = 3  # edits whose keys are compared with those of an edit: they are read from their files


def conflicts_in(entries: Sequence[Entry], chosen: Set[str], read: Callable[[str], LowRankEdit]) -> list[Conflict]:
    """Return the conflicts that chosen edits of a library have, with one another or with any other.

    Args:
        entries: All edits.
        chosen: Ids of those that are looked at.
        read: Returns the edit of an id.
    """
    places = [place for place, entry in enumerate(entries) if entry.id in chosen]
    pairs: dict[tuple[int, int], Conflict] = {}
    for conflict in conflicting_requests([entry.requests for entry in entries]):
        if conflict.first in places or conflict.second in places:
            pairs.setdefault((conflict.second, conflict.first), conflict)
    for first, second in _nearest(entries, places):
        if (second, first) not in pairs:
            for conflict in conflicts([read(entries[first].id), read(entries[second].id)]):
                pairs[second, first] = replace(conflict, first=first, second=second)
    return [pairs[pair] for pair in sorted(pairs)]


def _nearest(entries: Sequence[Entry], places: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of each of some edits with those that the router has nearest, the earlier place first."""
    known = [place for place, entry in enumerate(entries) if entry.vectors is not None and len(entry.vectors) == 1]
    ours = sorted(set(places) & set(known))
    if not ours:
        return []
    vectors = torch.cat([vector.float() for place in known if (vector := entries[place].vectors) is not None])
    rows = [known.index(place) for place in ours]
    near = (vectors[rows] @ vectors.T).topk(min(NEAREST + 1, len(known))).indices.tolist()
    pairs = {(min(a, known[b]), max(a, known[b])) for a, row in zip(ours, near, strict=True) for b in row}
    return sorted((first, second) for first, second in pairs if first != second)
