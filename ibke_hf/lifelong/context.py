"""What needs no editor at all: the request itself, put in front of the prompt. What a user would try first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.configuration_ibke import Mode, require_mode
from ..core.records import EditRequest, PromptFormat
from ..core.tokens import encode_prompt, pad_and_label
from .reading import read_states
from .routed import AT_ONCE, request_vectors
from .router import Router
from .routing import distinct_places
from .search import ExactSearch
from .shelf import EditShelf


@dataclass(frozen=True, eq=False)
class ContextEdit:
    """n independent sets of requests, of each of which some stand in front of a prompt; the model is as it is.

    Attributes:
        requests: The requests.
        views: For each of the n sets the places of its requests.
        router: Picks those nearest to a prompt; None: a prompt has those that it is told are its own.
        vectors: (m, dim) what the router knows of the requests.
        always: Places of requests that came on top of others, such as supporting hops, which stand in front of every
            prompt of their set if there is no router.
    """

    requests: tuple[EditRequest, ...]
    views: tuple[tuple[int, ...], ...]
    router: Router | None = None
    vectors: Tensor | None = None
    always: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> ContextEdit:
        return replace(self, views=(self.views[index],))

    def select(self, rows: Sequence[int] | Tensor) -> ContextEdit:
        """Return the independent sets `rows`, in that order."""
        return replace(self, views=tuple(self.views[row] for row in torch.as_tensor(rows).flatten().tolist()))

    @property
    def nbytes(self) -> int:
        """Memory that the requests take, in bytes."""
        text = sum(len(f"{request.prompt} {request.target}".encode()) for request in self.requests)
        return text + (0 if self.vectors is None else self.vectors.nbytes)

    def attached(
        self, model: Any, rows: Tensor | None = None, *, all_threads: bool = False
    ) -> AbstractContextManager[Any]:
        """Leave the model as it is; see :meth:`in_front`."""
        return nullcontext(model)

    def in_front(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[tuple[str, PromptFormat]],
        rows: Sequence[int],
        own: Sequence[Sequence[EditRequest]],
    ) -> list[str]:
        """Return prompts behind the requests that are chosen for each.

        Args:
            model: The backbone, which the router reads.
            tokenizer: Its tokenizer.
            prompts: Texts, and how they are put to the model.
            rows: The set that each prompt has its requests from.
            own: The requests that each prompt is known to belong to, which stand in front of it if there is no router,
                with those that always do.
        """
        chosen = self._own(rows, own) if self.router is None else self._near(model, tokenizer, prompts, rows)
        return [
            " ".join([*(f"{request.prompt} {request.target}." for request in requests), prompt])
            for requests, (prompt, _) in zip(chosen, prompts, strict=True)
        ]

    def _own(self, rows: Sequence[int], own: Sequence[Sequence[EditRequest]]) -> list[list[EditRequest]]:
        return [
            [self.requests[place] for place in self.views[row] if place in self.always or self.requests[place] in mine]
            for row, mine in zip(rows, own, strict=True)
        ]

    @torch.no_grad()
    def _near(
        self, model: Any, tokenizer: Any, prompts: Sequence[tuple[str, PromptFormat]], rows: Sequence[int]
    ) -> list[list[EditRequest]]:
        assert self.router is not None and self.vectors is not None
        picked: list[list[EditRequest]] = []
        for start in range(0, len(prompts), AT_ONCE):
            ids = [encode_prompt(tokenizer, prompt, how) for prompt, how in prompts[start : start + AT_ONCE]]
            states, mask = read_states(model, self.router.sources, pad_and_label([([*i, 0], len(i)) for i in ids]))
            device = self.router.log_scale.device
            vectors = self.router([state.to(device) for state in states], mask.to(device))
            allowed = torch.zeros(len(ids), len(self.requests), dtype=torch.bool)
            for row, place in enumerate(rows[start : start + AT_ONCE]):
                allowed[row, list(self.views[place])] = True
            keys = [str(place) for place in range(len(self.requests))]
            shelf = EditShelf(keys, (), lambda key: self._no_edit(), ExactSearch(self.vectors), allowed)
            config = self.router.config
            chosen = distinct_places(shelf, vectors, config.threshold, config.most_edits)
            picked += [[self.requests[place] for place in places] for places in chosen]
        return picked

    @staticmethod
    def _no_edit() -> Any:
        raise NotImplementedError("requests in front of a prompt are no edits of weights")


class ContextEditor:
    """Puts requests in front of prompts.

    Args:
        router: Picks the nearest ones; None: the true one, which nobody knows outside of an evaluation.
    """

    supports_independent = False  # what comes on top of an edit is told apart from what is edited together

    def __init__(self, router: Router | None = None) -> None:
        self.router = router

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: ContextEdit | None = None,
    ) -> ContextEdit:
        """Return the requests beside those of `previous`; arguments and errors are :class:`Editor`'s."""
        require_mode(mode)
        earlier = () if previous is None else previous.requests
        new = tuple(range(len(earlier), len(earlier) + len(requests)))
        before: tuple[tuple[int, ...], ...] = ((),) if previous is None else previous.views
        if mode == "independent":
            before = before * (len(new) if len(before) == 1 else 1)
            views = tuple((*view, place) for view, place in zip(before, new, strict=True))
        else:
            views = tuple((*view, *new) for view in before)
        vectors = None
        if self.router is not None:
            known = request_vectors(model, tokenizer, self.router, requests)
            vectors = known if previous is None or previous.vectors is None else torch.cat([previous.vectors, known])
        always = frozenset() if previous is None else previous.always | frozenset(new)
        return ContextEdit((*earlier, *requests), views, self.router, vectors, always)
