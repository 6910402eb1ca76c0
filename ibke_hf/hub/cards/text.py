"""Words that cards share: tags, and paragraphs with figures, filled to even lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ..publishing import TAGS

WIDTH = 120
IBKE_TAGS = [*TAGS, "information-bottleneck", "ibke"]


def prose(text: str, **figures: Any) -> str:
    """Return a paragraph with its figures, filled to lines of `WIDTH`."""
    return textwrap.fill(text.format(**figures), WIDTH, break_long_words=False, break_on_hyphens=False)


def listed(parts: Sequence[Any]) -> str:
    """Return "a, b and c"."""
    texts = [f"{part:g}" if isinstance(part, float) else str(part) for part in parts]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
