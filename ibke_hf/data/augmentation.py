"""Few-shot augmentation: some records of other datasets beside the main one (the paper's asterisk, SPEC §6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..core.records import EditRecord
from .sources import read_records

RECORDS_OF_EACH = 512  # [paper]


def draw_records(
    sources: Sequence[str | Path], number: int = RECORDS_OF_EACH, seed: int = 0, without: Collection[str] = ()
) -> tuple[list[EditRecord], list[dict[str, Any]]]:
    """Draw `number` records of each source with equal chances.

    Args:
        sources: Whatever :func:`~ibke_hf.data.sources.read_records` reads: files, folders, Hub ids.
        number: Records drawn of each; a source that has fewer is taken whole, and the log says so.
        seed: Seeds each draw.
        without: Subjects that are left out, see :func:`~ibke_hf.data.sources.read_records`.

    Returns:
        The records, and for each source a log of what was drawn: ``source``, ``wanted``, ``drawn``, ``seed``, ``ids``,
        ``skipped``.

    Raises:
        ValueError: If `number` is below 1, or a source holds no record.
        RecordError: If a source is unreadable.
    """
    records: list[EditRecord] = []
    log = []
    for source in sources:
        skipped: Counter[str] = Counter()
        drawn = list(read_records(source, limit=number, seed=seed, without=without, skipped=skipped))
        if not drawn:
            raise ValueError(f"augment: no record in {source}; left out: {dict(skipped) or 'nothing'}")
        records += drawn
        log.append(
            {
                "source": str(source),
                "wanted": number,
                "drawn": len(drawn),
                "seed": seed,
                "ids": [r.id for r in drawn],
                "skipped": dict(skipped),
            }
        )
    return records, log
