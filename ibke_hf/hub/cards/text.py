"""What cards share: file name, tags, names that may be shown, fences, and paragraphs filled to even lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...loading import hub_id

CARD = "README.md"
LIBRARY, TAGS = "ibke-hf", ("knowledge-editing", "model-editing")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WIDTH = 120
IBKE_TAGS = [*TAGS, "information-bottleneck", "ibke"]


def prose(text: str, **figures: Any) -> str:
    """Return a paragraph with its figures, filled to lines of `WIDTH`."""
    return textwrap.fill(text.format(**figures), WIDTH, break_long_words=False, break_on_hyphens=False)


def listed(parts: Sequence[Any]) -> str:
    """Return "a, b and c"."""
    texts = [f"{part:g}" if isinstance(part, float) else str(part) for part in parts]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def public_name(name: str) -> str:
    """Return a name that may be an id of the Hub, and "" for those of folders, which are nobody else's business."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def base_model_metadata(backbone: str) -> dict[str, str]:
    """Return the fields that name a backbone of the Hub, none for a folder."""
    backbone = hub_id(backbone)
    return {"base_model": backbone, "base_model_relation": "adapter"} if public_name(backbone) else {}


def fenced(text: str, language: str = "python") -> str:
    """Fence a text, by more backticks than it has in a row itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def page(data: Any, blocks: Sequence[str]) -> str:
    """Return the text of a card: its metadata, then blocks of Markdown."""
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n"
