"""Forward passes over some blocks of a decoder: up to one, from one on, or behind the last.

Blocks that are left out pass the hidden state through, for the length of one pass and the thread that runs it alone;
the states that a pass begins with take the place of what the block before has handed on. A decoder whose blocks hand
on more than one hidden state cannot be run so. That is tried with two texts at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attachment import hooked
from ..core.forward import evaluating, padding_of, target_logits
from ..core.layers import plain_name
from ..core.shards import is_sharded
from ..core.tokens import IGNORED, TokenBatch

_left_out: ContextVar[frozenset[int]] = ContextVar("ibke_hf_blocks_left_out", default=frozenset())
_replacing = RLock()  # a block's method is replaced by one thread at a time
LENGTHS, TARGETS = (16, 11), 3  # of the two texts of the trial, and how many of their tokens are judged
ANSWERS = 8  # logits of each judged token that are kept


class PartialForwardError(ValueError):
    """A decoder that cannot be run in parts; the message says why."""


class _Reached(Exception):  # noqa: N818  control flow
    """The pass has come to the block that it was to run to."""


class PartialForward:
    """Runs a decoder in parts, split below its lowest edited block.

    Args:
        model: The decoder, in one piece on one device.
        names: Names of the edited layers, such as ``model.layers.3.mlp.down_proj``.

    Attributes:
        answers: Some logits of the texts of the trial, by which the model is known again.

    Raises:
        PartialForwardError: If the decoder cannot be run so.
    """

    answers: Tensor

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = model
        self.blocks, self.start = _blocks(model, names)
        self._tuples: dict[int, int] = {}  # how many entries a block returns, of those that return a tuple
        if next((True for parameter in model.parameters() if parameter.is_meta), False):
            raise PartialForwardError("its weights are offloaded")
        if is_sharded(model):
            raise PartialForwardError("its weights are sharded over processes")
        if padding_of(model) == "none":
            raise PartialForwardError("it reads padding as text")
        self._try()

    # --- the parts ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lower(self, batch: TokenBatch) -> Tensor:
        """Return the states (b, l, d) that enter the lowest edited block."""
        return self._run_to(batch, self.start)

    def upper(self, batch: TokenBatch, states: Tensor | None) -> Tensor:
        """Return the states (p, d) behind the last block at the judged positions, row after row.

        Args:
            batch: The texts.
            states: What :meth:`lower` gives of them; None where the lowest edited block is the first.
        """
        with self.beginning_with(states):
            output = self._run_to(batch, len(self.blocks))
        return output[(batch.labels != IGNORED).to(output.device)]

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (p, vocabulary) of states (p, d) behind the last block."""
        ones = torch.ones(len(states), 1, dtype=torch.long)
        with evaluating(self.model), self._from(len(self.blocks), states.unsqueeze(1)):
            return target_logits(self.model, TokenBatch(ones, ones, ones))[0][:, 0]

    def beginning_with(self, states: Tensor | None) -> AbstractContextManager[None]:
        """Have the model's passes begin at the lowest edited block, with what :meth:`lower` gives of their texts."""
        return nullcontext() if states is None else self._from(self.start, states)

    def _run_to(self, batch: TokenBatch, end: int) -> Tensor:
        """Run the blocks before block `end` and return what the last of them hands on."""
        reached: list[Tensor] = []

        def stop(_: Tensor, output: Tensor) -> Tensor:
            reached.append(output)
            raise _Reached

        try:
            with evaluating(self.model), hooked({"": self.blocks[end - 1]}, {"": stop}):
                target_logits(self.model, batch)
        except _Reached:
            return reached[0]
        raise PartialForwardError("its blocks are not called one after another")

    @contextmanager
    def _from(self, start: int, states: Tensor) -> Iterator[None]:
        """Begin at block `start` with these states (b, l, d) in place of what the block before hands on."""

        def begin(_: Tensor, output: Tensor) -> Tensor:
            return states.to(output.device, output.dtype)

        with self._leaving_out(start), hooked({"": self.blocks[start - 1]}, {"": begin}):
            yield

    @contextmanager
    def _leaving_out(self, number: int) -> Iterator[None]:
        """Have the first blocks pass the hidden state through."""
        blocks = self.blocks[:number]
        with _replacing:
            token = _left_out.set(frozenset(map(id, blocks)))
            previous = [vars(block).get("forward") for block in blocks]
            try:
                for place, block in enumerate(blocks):
                    block.forward = self._passing(block, block.forward, self._tuples.get(place))
                yield
            finally:
                for block, method in zip(blocks, previous, strict=True):
                    if method is None:
                        vars(block).pop("forward", None)
                    else:
                        block.forward = method
                _left_out.reset(token)

    @staticmethod
    def _passing(block: nn.Module, method: Any, entries: int | None) -> Any:
        """Return a block's method for the time that this thread leaves it out; other threads call it as before."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if id(block) not in _left_out.get():
                return method(*args, **kwargs)
            states = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
            return states if entries is None else (states, *[None] * (entries - 1))

        return forward

    # --- the trial ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _try(self) -> None:
        """Compare the parts with the whole on two texts of unlike lengths."""
        batch = _texts(int(self.model.get_input_embeddings().weight.shape[0]))
        try:
            with evaluating(self.model):
                whole = self._whole(batch).float().flatten(0, 1)
                states = self.lower(batch) if self.start else None
                if states is not None and states.shape[:2] != batch.input_ids.shape:
                    raise PartialForwardError("its blocks do not hand on one state for each token")
                parts = self.head(self.upper(batch, states)).float()
        except PartialForwardError:
            raise
        except Exception as error:  # whatever a foreign model raises is the reason
            reason = " ".join(str(error).split())[:200]
            raise PartialForwardError(f"its blocks do not run in parts ({type(error).__name__}: {reason})") from error
        self.answers = whole[:, :ANSWERS].flatten().cpu()
        difference = (parts - whole).norm() / (whole - whole.mean()).norm()
        if not difference <= torch.finfo(self.model.dtype).eps ** 0.5:
            raise PartialForwardError(
                f"run in parts it answers otherwise than as a whole (by {float(difference):.2g} of its logits)"
            )

    def _whole(self, batch: TokenBatch) -> Tensor:
        """Return the logits of the whole model, and note what its blocks return."""
        handles = [
            block.register_forward_hook(lambda _, __, output, place=place: self._note(place, output))
            for place, block in enumerate(self.blocks)
        ]
        try:
            return target_logits(self.model, batch)[0]
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, place: int, output: Any) -> None:
        if isinstance(output, tuple):
            if any(isinstance(entry, Tensor) for entry in output[1:]) and place < self.start:
                raise PartialForwardError("its blocks hand on more than a hidden state")
            self._tuples[place] = len(output)
        elif not isinstance(output, Tensor):
            raise PartialForwardError(f"its blocks return a {type(output).__name__}")


def _texts(vocabulary: int) -> TokenBatch:
    width = max(LENGTHS)
    ids = (torch.arange(1, 2 * width + 1) * (vocabulary // 3 + 1) % vocabulary).view(2, width)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in LENGTHS])
    labels = torch.where(torch.arange(width) >= width - TARGETS, ids, IGNORED)
    return TokenBatch(ids * mask, mask, labels)


def _blocks(model: nn.Module, names: Sequence[str]) -> tuple[list[Any], int]:
    """Return the decoder's blocks in their order, and the place of the lowest edited one."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    parts = [name.split(".") for name in names]
    places = [next((i for i, part in enumerate(name) if part.isdigit()), 0) for name in parts]
    prefix = ".".join(parts[0][: places[0]])
    container = modules.get(prefix)
    if not prefix or not isinstance(container, nn.ModuleList):
        raise PartialForwardError("its edited layers are not in a list of blocks")
    if any(".".join(name[:place]) != prefix for name, place in zip(parts, places, strict=True)):
        raise PartialForwardError("its edited layers are in several lists of blocks")
    return list(container), min(int(name[place]) for name, place in zip(parts, places, strict=True))
