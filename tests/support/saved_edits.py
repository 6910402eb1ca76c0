"""A low-rank edit as values, and changes to its saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ibke_hf.core.edits import EditInfo, LowRankEdit
from ibke_hf.core.records import EditRequest

NAMES = {"gpt2": "transformer.h.{i}.mlp.c_proj", "qwen3": "model.layers.{i}.mlp.down_proj"}


WEIGHTS, CONFIG, INFO = "adapter_model.safetensors", "adapter_config.json", "edit.json"


def make_edit(family: str = "qwen3", width: int = 48, ranks: tuple[int, int] = (3, 5)) -> LowRankEdit:
    generator = torch.Generator().manual_seed(0)
    names = [NAMES[family].format(i=i) for i in (1, 2)]
    inputs = {
        name: torch.randn(1, rank, width, generator=generator) / 7 for name, rank in zip(names, ranks, strict=True)
    }
    outputs = {name: torch.randn(1, rank, 32, generator=generator) for name, rank in zip(names, ranks, strict=True)}
    requests = (EditRequest("Où est Zürich 🏔", "Швейцария", "Zürich"),)
    info = EditInfo(requests, "IBKE", "tiny", {names[0]: [0.5]}, family == "gpt2", {"f1": 90.0})
    return LowRankEdit(inputs, outputs, info)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
