"""How far an edit can be cut: quality, size and interference by rank (the paper's open question)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.records import EditRecord
from ..evaluation.protocol import evaluate_records

RANKS = (1, 2, 4)
MANY = 100  # edits that are solved together
AFTERWARDS, IN_THE_LOOP = "cut afterwards", "cut in training too"
FULL = "full"
SCORES = ("reliability", "generality", "locality", "avg")
SIZED = 32  # edits of one batch, whose sizes are measured


@contextmanager
def edits_of_rank(editor: Any, rank: int) -> Iterator[None]:
    """Have an editor's edits cut to a rank, 0 for none, for the length of the block."""
    before, editor.config.edit_rank = editor.config.edit_rank, rank
    try:
        yield
    finally:
        editor.config.edit_rank = before


def quality_by_rank(
    editors: Mapping[str, Mapping[int, Mapping[int, Any]]],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    many: int = MANY,
    batch_size: int = 64,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the data of the figure of ranks.

    Args:
        editors: By line of the figure, such as ``"cut afterwards"``, by rank (0: whole edits), by seed of the
            training: the editor. Editors of the same line may be one and the same.
        model: The backbone.
        tokenizer: Its tokenizer.
        records: The edits.
        many: Number of edits that are carried at once, solved; fewer records than that leave them out.
        batch_size: Prompts of a forward pass.
        told: Called with what is measured next.

    Returns:
        ``records``, ``many`` (None where it was left out), and ``editors``: by line, rank (``"full"`` for whole edits)
        and seed ``alone`` and ``together`` (each reliability, generality, locality and avg in percent), ``bytes`` of
        an edit, and ``relative_error``, the mean over edits of the worst layer's ‖ΔW - ΔW_r‖ / ‖ΔW‖.

    Raises:
        ValueError: If there is no record.
    """
    if not records:
        raise ValueError("no record is given; the figure of ranks needs at least one")
    counted = many if len(records) >= many else None
    lines: dict[str, Any] = {}
    for line, by_rank in editors.items():
        lines[line] = {}
        for rank, by_seed in by_rank.items():
            key = str(rank) if rank else FULL
            told(f"ranks: {line}, rank {key}")
            lines[line][key] = {
                str(seed): _measured(editor, rank, model, tokenizer, records, counted, batch_size)
                for seed, editor in by_seed.items()
            }
    return {"figure": "ranks", "records": len(records), "many": counted, "editors": lines}


def _measured(
    editor: Any,
    rank: int,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    many: int | None,
    batch_size: int,
) -> dict[str, Any]:
    requests = [record.requests[0] for record in records[:SIZED]]
    with edits_of_rank(editor, 0):
        whole = editor.edit(model, tokenizer, requests, mode="independent", composition="sum")
    each = [one.truncate(rank) if rank else one for one in whole]
    with edits_of_rank(editor, rank):
        scores = {"alone": _scores(editor, model, tokenizer, records, 1, batch_size)}
        if many:
            scores["together"] = _scores(editor, model, tokenizer, records, many, batch_size)
    errors = [max(one.relative_error.values(), default=0.0) for one in each]
    # Of a batch of edits every one is padded to the longest request: whole ones are counted by their own tokens.
    widths = {name: one.shape[2] + whole.outputs[name].shape[2] for name, one in whole.inputs.items()}
    sizes = [4 * sum(_rank(one, name) * width for name, width in widths.items()) for one in each]
    return {
        **scores,
        "bytes": round(sum(sizes) / len(sizes)),
        "relative_error": round(sum(errors) / len(errors), 4),
    }


def _rank(edit: Any, name: str) -> int:
    """Return how many rows of a layer's factors are not padding."""
    return int((edit.outputs[name][0].abs().sum(-1) > 0).sum())


def _scores(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    number: int,
    batch_size: int,
) -> dict[str, float | None]:
    how: dict[str, Any] = {"sequential": number, "batch_size": batch_size, "generate": False, "progress": False}
    summary = evaluate_records(editor, model, tokenizer, records, **how).summary
    return {name: None if summary[name] is None else round(summary[name], 2) for name in SCORES}
