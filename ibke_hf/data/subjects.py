"""The subjects that measure an editor, so that what trains it can be kept apart from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .fields import RecordError
from .sources import read_records


def edited_subjects(sources: Iterable[str | Path]) -> frozenset[str]:
    """Return the subjects that the records of several sources edit, see :attr:`EditRecord.subjects`.

    Raises:
        RecordError: If a source is unreadable, or names no subject, so that nothing could be kept apart from it.
    """
    subjects: set[str] = set()
    for source in sources:
        of_source = {subject for record in read_records(source) for subject in record.subjects}
        if not of_source:
            raise RecordError(f"{source}: no record names its subject, so none can be left out for it")
        subjects |= of_source
    return frozenset(subjects)
