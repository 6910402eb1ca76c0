"""Edits that find their rows: what happens in a forward pass of a model that a library is attached to.

Below the lowest edited layer the model runs as ever, and its states are read. There each row's prompt becomes a
vector, the edits near it are picked, and the row carries them, and no other row does, from this layer on, in the same
forward pass. What a prompt was given is kept on its cache of keys and values, so that decoding steps keep it, also
where several conversations take turns; beams of a prompt and repeated rows share it. Without a cache, a pass whose
rows are those of the pass before with one token more is such a step too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.attachment import call_hooked, call_preceded, hooked, marked_prompts
from ..core.layers import BackboneError, dimensions, modules_to_edit
from .reading import by_token
from .router import Pooled, Router

ROUTE = "_ibke_hf_route"  # attribute of a cache: what its rows were given
SPARE = 2  # times k: places that are looked at
Picks = tuple[tuple[int, ...], ...]  # for each row the places of its edits, the nearest first


class Shelf(Protocol):
    """Edits in an order, by whose places a router picks them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that any of the edits changes."""

    def nearest(self, vectors: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return similarities and places (b, ≤ number) of the edits nearest to vectors (b, dim), the best first."""

    def matrices(self, places: tuple[int, ...], name: str) -> tuple[Tensor, Tensor] | None:
        """Return (d_in, r) and (r, d_out) of a layer whose product is what these edits, solved together, add there."""

    def key(self, place: int) -> str:
        """Return what tells an edit apart from all others, whatever its place."""

    def place(self, key: str) -> int | None:
        """Return the place of an edit, None where it is gone."""


@dataclass(frozen=True)
class Route:
    """What the rows of a batch were given.

    Attributes:
        keys: For each row the keys of its edits.
        pooled: What was read of each row so far, for a prompt that goes on.
        picks: Their places on the shelf.
        stacks: By layer the factors of the distinct picks, as they were needed.
        ids: (b, l) of a pass without a cache, and how many of the columns are the prompt's.
    """

    keys: tuple[tuple[str, ...], ...]
    pooled: Pooled
    picks: Picks = ()
    stacks: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    ids: tuple[Tensor, int] | None = None

    def __deepcopy__(self, memo: Any) -> Route:
        """A copy of a cache may share it: nothing of it is ever changed but what is made of it once more."""
        return self

    def repeated(self, rows: int) -> Route | None:
        """Return the route of a batch whose rows repeat these, as one that a cache is spread to; None if it cannot."""
        number = len(self.keys)
        if rows == number:
            return self
        if number == 0 or rows % number:
            return None
        index = torch.arange(number).repeat_interleave(rows // number)
        chosen = index.tolist()
        keys, picks = tuple(self.keys[i] for i in chosen), tuple(self.picks[i] for i in chosen)
        return Route(keys, self.pooled.select(index), picks)


@dataclass
class Call:
    """One forward pass: what it brings, and the route of its rows once that is known."""

    arguments: Mapping[str, Any]
    states: dict[str, Tensor] = field(default_factory=dict)
    earlier: Route | None = None
    keeps: bool = False
    route: Route | None = None

    @property
    def cache(self) -> Any:
        """The cache of keys and values that the pass was given."""
        return next((v for n in ("past_key_values", "cache_params") if (v := self.arguments.get(n)) is not None), None)

    @property
    def past(self) -> int:
        """Tokens that the cache holds."""
        length = getattr(self.cache, "get_seq_length", None)
        with suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return 0 if length is None else int(length())
        return 0

    @property
    def ids(self) -> Tensor | None:
        """Token ids (b, l) of the pass, None where it was given embeddings."""
        return self.arguments.get("input_ids")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the pass."""
        given = self.ids if self.ids is not None else self.arguments["inputs_embeds"]
        return int(given.shape[0]), int(given.shape[1])

    def mask(self) -> Tensor:
        """Return which of the tokens (b, l) are a prompt's."""
        marked, (rows, columns) = marked_prompts(), self.shape
        if marked is not None and marked.shape == (rows, columns):
            return marked.bool()
        mask: Any = self.arguments.get("attention_mask")
        if isinstance(mask, Mapping):
            mask = next((part for part in mask.values() if isinstance(part, Tensor)), None)
        if isinstance(mask, Tensor) and mask.ndim == 4:  # what the last token may attend to
            seen = mask[:, 0, -1]
            mask = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
            mask = mask[:, : self.past + columns]
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != rows or mask.shape[1] < columns:
            return torch.ones(rows, columns, dtype=torch.bool)
        return mask[:, -columns:].bool()


class Routing:
    """The hooks of one `with` block.

    Args:
        model: The backbone.
        router: Says which edits a prompt is about.
        shelf: The edits.
        threshold: Similarity above which an edit is picked; the router's own by default.
        most_edits: k; the router's own by default.
        on_route: Called with the picks of each prompt's pass.
    """

    def __init__(
        self,
        model: Any,
        router: Router,
        shelf: Shelf,
        *,
        threshold: float | None = None,
        most_edits: int | None = None,
        on_route: Callable[[Picks], None] | None = None,
    ) -> None:
        router.require_backbone(model)
        self.model, self.router, self.shelf, self.on_route = model, router, shelf, on_route
        self.threshold = router.config.threshold if threshold is None else threshold
        self.most_edits = router.config.most_edits if most_edits is None else most_edits
        self.sources = router.sources.modules(model)
        self.lowest = router.config.lowest
        self.layers = modules_to_edit(model, list(dict.fromkeys([self.lowest, *shelf.layers])))
        self._of_thread = threading.local()
        self._last: Call | None = None

    @contextmanager
    def attached(self, *, all_threads: bool = False) -> Iterator[Any]:
        """Hold the hooks while the block runs."""
        readers = {name: self._reader(name) for name in self.sources if name != self.lowest}
        editors = {name: self._editor(name) for name in self.layers}
        decoder = decoder_of(self.model)
        with ExitStack() as stack:
            stack.enter_context(call_preceded(decoder, self._begin, all_threads=all_threads))
            stack.enter_context(hooked({n: self.sources[n] for n in readers}, readers, all_threads=all_threads))
            stack.enter_context(hooked(self.layers, editors, is_edit=True, all_threads=all_threads))
            stack.enter_context(call_hooked(decoder, self._end, all_threads=all_threads))
            yield self.model

    # --- a pass -------------------------------------------------------------------------------------------------

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        call = Call(arguments)
        if call.ids is None and arguments.get("inputs_embeds") is None:
            raise BackboneError(
                f"{type(self.model).__name__} was run without input_ids or inputs_embeds: its rows cannot be told"
            )
        rows, columns = call.shape
        earlier = getattr(call.cache, ROUTE, None) if call.past else None
        if earlier is not None:
            call.earlier = self._here(earlier.repeated(rows))
            call.keeps = call.earlier is not None and columns == 1
        elif not call.past:
            call.earlier = self._step_without_cache(call)
            call.keeps = call.earlier is not None
        if call.keeps:
            call.route = call.earlier
        self._of_thread.call = self._last = call

    def _step_without_cache(self, call: Call) -> Route | None:
        """Return the route of the pass before, if this one is of the same prompts with one token more."""
        before, ids = getattr(self._of_thread, "before", None), call.ids
        if before is None or before.ids is None or ids is None:
            return None
        earlier, prompt = before.ids
        if ids.shape != (len(earlier), earlier.shape[1] + 1) or not torch.equal(ids[:, :prompt], earlier[:, :prompt]):
            return None
        return Route(before.keys, before.pooled, before.picks, before.stacks, (ids.detach(), prompt))

    def _here(self, route: Route | None) -> Route | None:
        """Return a route with the places that its edits have on this shelf; what is gone from it is left out."""
        if route is None:
            return None
        picks = tuple(
            tuple(place for key in keys if (place := self.shelf.place(key)) is not None) for keys in route.keys
        )
        return route if picks == route.picks else Route(route.keys, route.pooled, picks)

    def _reader(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def read(_: Tensor, output: Tensor) -> Tensor:
            call: Call | None = getattr(self._of_thread, "call", None)
            if call is not None and not call.keeps:
                call.states[name] = output
            return output

        return read

    def _editor(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def edit(layer_inputs: Tensor, output: Tensor) -> Tensor:
            call = self._call()
            if call.route is None:
                if name != self.lowest:
                    raise BackboneError(
                        f"{name} is run before {self.lowest}, which the router takes for the lowest edited layer; "
                        f"train a router for these layers (ibke train-router), or take such edits out"
                    )
                call.route = self._route(call, layer_inputs)
            side = self._side(call, name, layer_inputs)
            return output if side is None else (output + side).to(output.dtype)

        return edit

    def _call(self) -> Call:
        call: Call | None = getattr(self._of_thread, "call", None) or self._last
        if call is None:
            raise BackboneError(
                f"a layer of {type(self.model).__name__} was run outside of a pass of the whole model, where no "
                f"prompt can be told; attach a single edit for that"
            )
        return call

    def _end(self, arguments: Mapping[str, Any], output: Any) -> Any:
        call = self._call()
        cache = next(
            (
                c
                for c in (call.cache, getattr(output, "past_key_values", None), getattr(output, "cache_params", None))
                if c is not None
            ),
            None,
        )
        self._of_thread.before = None
        if call.route is not None and cache is not None and not isinstance(cache, tuple):
            with suppress(AttributeError):
                setattr(cache, ROUTE, call.route)
        elif call.route is not None:
            self._of_thread.before = call.route
        self._of_thread.call = None
        call.states.clear()
        return output

    # --- which edits --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _route(self, call: Call, layer_inputs: Tensor) -> Route:
        device = self.router.log_scale.device
        columns = call.shape[1]
        mask = call.mask().to(device)
        states = [
            by_token((layer_inputs if name == self.lowest else self._state(call, name)).detach().to(device), mask)
            for name in self.sources
        ]
        new = self.router.pool(states, mask)
        picks = self._picked(self.router.pooling(new))
        pooled = new
        if call.earlier is not None:  # a prompt that goes on, or another turn
            pooled = call.earlier.pooled.merged(new)
            whole = self._picked(self.router.pooling(pooled))
            picks = tuple(
                one or of_whole or before
                for one, of_whole, before in zip(picks, whole, call.earlier.picks, strict=True)
            )
        if self.on_route is not None:
            self.on_route(picks)
        keys = tuple(tuple(map(self.shelf.key, places)) for places in picks)
        ids = None if call.ids is None else (call.ids.detach(), columns)
        return Route(keys, pooled, picks, ids=ids)

    def _state(self, call: Call, name: str) -> Tensor:
        """Return what was computed at a source; embeddings may have been given in its place."""
        state = call.states.get(name, call.arguments.get("inputs_embeds"))
        if state is None:
            raise BackboneError(
                f"{type(self.model).__name__} does not call {name} before {self.lowest}, so it cannot be read"
            )
        return state

    def _picked(self, vectors: Tensor) -> Picks:
        return distinct_places(self.shelf, vectors, self.threshold, self.most_edits)

    # --- what they add ------------------------------------------------------------------------------------------

    def _side(self, call: Call, name: str, layer_inputs: Tensor) -> Tensor | None:
        """Return what the rows' edits add to a layer's output, None where no row has any."""
        assert call.route is not None
        picks = call.route.picks
        if not any(picks):
            return None
        if name not in call.route.stacks:
            call.route.stacks[name] = self._stacked(name, picks, layer_inputs.device)
        stack = call.route.stacks[name]
        if stack is None:
            return None
        flat = layer_inputs.ndim == 2
        x = by_token(layer_inputs, torch.empty(call.shape)) if flat else layer_inputs
        edited = torch.tensor([row for row, places in enumerate(picks) if places], device=x.device)
        left, right = (matrix.to(x.device) for matrix in stack)
        part = torch.bmm(torch.bmm(x[edited].float(), left), right)
        side = part.new_zeros(*x.shape[:-1], part.shape[-1]).index_copy(0, edited, part)
        return side.flatten(0, 1) if flat else side

    def _stacked(self, name: str, picks: Picks, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return (u, d_in, r) and (u, r, d_out) of the u rows that have edits, padded to one rank."""
        rows = [self.shelf.matrices(places, name) for places in picks if places]
        known = [pair for pair in rows if pair is not None]
        if not known:
            return None
        rank = max(left.shape[1] for left, _ in known)
        d_in, d_out = dimensions(self.layers[name])
        left, right = torch.zeros(len(rows), d_in, rank), torch.zeros(len(rows), rank, d_out)
        for row, pair in enumerate(rows):
            if pair is not None:
                left[row, :, : pair[0].shape[1]] = pair[0]
                right[row, : pair[1].shape[0]] = pair[1]
        return left.to(device), right.to(device)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the module of a model whose call has the tokens, their mask and the cache: the model below its head."""
    called: Any = getattr(model, "_orig_mod", model)
    called = called.get_base_model() if hasattr(called, "get_base_model") else called
    return getattr(called, "base_model", called)


def distinct_places(shelf: Shelf, vectors: Tensor, threshold: float, most_edits: int) -> Picks:
    """Return for each vector the places of the edits nearer than the threshold, each edit once, at most k of them."""
    # an edit of several requests stands on the shelf once for each of them
    similarities, places = shelf.nearest(vectors, SPARE * most_edits)
    picks = []
    for row, near in zip(places.tolist(), similarities.tolist(), strict=True):
        by_key: dict[str, int] = {}
        for place, similarity in zip(row, near, strict=True):
            if similarity > threshold:
                by_key.setdefault(shelf.key(place), place)
        picks.append(tuple(by_key.values())[:most_edits])
    return tuple(picks)
