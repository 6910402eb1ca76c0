"""What SERAC's edits are: memories of requests, and the hook by which another model answers what is in scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import LayerHook, call_hooked, require_row_per_edit
from ...core.tokens import IGNORED, TokenBatch
from ..memory import MemoryEdit

Entry = tuple[list[int], int]  # token ids of prompt and target, and the place of the first target token


def memory_of(rows: Sequence[Sequence[Entry]]) -> dict[str, Tensor]:
    """Return the tensors of n memories; of entries of one memory with the same prompt, the last one stays."""
    kept = [list({tuple(ids[:start]): (ids, start) for ids, start in row}.values()) for row in rows]
    most, longest = max(map(len, kept)), max(len(ids) for row in kept for ids, _ in row)
    memory = {"ids": torch.zeros(len(rows), most, longest, dtype=torch.long)}
    memory |= {name: torch.zeros(len(rows), most, dtype=torch.long) for name in ("lengths", "starts")}
    for row, entries in enumerate(kept):
        for place, (ids, start) in enumerate(entries):
            memory["ids"][row, place, : len(ids)] = torch.tensor(ids)
            memory["lengths"][row, place], memory["starts"][row, place] = len(ids), start
    return memory


@dataclass(frozen=True, eq=False)
class SERACEdit(MemoryEdit):
    """n independent memories of requests; the weights that read them are the editor's, and not saved with the edit.

    Attributes:
        memory: ``ids`` (n, m, t) token ids of each request, ``lengths`` (n, m), 0 where there is none, ``starts`` (n,
            m), the place of the first target token.
        editor: The :class:`~ibke_hf.editors.serac.SERACEditor`; an edit that was loaded gets it by
            :meth:`with_editor`.
    """

    kind = "serac"

    editor: Any = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        super().__post_init__()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.memory.items()}
        if (
            set(shapes) != {"ids", "lengths", "starts"}
            or not shapes["ids"][:2] == shapes["lengths"] == shapes["starts"]
        ):
            raise ValueError(f"a memory needs ids (n, m, t), lengths and starts (n, m), found {shapes}")

    def entries(self) -> list[list[Entry]]:
        """Return the requests of each memory, the oldest first."""
        ids, lengths, starts = (self.memory[name].tolist() for name in ("ids", "lengths", "starts"))
        return [
            [(tokens[:length], start) for tokens, length, start in zip(*row, strict=True) if length]
            for row in zip(ids, lengths, starts, strict=True)
        ]

    def with_editor(self, editor: Any) -> SERACEdit:
        """Return the edit with the editor whose weights read it."""
        return replace(self, editor=editor)

    @classmethod
    def from_pretrained(cls, name_or_path: Any, editor: Any = None, **hub_arguments: Any) -> SERACEdit:
        """Load a saved memory from a folder or the Hub, for the editor that reads it.

        Raises:
            AdapterError: If a file is missing or damaged, or the edit is of another kind.
        """
        edit = super().from_pretrained(name_or_path, **hub_arguments)
        assert isinstance(edit, SERACEdit)
        return edit.with_editor(editor)

    def to(self, *args: Any, **kwargs: Any) -> SERACEdit:
        """Return the edit on another device; token ids have no other dtype."""
        device = self.memory["ids"].to(*args, **kwargs).device
        return replace(self, memory={name: tensor.to(device) for name, tensor in self.memory.items()})

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return none: SERAC hooks no layer but the whole model, see :meth:`attached`."""
        self.reader().modules_of(model)
        return {}

    def reader(self) -> Any:
        """Return the editor.

        Raises:
            ValueError: If the edit has none.
        """
        if self.editor is None:
            raise ValueError(
                "this memory was loaded without the editor whose weights read it; use SERACEdit.from_pretrained(name, "
                "editor=...) or edit.with_editor(editor)"
            )
        return self.editor

    @contextmanager
    def attached(
        self, model: nn.Module, rows: Tensor | None = None, *, all_threads: bool = False
    ) -> Iterator[nn.Module]:
        """Edit the model for the code inside the block; out of scope its logits stay as they are, bit for bit.

        A forward pass over several tokens decides for each of them by what is before it, so that a target that is fed
        tells nothing. In a generation the decision falls at the end of the prompt and stays. The block must hold the
        whole generation, and the model itself must be called, since the ids are read from its arguments.

        Args:
            model: The backbone.
            rows: (batch,) which edit each row of the batch carries; see
                :meth:`ibke_hf.core.edits.WeightEdit.attached`.
            all_threads: Edit the model for every thread that has no edit of its own, as streaming needs it; see there.

        Raises:
            BackboneError: If the model has another vocabulary than the editor.
            IndexError: If `rows` names an edit that does not exist.
            ValueError: If there is no editor; on a forward pass without token ids, with labels, of another number of
                rows than edits, or that goes on from a prompt that was read outside of the block.
        """
        edit = self if rows is None or len(self) == 1 else self.select(rows)
        edit.hooks(model)
        with call_hooked(model, _Reading(edit, shared=len(self) == 1), all_threads=all_threads):
            yield model


class _Reading:
    """The hook of one block: the tokens of the generation that runs in it, and which entry each row is in scope of.

    Attributes:
        ids: (b, l) tokens so far; `mask` likewise.
        decided: (b,) entry that each row is in scope of, -1 for none.
    """

    def __init__(self, edit: SERACEdit, *, shared: bool) -> None:
        self.editor, memories = edit.reader(), edit.entries()
        self.entries = [entry for memory in memories for entry in memory]
        self.owners = torch.arange(len(edit)).repeat_interleave(torch.tensor([len(memory) for memory in memories]))
        self.shared, self.number = shared, len(edit)
        self.embedded, self.cache = self.editor.remember(self.entries), None
        self.ids, self.mask, self.decided = (torch.zeros(0, 0, dtype=torch.long) for _ in range(3))

    def __call__(self, arguments: Mapping[str, Any], output: Any) -> Any:
        """Return the output with the logits in scope replaced, the very same object if there are none."""
        logits = output[0] if isinstance(output, tuple) else output.logits
        before = self._read(arguments, output)
        columns = before + _columns(arguments.get("logits_to_keep", 0), logits.shape[1], self.ids.shape[1] - before)
        judged_places = torch.zeros_like(self.mask).index_fill(1, columns, 1) * self.mask
        order = self.mask.argsort(dim=1, stable=True)  # padding first, wherever it was
        ids, mask, judged_places = (tensor.gather(1, order) for tensor in (self.ids, self.mask, judged_places))
        chosen = self._choose(ids, mask, judged_places.bool(), going_on=before > 0)
        if not (chosen >= 0).any():
            return output
        pairs = sorted(
            {(row, entry) for row, column in (chosen >= 0).nonzero().tolist() for entry in [int(chosen[row, column])]}
        )
        rows = torch.tensor([row for row, _ in pairs])
        here = chosen[rows] == torch.tensor([[entry] for _, entry in pairs])
        cases = TokenBatch(ids[rows], mask[rows], torch.where(here, 0, IGNORED))
        answers = self.editor.answer([self.entries[entry] for _, entry in pairs], cases)
        pair, place = here.nonzero(as_tuple=True)
        column_of = torch.zeros(self.ids.shape[1], dtype=torch.long).index_copy(0, columns, torch.arange(len(columns)))
        replaced = logits.clone()
        where = tuple(index.to(logits.device) for index in (rows[pair], column_of[order[rows[pair], place]]))
        replaced[where] = answers.to(logits.device, logits.dtype)
        return (replaced, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "logits": replaced})

    def _read(self, arguments: Mapping[str, Any], output: Any) -> int:
        """Take in the tokens of a call; return how many were read before it."""
        ids, mask, cache = (arguments.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None or arguments.get("labels") is not None:
            what = "token ids" if ids is None else "a call without labels, whose loss would be of the unedited logits"
            raise ValueError(f"SERAC needs {what}; pass input_ids alone to the model")
        require_row_per_edit(self.number, ids.unsqueeze(-1), shared=self.shared)
        ids, held = ids.detach().cpu(), cache if cache is not None else getattr(output, "past_key_values", None)
        before = int(held.get_seq_length()) - ids.shape[1] if held is not None else 0
        if before and (len(self.ids) != len(ids) or self.ids.shape[1] < before):
            raise ValueError(
                f"the model goes on from {before} tokens that it read before the edit was attached, or of other "
                f"rows; attach "
                "the edit around the whole generation"
            )
        past = (self.ids[:, :before], self.mask[:, :before]) if before else (ids[:, :0], ids[:, :0])
        fresh = torch.cat((past[1], torch.ones_like(ids)), 1)
        self.ids = torch.cat((past[0], ids), 1)
        self.mask = fresh if mask is None or mask.ndim != 2 else mask.detach().cpu().long()[:, : self.ids.shape[1]]
        self._follow(cache)
        return before

    def _choose(self, ids: Tensor, mask: Tensor, judged_places: Tensor, *, going_on: bool) -> Tensor:
        """Return the entry of each judged place, -1 for none and elsewhere: (b, l)."""
        if going_on:
            return torch.where(judged_places, self.decided.unsqueeze(1), -1)
        judged = judged_places.clone()
        judged[:, -1] = True  # the last token of every row, which a generation goes on from
        rows = torch.zeros(len(ids), dtype=torch.long) if self.number == 1 else torch.arange(len(ids))
        cases = TokenBatch(ids, mask, torch.where(judged, 0, IGNORED))
        chosen = torch.full(ids.shape, -1)
        chosen[judged] = self.editor.decide(self.embedded, self.entries, self.owners, cases, rows).cpu()
        self.decided = chosen[:, -1]
        return torch.where(judged_places, chosen, -1)

    def _follow(self, cache: Any) -> None:
        """Have beam search, which reorders the rows of its cache, reorder ours."""
        if cache is None or cache is self.cache or not hasattr(cache, "reorder_cache"):
            return
        self.cache, reorder = cache, cache.reorder_cache

        def reorder_both(beams: Tensor) -> None:
            reorder(beams)
            order = beams.cpu()
            self.ids, self.mask, self.decided = (
                tensor.index_select(0, order) for tensor in (self.ids, self.mask, self.decided)
            )

        cache.reorder_cache = reorder_both


def _columns(kept: Any, number: int, width: int) -> Tensor:
    """Return which of the `width` columns of a call its `number` columns of logits belong to."""
    return (
        kept.detach().cpu().long() if isinstance(kept, Tensor) and kept.ndim else torch.arange(width - number, width)
    )
