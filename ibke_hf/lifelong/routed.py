"""Edits in memory that each prompt is routed to: a value as every edit is, and the editor that makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.composition import RIDGE, SolvedEdit
from ..core.configuration_ibke import Mode, require_mode
from ..core.edit_values import EditInfo, joined_info
from ..core.edits import LowRankEdit
from ..core.records import EditRequest
from ..core.tokens import IGNORED, TokenBatch, context_length, encode_requests
from .reading import read_states
from .router import Router
from .routing import Routing
from .shelf import shelf_of, whole

AT_ONCE = 32  # requests that are read or edited in one batch


@dataclass(frozen=True, eq=False)
class RoutedEdit:
    """n independent sets of edits, of each of which a prompt carries those that a router finds for it.

    Attributes:
        parts: Single low-rank edits, each made on the unedited model.
        vectors: (m, dim) what the router knows of their requests.
        router: The router.
        views: For each of the n sets the places of its parts.
        ridge: Of the solve where a prompt carries several.
    """

    parts: tuple[LowRankEdit, ...]
    vectors: Tensor
    router: Router
    views: tuple[tuple[int, ...], ...]
    ridge: float = RIDGE

    @classmethod
    def of(cls, parts: Sequence[LowRankEdit], vectors: Tensor, router: Router, ridge: float = RIDGE) -> RoutedEdit:
        """Return one set of edits.

        Raises:
            ValueError: If there is none, one holds several independent edits, or vectors are missing.
        """
        if not parts or len(vectors) != len(parts):
            raise ValueError(f"a routed edit needs a vector for each of at least one edit, found {len(parts)} edits")
        if long := [len(part) for part in parts if len(part) != 1]:
            raise ValueError(f"a routed edit is made of single edits, found {long[0]} independent ones; split them")
        return cls(tuple(parts), vectors, router, (tuple(range(len(parts))),), ridge)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> RoutedEdit:
        number = len(self)
        if not -number <= index < number:
            raise IndexError(f"edit {index} of {number}")
        return replace(self, views=(self.views[index],))

    def select(self, rows: Sequence[int] | Tensor) -> RoutedEdit:
        """Return the independent sets `rows`, in that order; repeats are allowed.

        Raises:
            IndexError: If a row does not exist.
        """
        chosen = torch.as_tensor(rows, dtype=torch.long).flatten().tolist()
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self):
            raise IndexError(f"rows must name at least one of the {len(self)} independent edits, found {chosen}")
        return replace(self, views=tuple(self.views[row] for row in chosen))

    @property
    def info(self) -> EditInfo:
        """Where the parts come from."""
        return joined_info([(part.info, 1) for part in self.parts], 1)

    @property
    def nbytes(self) -> int:
        """Memory that the parts and their vectors take, in bytes."""
        return sum(part.nbytes for part in self.parts) + self.vectors.nbytes

    def to(self, *args: Any, **kwargs: Any) -> RoutedEdit:
        """Return the edit on another device or in another dtype; the router stays where it is."""
        return replace(self, parts=tuple(part.to(*args, **kwargs) for part in self.parts))

    @contextmanager
    def attached(
        self, model: Any, rows: Tensor | None = None, *, all_threads: bool = False, **options: Any
    ) -> Iterator[Any]:
        """Have each row of a batch carry the edits that its prompt is about; see :class:`~.routing.Routing`.

        Args:
            model: The backbone.
            rows: (b,) which set each row of the batch picks from; by default the only one, or row i from set i.
            all_threads: See :meth:`~ibke_hf.core.edits.WeightEdit.attached`.
            options: `threshold` and `most_edits` in place of the router's own.

        Raises:
            BackboneError: If the model does not fit router or edits.
        """
        for part in self.parts[:1]:
            part.modules(model)
        views = self.views if rows is None else self.select(rows).views
        allowed = None
        if len(set(views)) > 1 or set(views[0]) != set(range(len(self.parts))):
            allowed = torch.zeros(len(views), len(self.parts), dtype=torch.bool)
            for row, view in enumerate(views):
                allowed[row, list(view)] = True
        keys = [str(place) for place in range(len(self.parts))]
        shelf = shelf_of(keys, self.parts, self.vectors, allowed, self.ridge)
        with Routing(model, self.router, shelf, **options).attached(all_threads=all_threads):
            yield model

    # --- as a set ---------------------------------------------------------------------------------------------------

    def compose(self, *others: RoutedEdit) -> RoutedEdit:
        """Return one set with the edits of all."""
        sets = [self, *others]
        parts = tuple(one.parts[place] for one in sets for place in one._only_view())
        vectors = torch.cat([one.vectors[list(one._only_view())] for one in sets])
        return RoutedEdit.of(parts, vectors, self.router, self.ridge)

    def _only_view(self) -> tuple[int, ...]:
        if len(self) != 1:
            raise ValueError(f"{len(self)} independent sets cannot be joined at once; choose one, such as edit[0]")
        return self.views[0]

    def truncate(self, rank: int) -> RoutedEdit:
        """Return the same set with every part cut to a rank; see :meth:`~ibke_hf.core.edits.LowRankEdit.truncate`."""
        return replace(self, parts=tuple(part.truncate(rank) for part in self.parts))

    def whole(self) -> LowRankEdit | SolvedEdit:
        """Return all edits as one that acts on every prompt: solved, or summed where keys are missing."""
        return whole([self.parts[place] for place in self._only_view()], self.ridge)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save all edits as one LoRA adapter, see :meth:`whole`."""
        self.whole().save_pretrained(folder, **options)


@torch.no_grad()
def request_vectors(
    model: Any, tokenizer: Any, router: Router, requests: Sequence[EditRequest], at_once: int = AT_ONCE
) -> Tensor:
    """Return what the router knows of requests, (n, dim) on the CPU; the model runs unedited up to its lowest layer.

    Raises:
        RequestError: If a request is unusable, naming it by its index.
    """
    rows = []
    for start in range(0, len(requests), at_once):
        batch = encode_requests(tokenizer, requests[start : start + at_once], max_length=context_length(model))
        states, mask = read_states(model, router.sources, _with_last_token(batch))
        device = router.log_scale.device
        rows.append(router([state.to(device) for state in states], mask.to(device), requests=True).cpu())
    return torch.cat(rows) if rows else torch.zeros(0, router.config.dim)


def _with_last_token(batch: TokenBatch) -> TokenBatch:
    """Return prompts with their whole targets: what is encoded for an edit leaves out the last token."""
    last = batch.labels[:, -1:]
    ones = torch.ones_like(last)
    return TokenBatch(
        torch.cat([batch.input_ids, last], 1),
        torch.cat([batch.attention_mask, ones], 1),
        torch.cat([torch.full_like(batch.labels, IGNORED), last], 1),
    )


class RoutedEditor:
    """An editor whose edits are routed: each request is edited by itself, and found by what a prompt is about.

    Args:
        editor: Makes low-rank edits, such as IBKE or MEND.
        router: Finds them.
    """

    def __init__(self, editor: Any, router: Router) -> None:
        self.editor, self.router = editor, router
        check = getattr(editor, "check_request", None)
        if check is not None:
            self.check_request = check
        if hasattr(getattr(editor, "config", None), "composition"):
            editor.config.composition = "solve"  # so that edits carry the inputs that they were made for

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: RoutedEdit | None = None,
    ) -> RoutedEdit:
        """Return the edits of the requests beside those of `previous`; arguments and errors are :class:`Editor`'s."""
        require_mode(mode)
        independent = mode == "independent"
        made: list[LowRankEdit] = []
        for start in range(0, len(requests), AT_ONCE):
            part = self.editor.edit(model, tokenizer, requests[start : start + AT_ONCE], mode="independent")
            made += list(part)
        vectors = request_vectors(model, tokenizer, self.router, requests)
        earlier = () if previous is None else previous.parts
        new = tuple(range(len(earlier), len(earlier) + len(made)))
        before: tuple[tuple[int, ...], ...] = ((),) if previous is None else previous.views
        if independent:
            before = before * (len(made) if len(before) == 1 else 1)
            views = tuple((*view, place) for view, place in zip(before, new, strict=True))
        else:
            views = tuple((*view, *new) for view in before)
        known = vectors if previous is None else torch.cat([previous.vectors, vectors])
        ridge = getattr(getattr(self.editor, "config", None), "ridge", RIDGE)
        return RoutedEdit((*earlier, *made), known, self.router, views, ridge)
