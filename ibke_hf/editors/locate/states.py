"""What a module reads and writes at the subjects' last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.capture import read_layers
from ...core.edit_values import Edit
from ...core.layers import plain_name
from .config import LocateConfig
from .texts import SubjectTexts

HIDDEN = "hidden states"  # names the last edited block among modules that are read


@contextmanager
def carrying(model: Any, edits: Sequence[Edit], rows: Tensor) -> Iterator[None]:
    """Attach edits, those of several rows by `rows`."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.attached(model, rows))
        yield


@dataclass(frozen=True)
class State:
    """A module at the subjects' last tokens, averaged over the texts of each request (Meng et al. 2022, Eq. 3), fp32.

    Attributes:
        inputs: (n, d_in); of an FFN output projection the keys.
        outputs: (n, d_out).
        norms: Mean ‖output‖ (n,).
    """

    inputs: Tensor
    outputs: Tensor
    norms: Tensor


def read_states(
    model: Any, modules: Mapping[str, nn.Module], asked: SubjectTexts, edits: Sequence[Edit], texts_at_once: int
) -> dict[str, State]:
    """Read modules at the subjects' last tokens, on the model that carries the edits."""
    readings: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    for part in asked.parts(texts_at_once):
        with carrying(model, edits, part.owners):
            read = read_layers(model, modules, part.batch)
        columns = part.columns()
        for name, tensors in read.items():
            inputs, outputs = (tensor[columns.to(tensor.device)].float() for tensor in tensors)
            readings[name].append((inputs, outputs))
    states = {}
    for name, pairs in readings.items():
        inputs, outputs = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        states[name] = State(asked.mean(inputs), asked.mean(outputs), asked.mean(outputs.norm(dim=-1)))
    return states


def last_block(model: Any, config: LocateConfig) -> nn.Module:
    """Return the decoder block of the last edited layer."""
    template = config.edited_modules
    name = template[: template.index("{i}") + 3].format(i=max(config.edited_layers))
    return next(module for path, module in model.named_modules() if plain_name(path) == name)
