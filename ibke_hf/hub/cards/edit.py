"""The card of an edit: its requests, backbone and scores, how to load it with PEFT and with us."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .text import base_model_metadata, fenced, page, public_name

MOST_REQUESTS = 20  # that a card lists


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
    scores = ", ".join(f"{name} {value:.1f}" for name, value in info.scores.items())
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
