"""Key statistics of a corpus, kept in the user's cache; imports little until they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.texts import read_texts


def key_statistics(
    model: Any,
    tokenizer: Any,
    corpus: str | Path,
    layers: Sequence[Sequence[int] | None] = (None,),
    *,
    edited_modules: str | None = None,
) -> Any:
    """Measure a model's keys on a corpus, or read them from the cache.

    See :class:`~ibke_hf.editors.locate.key_statistics.KeyStatistics`.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        corpus: See :func:`~ibke_hf.data.texts.read_texts`.
        layers: Those of each editor that needs them; None for its own choice.
        edited_modules: Name template of the projections that read the keys; by default found by structure.
    """
    from huggingface_hub.constants import HF_HOME

    from .key_statistics import KeyStatistics, default_layers

    needed = sorted({i for chosen in layers for i in (default_layers(model) if chosen is None else chosen)})
    return KeyStatistics.of(
        model,
        tokenizer,
        read_texts(corpus),
        needed,
        edited_modules=edited_modules,
        cache=Path(HF_HOME) / "ibke_hf",
        progress=sys.stderr.isatty(),
    )
