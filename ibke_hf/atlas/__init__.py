"""Atlas, the embedded world: true facts, a small language model that knows them, and editors trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "facts"
ASSETS = Path(__file__).parent / "assets"
EDITORS = ("ibke", "mend")


def load_backbone(folder: str | Path | None = None) -> tuple[Any, Any]:
    """Return the Atlas backbone, in eval mode and fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(folder) if folder else ASSETS / "backbone"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.name_or_path = "ibke-atlas"
    return model.eval(), AutoTokenizer.from_pretrained(path)


def load_editor(name: str = "ibke") -> Any:
    """Return a trained Atlas editor in eval mode and fp32: ``ibke`` or ``mend``."""
    import torch

    from ..editors.mend import MENDEditor
    from ..modeling_ibke import IBKEEditor

    if name not in EDITORS:
        raise ValueError(f"Atlas has trained editors named {', '.join(EDITORS)}, found {name!r}")
    kind: Any = {"ibke": IBKEEditor, "mend": MENDEditor}[name]
    editor = kind.from_pretrained(ASSETS / name, dtype=torch.float32)
    editor.config.name_or_path = f"ibke-atlas/{name}"
    return editor.eval()


def load_ft() -> Any:
    """Return the fine-tuning baseline for the Atlas backbone, its learning rate as chosen on the validation records."""
    import json

    from ..editors.ft import FineTuningEditor, FTConfig

    return FineTuningEditor(FTConfig(**json.loads((ASSETS / "ft.json").read_text(encoding="utf-8"))))


def load_records(split: str) -> list[Any]:
    """Return the committed evaluation records of a split: ``test``, ``held_out`` or ``validation``, in their seeded order."""
    return sorted(_read(ASSETS / "records" / split), key=lambda record: int(record.id.rpartition("-")[2]))


@cache
def load_split() -> Any:
    """Return who may see what: the taught and withheld triples of Atlas, see :mod:`ibke_hf.atlas.splits`."""
    from ..data.facts import load_world
    from .splits import split_world

    return split_world(load_world(FACTS))


def _read(folder: Path) -> Iterator[Any]:
    from ..data.uniedit import read_uniedit

    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no records; the splits are test, held_out and validation")
    for file in files:
        yield from read_uniedit(file)
