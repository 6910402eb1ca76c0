"""What ratios are measured on: a backbone, real or of its shape with random weights, an editor for it, and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.layers import input_device
from ..core.records import EditCase, EditRecord, EditRequest
from ..core.tokens import TokenBatch, encode_requests
from ..editors.catalogue import editor_class
from ..training.needs import SHAPES
from ..training.width import fit_width

TOKENS = (10, 16)  # of a request with its target
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A backbone, a calibrated editor for it, and records of like lengths.

    Attributes:
        model: The backbone, frozen.
        tokenizer: Its tokenizer.
        editor: An editor, untrained: what it costs does not depend on its weights.
        records: Each with one request, one generality and one locality case.
        about: The backbone in words.
    """

    model: Any
    tokenizer: Any
    editor: Any
    records: Sequence[EditRecord]
    about: str

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return input_device(self.model)

    def requests(self, number: int) -> list[EditRequest]:
        """Return `number` requests."""
        return [record.requests[0] for record in self.some_records(number)]

    def some_records(self, number: int) -> list[EditRecord]:
        """Return `number` records, which begin anew where there are fewer."""
        return [self.records[i % len(self.records)] for i in range(number)]

    def batch(self, number: int) -> TokenBatch:
        """Return `number` requests as tokens."""
        return encode_requests(self.tokenizer, self.requests(number)).to(self.device)

    def shape(self, number: int) -> str:
        """Return the shape of `number` requests in words."""
        lengths = self.batch(number).attention_mask.sum(1)
        low, high = int(lengths.min()), int(lengths.max())
        config = self.editor.config
        layers = ", ".join(map(str, config.edited_layers))
        tokens = f"{low} to {high}" if low < high else f"{low}"
        return f"{number} × {tokens} tokens, layers {layers}, d_m {config.latent_dim}"


def random_backbone(name: str) -> Any:
    """Return a backbone of a known shape with random weights.

    Raises:
        ValueError: If the shape is not known.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if name not in SHAPES:
        raise ValueError(f"{name}: no shape is known by this name; there are {', '.join(SHAPES)}")
    kind, fields = SHAPES[name]
    config: Any = CONFIG_MAPPING[kind](**fields)
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def new_subject(
    model: Any,
    tokenizer: Any,
    facts: Sequence[tuple[str, str, str, str, str]],
    about: str,
    *,
    layers: Sequence[int] | None = None,
    editor_fields: Mapping[str, Any] | None = None,
) -> Subject:
    """Make the editor that `ibke train` would make for a backbone, and records of facts.

    Args:
        model: The backbone; it is frozen by this.
        tokenizer: Its tokenizer.
        facts: Prompt, target, another wording, and a question about something else with its answer.
        about: The backbone in words.
        layers: Edited layers; by default three that end just before the middle.
        editor_fields: Fields of the editor's config; by default its width is chosen by the backbone's size.

    Raises:
        ValueError: If there are no facts.
    """
    if not facts:
        raise ValueError("there are no facts to measure edits of")
    model.requires_grad_(False)
    torch.manual_seed(SEED)
    fields = fit_width("ibke", model, layers, editor_fields or {})
    editor = editor_class("ibke").for_backbone(model, layers, **fields).to(input_device(model)).eval()
    records = [_record(i, *fact) for i, fact in enumerate(facts)]
    lengths = {r.id: len(encode_requests(tokenizer, r.requests).input_ids[0]) for r in records}
    low, high = TOKENS
    records.sort(key=lambda r: max(low - lengths[r.id], lengths[r.id] - high, 0))  # those of the lengths come first
    subject = Subject(model, tokenizer, editor, records, about)
    editor.calibrate(model, [subject.batch(min(len(records), 32))])
    return subject


def _record(number: int, prompt: str, target: str, rephrased: str, question: str, answer: str) -> EditRecord:
    return EditRecord(
        f"fact {number}",
        "benchmark",
        "general",
        (EditRequest(prompt, target),),
        (EditCase(rephrased, target),),
        (EditCase(question, answer),),
    )
