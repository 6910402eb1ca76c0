"""The card of an edit: its requests, backbone and scores, how to load it with PEFT and with us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .text import base_model_metadata, fenced, page, public_name

MOST_REQUESTS = 20  # that a card lists
DRIFT = "drift/"  # begins the names of scores that say what an edit does to everything else


def edit_card(edit: Any, repo_id: str, *, parts: bool = False, **metadata: Any) -> ModelCard:
    """Write the card of a low-rank edit: requests, backbone, editor, scores, how to load it with PEFT and with us.

    Args:
        edit: A :class:`~ibke_hf.LowRankEdit`, as it is published.
        repo_id: Where it is published.
        parts: Whether the edits that it was solved from lie beside it.
        metadata: Metadata of the card.
    """
    info, rank = edit.info, max(edit.ranks.values())
    data = ModelCardData(
        **{
            "library_name": "peft",
            "tags": ["lora", "knowledge-editing", "model-editing", "ibke-hf"],
            **base_model_metadata(info.backbone),
            **metadata,
        }
    )
    shown, more = info.requests[:MOST_REQUESTS], len(info.requests) - MOST_REQUESTS
    lines = [
        f"{json.dumps(r.prompt, ensure_ascii=False)} -> {json.dumps(r.target, ensure_ascii=False)}" for r in shown
    ]
    requests = (
        fenced("\n".join(lines) + (f"\nand {more} more, see edit.json" if more > 0 else ""), "text")
        if lines
        else "Not stated."
    )
    scores = ", ".join(f"{name} {value:.1f}" for name, value in info.scores.items() if not name.startswith(DRIFT))
    facts = {
        "edited layers": ", ".join(edit.layers),
        "rank": f"{rank}, alpha {rank}",
        "editor": public_name(info.editor),
        "backbone": public_name(info.backbone),
        "scores": scores,
    }
    if edit.relative_error:
        layer, worst = max(edit.relative_error.items(), key=lambda item: item[1])
        facts["truncation"] = f"by SVD to rank {rank}; relative error of the update at most {worst:.2g} ({layer})"
    kind = "SolvedEdit" if parts else "LowRankEdit"
    blocks = [
        f"# {repo_id.rpartition('/')[2]}",
        "A knowledge edit of a language model as a LoRA adapter. The edited model answers:",
        requests,
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if value),
        *_drift_section(info.scores),
        "With PEFT (on a 16-bit model, pass `autocast_adapter_dtype=False` as well):",
        fenced(f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{repo_id}")'),
        "With `ibke_hf`, for the length of a block and undone exactly after it:",
        fenced(
            f'from ibke_hf import {kind}\n\nedit = {kind}.from_pretrained("{repo_id}")\nwith '
            f"edit.attached(model):\n    ..."
        ),
    ]
    if parts:
        blocks += [
            "The requests were edited one by one and solved together; any of them can be taken out again:",
            fenced("edit = edit.without(0)  # all but the first request"),
        ]
    return ModelCard(page(data, blocks))


def drift_rows(scores: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return what an edit does to everything else as rows: what was measured, before, after."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in scores.items():
        if not name.startswith(DRIFT):
            continue
        what, _, when = name.removeprefix(DRIFT).rpartition("/")
        if when not in ("before", "after"):
            what, when = name.removeprefix(DRIFT), "after"
        rows.setdefault(what, {})[when] = f"{value:.4g}"
    return [(what.replace("/", ": "), row.get("before", ""), row.get("after", "")) for what, row in rows.items()]


def _drift_section(scores: Mapping[str, float]) -> list[str]:
    """Return the section of a card, empty where nothing was measured."""
    rows = drift_rows(scores)
    lines = ["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = "What the edit does to everything else (KL in nats a token, perplexity on a text, tasks of lm-eval):"
    return [text, "\n".join(lines)] if rows else []
