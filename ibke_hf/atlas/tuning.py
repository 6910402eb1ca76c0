"""`ibke atlas tune`: the hyper-parameters of the editors without weights, chosen on the validation records by as many trials each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..editors.catalogue import build_editor, kind_of
from ..evaluation.protocol import evaluate_records
from ..io import read_json, write_json
from . import HYPER_PARAMETERS, RIVALS, atlas_statistics, load_backbone, load_records
from .editors import LAYERS

TUNING_RECORDS = 100
TRIALS_FILE = "trials.json"
SCORES = ("reliability", "generality", "locality", "avg")
# ROME's and AlphaEdit's search for a value: the papers' 20 steps end before a model this small says the target. What
# keeps the value small
# matters as much, since keys of 512 dimensions are alike enough that a large change shows at other tokens too. Texts
# in front of the
# prompts gain less generality here than they cost reliability: the model has seen single sentences alone.
VALUE = {"prefixes": 0, "learning_rate": 0.5, "clamp": 4.0}
TRIALS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "ft": tuple({"layers": LAYERS, "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)),
    "rome": (
        {"layers": [0], **VALUE, "steps": 20, "weight_decay": 0.02},
        {"layers": [0], **VALUE, "steps": 100, "weight_decay": 0.1},
        {"layers": [0], **VALUE, "steps": 200, "weight_decay": 0.02},
        {"layers": [1], **VALUE, "steps": 50, "weight_decay": 0.1},
    ),
    "alphaedit": (
        {"layers": [0, 1, 2], **VALUE, "steps": 20, "weight_decay": 0.02, "regularisation": 1e-3},
        {"layers": [0, 1], **VALUE, "steps": 100, "weight_decay": 0.1, "regularisation": 1e-3},
        {"layers": [0, 1], **VALUE, "steps": 200, "weight_decay": 0.02, "regularisation": 1e-3, "null_threshold": 0.3},
        {"layers": [0, 1], **VALUE, "steps": 50, "weight_decay": 0.1, "regularisation": 1e-3, "null_threshold": 0.3},
    ),
    "t_patcher": (
        {"layers": [5], "memory_weight": 10.0},
        {"layers": [5], "memory_weight": 1.0},
        {"layers": [5], "memory_weight": 0.1},
        {"layers": [5], "memory_weight": 0.1, "activation_threshold": -1.0, "activation_margin": -1.0},
    ),
    "lemoe": (
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.15},
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.25},
        {"layers": [3], "learning_rate": 1e-2, "routing_threshold": 0.4},
        {"layers": [3], "learning_rate": 3e-3, "routing_threshold": 0.25},
    ),
    "grace": tuple(
        {"layers": [layer], "initial_radius": radius} for layer, radius in ((2, 0.75), (2, 1.0), (0, 0.75), (0, 1.0))
    ),
}


def tune(out: str | Path, names: Sequence[str] = RIVALS, number: int = TUNING_RECORDS) -> dict[str, Any]:
    """Try the settings of each editor on the first validation records; keep those with the best Avg, and all trials.

    `out` receives ``hyper_parameters.json``, the chosen settings by editor, and ``trials.json``. Both are written
    after each editor, and keep what they hold of the others.

    Args:
        out: Folder, made if it is missing.
        names: The editors.
        number: How many validation records; the first ones.

    Returns:
        The chosen settings of the editors that were tuned.

    Raises:
        ValueError: If an editor has no trials, or `out` holds trials on another number of records.
    """
    unknown = [name for name in names if name not in TRIALS]
    if unknown or not names:
        raise ValueError(f"editors without weights are {', '.join(TRIALS)}; found {', '.join(unknown) or 'none'}")
    target = Path(out)
    records = load_records("validation")[:number]
    _earlier(target, len(records))
    target.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_backbone()
    needed = any(kind_of(name).needs_statistics for name in names)
    statistics = atlas_statistics(model, tokenizer) if needed else None
    chosen: dict[str, Any] = {}
    with tqdm(total=sum(len(TRIALS[name]) for name in names), unit="trial") as bar:
        for name in names:
            found = []
            for settings in TRIALS[name]:
                bar.set_description(name)
                editor = build_editor(name, model, statistics=statistics, **settings)
                found.append({"settings": settings, **_scores(editor, model, tokenizer, records)})
                bar.update()
            chosen[name] = best_of(found)["settings"]
            earlier_trials, earlier_choice = _earlier(
                target, len(records)
            )  # read again: another run may have added its editors
            write_json(
                target / TRIALS_FILE, {"records": len(records), "editors": _in_order(earlier_trials | {name: found})}
            )
            write_json(target / HYPER_PARAMETERS, _in_order(earlier_choice | {name: chosen[name]}))
    return chosen


def best_of(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the trial with the best Avg, the first of equal ones."""
    return max(trials, key=lambda trial: trial["avg"])


def _scores(editor: Any, model: Any, tokenizer: Any, records: Sequence[Any]) -> dict[str, float | None]:
    """Return the scores of an editor in percent; reliability once more on the edits that contradict what the model knows."""
    found = evaluate_records(editor, model, tokenizer, records, batch_size=50, progress=False, generate=False)
    contradict = [
        row["score"] for row in found.rows if row["role"] == "reliability" and row["kind"] == "counterfactual"
    ]
    scores = {name: found.summary[name] for name in SCORES}
    counterfactual = 100 * sum(contradict) / len(contradict) if contradict else None
    return {"reliability": scores.pop("reliability"), "counterfactual_reliability": counterfactual, **scores}


def _earlier(folder: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trials and the chosen settings that a folder holds."""
    trials, chosen = folder / TRIALS_FILE, folder / HYPER_PARAMETERS
    earlier: dict[str, Any] = read_json(trials) if trials.exists() else {"records": number, "editors": {}}
    if earlier["records"] != number:
        raise ValueError(
            f"{trials}: its trials are on {earlier['records']} records, these would be on {number}; choose "
            f"another folder"
        )
    return earlier["editors"], read_json(chosen) if chosen.exists() else {}


def _in_order(by_editor: Mapping[str, Any]) -> dict[str, Any]:
    return {name: by_editor[name] for name in TRIALS if name in by_editor}
