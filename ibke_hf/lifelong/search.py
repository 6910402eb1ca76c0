"""Nearest neighbours of a vector among those of a library: exactly for a few thousand, by an index beyond."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import logging

EXACT = 4096  # vectors that are compared one by one
SEARCHED = 64  # candidates that an index keeps while it searches: more finds more
logger = logging.get_logger(__name__)


class Search(Protocol):
    """Finds the vectors nearest to others."""

    def nearest(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return similarities and places (b, min(number, n)) of the nearest of n unit vectors, the best first."""


class ExactSearch:
    """Compares with every vector.

    Args:
        vectors: (n, dim) unit vectors, in the order of their places.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def nearest(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`."""
        mine = self.vectors.to(vectors.device, vectors.dtype)
        best = (vectors @ mine.T).topk(min(number, len(mine)), dim=-1)
        return best.values, best.indices


class IndexSearch:
    """Compares with few vectors, chosen by usearch's graph of neighbours; similarities are computed exactly.

    Args:
        vectors: (n, dim) unit vectors.

    Raises:
        ImportError: If usearch is not installed.
    """

    def __init__(self, vectors: Tensor) -> None:
        try:
            kind = import_module("usearch.index").Index
        except ImportError as error:
            raise ImportError(
                'searching by an index needs the extra "search": pip install "ibke-hf[search]"'
            ) from error
        self.vectors = vectors
        self.index: Any = kind(ndim=vectors.shape[1], metric="ip", dtype="f32", expansion_search=SEARCHED)
        self.index.add(torch.arange(len(vectors)).numpy(), vectors.float().cpu().numpy(), threads=1)

    def nearest(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`."""
        number = min(number, len(self.vectors))
        found = self.index.search(vectors.float().cpu().numpy(), number, threads=1)
        places = torch.as_tensor(found.keys.astype("int64")).view(len(vectors), number).to(vectors.device)
        mine = self.vectors.to(vectors.device, vectors.dtype)[places]
        similarities, order = (mine @ vectors[:, :, None]).squeeze(-1).sort(-1, descending=True)
        return similarities, places.gather(-1, order)


def search_among(vectors: Tensor, *, exact: int = EXACT) -> Search:
    """Return the search for that many vectors: exact up to `exact` of them, or where usearch is not installed."""
    if len(vectors) <= exact:
        return ExactSearch(vectors)
    if find_spec("usearch") is None:
        logger.warning_once(
            f"{len(vectors)} edits are compared one by one; a search by an index is quicker: "
            'pip install "ibke-hf[search]"'
        )
        return ExactSearch(vectors)
    return IndexSearch(vectors)


def stacked(rows: Sequence[Tensor], dim: int) -> Tensor:
    """Return vectors as one tensor (n, dim), also of none."""
    return torch.stack(list(rows)) if rows else torch.zeros(0, dim)
