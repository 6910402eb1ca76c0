"""One forward pass of a batch that answers each text as if it were alone, also where a model ignores the mask.

Texts are padded on the left, which aligns their ends. A model that takes no attention mask, or no positions, may read
padding as text: recurrent models do, and decoders that count positions from the first column. What such a model does
is tried once, and then its rows are moved to the left, so that padding comes after the text, where a causal model
cannot see it. Hooks of layers and callers are shown the batch as it was padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attachment import MovedColumns, columns_moved, detached, prompts_marked
from .layers import BackboneError, input_device
from .tokens import IGNORED, TokenBatch

SHORT, LONG = 7, 16  # tokens of the two texts of the trial; an odd shift tells windows that are counted in columns
Padding = Literal["left", "right", "none"]
_padding: WeakKeyDictionary[nn.Module, Padding] = WeakKeyDictionary()


def target_logits(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Run the model, with the vocabulary projection on the columns that hold targets only.

    Returns:
        Logits (b, k, vocabulary) of the last k columns, in the model's dtype, and their labels (b, k).

    Raises:
        BackboneError: If the batch is padded and the model answers padded texts otherwise than single ones.
    """
    with prompts_marked(_prompts(batch)):
        logits = _last_columns(model, batch, batch.kept)
    return logits, batch.labels[:, -batch.kept :].to(logits.device)


def _prompts(batch: TokenBatch) -> Tensor:
    """Return the mask (b, l) of the tokens before the first target: what a model is given when it answers freely."""
    judged = (batch.labels != IGNORED).int()
    return batch.attention_mask.bool() & (judged.cumsum(-1) - judged == 0)


def last_states(model: Any, batch: TokenBatch) -> Tensor:
    """Run a model without a head: its states (b, l, d) behind the last block.

    Raises:
        BackboneError: If the batch is padded and the model reads padded texts otherwise than single ones.
    """
    return _last_columns(model, batch, batch.input_ids.shape[1])


def _last_columns(model: Any, batch: TokenBatch, kept: int) -> Tensor:
    """Return what the model gives for the last `kept` columns of a batch, as the caller has padded it."""
    width, columns = batch.input_ids.shape[1], _columns_to_move(model, batch)
    if columns is None:
        with columns_moved(None):
            return _output(model, batch, torch.arange(width - kept, width))
    needed = columns.of_caller[:, -kept:]
    first = int(needed.min())
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    moved = TokenBatch(*(tensor.gather(1, columns.of_model) for tensor in tensors))
    with columns_moved(columns):
        output = _output(model, moved, torch.arange(first, width))
    needed = (needed - first).to(output.device)
    return output[torch.arange(len(batch), device=output.device).unsqueeze(1), needed]


def padding_of(model: Any) -> Padding:
    """Return on which side a model may be padded so that each text is answered as if it were alone.

    Ordinary models take an attention mask and positions, and hold neither a convolution nor positions of their own:
    they are padded on the left. What another model does is tried once, with a few tokens.

    Returns:
        ``"left"``, else ``"right"``, else ``"none"``.
    """
    if not isinstance(model, nn.Module):
        return "left"
    if model not in _padding:
        _padding[model] = _tried(model) if _may_read_padding(model) else "left"
    return _padding[model]


def _may_read_padding(model: nn.Module) -> bool:
    if not {"attention_mask", "position_ids"} <= _accepted_arguments(model):
        return True
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return True
    return any(
        "position" in name.rpartition(".")[2] for name, _ in chain(model.named_parameters(), model.named_buffers())
    )


@torch.no_grad()
def _tried(model: Any) -> Padding:
    """Ask a short text alone, and beside a longer one with padding before or after it."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    long = (torch.arange(1, LONG + 1) * (vocabulary // 3 + 1)) % vocabulary
    with detached(), columns_moved(None), evaluating(model):
        text = long[None, :SHORT]
        alone = _output(model, TokenBatch(text, torch.ones_like(text), text), torch.tensor([SHORT - 1]))[0, -1].float()
        for side in ("left", "right"):
            first = LONG - SHORT if side == "left" else 0
            mask = torch.zeros(2, LONG, dtype=torch.long)
            mask[0], mask[1, first : first + SHORT] = 1, 1
            ids = torch.stack([long, long.roll(first)]) * mask
            output = _output(model, TokenBatch(ids, mask, ids), torch.arange(LONG))
            difference = (output[1, first + SHORT - 1].float() - alone).norm() / (alone - alone.mean()).norm()
            if not difference > torch.finfo(output.dtype).eps ** 0.5:  # also where the model's answer is not finite
                return side
    return "none"


def _columns_to_move(model: Any, batch: TokenBatch) -> MovedColumns | None:
    """Return how the rows of a batch are moved to the left, or None where they need not be."""
    padding = padding_of(model)
    if padding == "left" or bool(batch.attention_mask.all()):
        return None
    if padding == "none":
        raise BackboneError(
            f"{type(model).__name__}: a text in a batch with a longer one is answered otherwise than alone, on "
            "whichever side it is padded; give it one text at a time (batch_size=1, one request an edit)"
        )
    first = batch.attention_mask.argmax(-1, keepdim=True)
    if not first.any():
        return None  # padded on the right already
    width = batch.input_ids.shape[1]
    here = torch.arange(width, device=first.device)
    return MovedColumns(of_caller=(here - first) % width, of_model=(here + first) % width)


def _output(model: Any, batch: TokenBatch, columns: Tensor) -> Tensor:
    """Return the logits, or the states of a model without a head, of the columns named, the last ones of the batch."""
    batch = batch.to(input_device(model))
    accepted = _accepted_arguments(model)
    extra: dict[str, Any] = {"position_ids": batch.position_ids} if "position_ids" in accepted else {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = columns
    if accepted & {"attention_mask", "kwargs"}:
        extra["attention_mask"] = batch.attention_mask
    output = model(input_ids=batch.input_ids, use_cache=False, **extra)
    values: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return values[:, -len(columns) :]


def _accepted_arguments(model: Any) -> set[str]:
    base = getattr(model, "_orig_mod", model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return set(inspect.signature(base.forward).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and back; GPT-2 has dropout."""
    if not model.training:
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
