"""The files of the `edit_quality` metric as a Space holds them: wrapper beside formulas, without this package."""

from __future__ import annotations

from pathlib import Path

from ..io import write_text
from . import edit_quality

METRIC = "edit_quality"
FORMULAS = "scores"
IN_THE_PACKAGE, IN_A_SPACE = f"from ibke_hf.evaluation.{FORMULAS} import", f"from .{FORMULAS} import"


def write_metric(folder: str | Path) -> list[Path]:
    """Write the metric to a folder, from which ``evaluate.load`` takes it where this package is not installed.

    The formulas exist once, in :mod:`ibke_hf.evaluation.scores`, and are copied; only the wrapper's import of them
    changes.

    Returns:
        The files written: ``edit_quality.py`` and ``scores.py``.
    """
    here, target = Path(__file__).parent, Path(folder)
    wrapper = (Path(edit_quality.__file__).parent / f"{METRIC}.py").read_text(encoding="utf-8")
    assert wrapper.count(IN_THE_PACKAGE) == 1
    texts = {
        METRIC: wrapper.replace(IN_THE_PACKAGE, IN_A_SPACE),
        FORMULAS: (here / f"{FORMULAS}.py").read_text(encoding="utf-8"),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(target / f"{name}.py", text)
    return [target / f"{name}.py" for name in texts]
