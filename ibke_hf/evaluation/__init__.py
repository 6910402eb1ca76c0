"""Evaluation: formulas in `scores`, procedure in `protocol`, files in `results`, the metric `edit_quality`."""

from __future__ import annotations

from typing import Any


def load_metric(**options: Any) -> Any:
    """Return the `evaluate` metric ``edit_quality`` of this package, without a download.

    Args:
        options: Passed on to ``evaluate.Metric``, such as ``keep_in_memory=True``.

    Raises:
        ImportError: If the `eval` extra is missing.
    """
    try:
        from .edit_quality.edit_quality import EditQuality
    except ImportError as error:
        raise ImportError('the edit_quality metric needs the extra "eval": pip install "ibke-hf[eval]"') from error
    return EditQuality(**options)
