"""What an edit does to everything else: perplexity and KL on a text that it has nothing to do with, and harness tasks.

The scores are stored with the edit (``scores`` of its ``edit.json``), by names that begin with ``drift/`` and say the
text or task that they were measured on; the edit's card shows them as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.adapter_files import INFO
from ..core.edits import Edit
from ..core.layers import input_device
from ..core.tokens import context_length
from ..hub.cards.edit import DRIFT
from ..io import read_json, write_json

PLAIN_TEXT = Path(__file__).parent / "assets" / "plain_text.txt"
WINDOW = 256  # tokens of a forward pass; the vocabulary's logits of all of them are held twice


@dataclass(frozen=True)
class Drift:
    """What an edit changed on a text that it was not made for.

    Attributes:
        text: Name of the text.
        tokens: Number of predicted tokens.
        perplexity: Before and after: exp of the mean negative log-likelihood of a token.
        kl: KL(before ‖ after) of the next token's distribution, in nats, the mean over tokens.
        same: Share of tokens where the most probable next token is the same.
        tasks: Scores before and after, by ``task/metric``.
    """

    text: str
    tokens: int
    perplexity: tuple[float, float]
    kl: float
    same: float
    tasks: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def scores(self) -> dict[str, float]:
        """Return the measurements by the names that they are stored by."""
        about = f"{DRIFT}{self.text}"
        measured = {
            f"{about}/perplexity/before": self.perplexity[0],
            f"{about}/perplexity/after": self.perplexity[1],
            f"{about}/kl": self.kl,
            f"{about}/same top token": self.same,
            f"{about}/tokens": float(self.tokens),
        }
        for name, (before, after) in self.tasks.items():
            measured |= {f"{DRIFT}{name}/before": before, f"{DRIFT}{name}/after": after}
        return measured


@torch.no_grad()
def measure_drift(model: Any, tokenizer: Any, edit: Edit, texts: Sequence[str], name: str) -> Drift:
    """Read a text without the edit and with it, window by window.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        edit: A single edit of any kind.
        texts: Paragraphs, read as one text.
        name: Of the text.

    Raises:
        ValueError: If the edit holds several independent ones, or the text is shorter than two tokens.
    """
    if len(edit) != 1:
        raise ValueError(f"drift is that of one edit, found {len(edit)} independent ones; choose one, such as edit[0]")
    tokens, losses, kl, same = 0, [0.0, 0.0], 0.0, 0
    for ids in _windows(model, tokenizer, texts):
        before = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        with edit.attached(model):
            after = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        targets = ids[0, 1:, None].to(before.device)
        losses = [
            loss - float(part.gather(-1, targets).double().sum())
            for loss, part in zip(losses, (before, after), strict=True)
        ]
        kl += float((before.exp() * (before - after)).double().sum())
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        tokens += len(targets)
    if not tokens:
        raise ValueError(f"{name}: holds fewer than two tokens; give a longer text")
    before_loss, after_loss = (loss / tokens for loss in losses)
    return Drift(name, tokens, (_exp(before_loss), _exp(after_loss)), max(kl / tokens, 0.0), same / tokens)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # the largest that a float holds


def _windows(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[torch.Tensor]:
    """Yield token ids (1, l) of at most a window; the tokens that join two windows are predicted in neither."""
    ids = [token for text in texts for token in tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]]
    size = min(WINDOW, context_length(model) or WINDOW)
    device = input_device(model)
    for start in range(0, len(ids), size):
        if len(window := ids[start : start + size]) > 1:
            yield torch.tensor([window], device=device)


def store(folder: str | Path, drift: Drift) -> bool:
    """Write the scores into the ``edit.json`` of a saved edit, in place of those of an earlier measurement.

    Returns:
        Whether there is such a file here to hold them; a plain LoRA adapter has none, and an id lies on the Hub.
    """
    file = Path(folder) / INFO
    if not file.is_file():
        return False
    content = read_json(file)
    old = {k: v for k, v in content.get("scores", {}).items() if not k.startswith(DRIFT)}
    write_json(file, {**content, "scores": {**old, **drift.scores()}}, indent=2, ensure_ascii=False)
    return True
