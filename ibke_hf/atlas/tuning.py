"""`ibke atlas tune`: hyper-parameters of the editors without weights, by as many trials each on validation records.

An editor that keeps one edit apart from everything else need not carry a hundred: how far a value may go, and how much
of the space is left to the corpus, are chosen anew for each number of edits that the model carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from ..editors.catalogue import build_editor, kind_of
from ..evaluation.protocol import evaluate_records
from ..io import read_json, write_json
from . import HYPER_PARAMETERS, RIVALS, atlas_statistics, load_backbone, load_records
from .editors import LAYERS

TUNING_RECORDS = 100
EDITS = (1, 10, 100)  # that the model carries at once
TRIALS_FILE = "trials.json"
SCORES = ("reliability", "generality", "locality", "avg")
Settings = dict[str, Any]
# ROME's and AlphaEdit's search for a value: the papers' 20 steps end before a model this small says the target. What
# keeps the value small matters as much, since keys of 512 dimensions are alike enough that a large change shows at
# other tokens too. Texts in front of the prompts gain less generality here than they cost reliability: the model has
# seen single sentences alone.
VALUE = {"prefixes": 0, "learning_rate": 0.5, "clamp": 4.0}
# With many edits each value has to stay smaller still: jointly, AlphaEdit says 3 of 100 targets and keeps 25 of 100
# neighbours at a clamp of 4, λ = 0.001 and a threshold of 0.3, but 49 and 90 at 1.5, 0.1 and 3.
SMALL_VALUE = {"prefixes": 0, "learning_rate": 0.5, "clamp": 1.5, "steps": 30, "weight_decay": 0.1}
PAPER_VALUE = {**SMALL_VALUE, "clamp": 0.75}
TRIALS: Mapping[str, tuple[Settings, ...]] = {
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
TRIALS_OF_MANY: Mapping[str, tuple[Settings, ...]] = {
    **TRIALS,
    "rome": (
        {"layers": [0], **SMALL_VALUE},
        {"layers": [0], **SMALL_VALUE, "clamp": 2.5},
        {"layers": [0], **PAPER_VALUE},
        {"layers": [1], **SMALL_VALUE},
    ),
    "alphaedit": (
        {"layers": [0, 1], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 3.0},
        {"layers": [0, 1], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 1.0},
        {"layers": [0, 1, 2, 3], **SMALL_VALUE, "regularisation": 0.1, "null_threshold": 1.0},
        {"layers": [0, 1], **PAPER_VALUE, "regularisation": 0.01, "null_threshold": 1.0},
    ),
}


def trials_of(name: str, edits: int) -> tuple[Settings, ...]:
    """Return the settings that are tried for an editor where the model carries so many edits."""
    return (TRIALS if edits == 1 else TRIALS_OF_MANY)[name]


def tune(
    out: str | Path, names: Sequence[str] = RIVALS, edits: Sequence[int] = EDITS, number: int = TUNING_RECORDS
) -> dict[str, Any]:
    """Try the settings of each editor on the first validation records; keep those with the best Avg, and all trials.

    `out` receives ``trials.json``, written after each trial, so that a run that was stopped goes on there, and
    ``hyper_parameters.json``, the settings chosen by number of edits and editor, written once all trials of an editor
    are done. Both keep what they hold of others, also what another run adds meanwhile.

    Args:
        out: Folder, made if it is missing.
        names: The editors.
        edits: Numbers of edits that the model carries at once, each tuned for itself.
        number: How many validation records; the first ones.

    Returns:
        The chosen settings by number of edits (as text, as JSON has it) and editor.

    Raises:
        ValueError: If an editor has no trials, a number of edits is out of range, or `out` holds trials on another
            number of records.
    """
    unknown = [name for name in names if name not in TRIALS]
    if unknown or not names:
        raise ValueError(f"editors without weights are {', '.join(TRIALS)}; found {', '.join(unknown) or 'none'}")
    if not edits or not all(1 <= count <= number for count in edits):
        raise ValueError(f"edits at once must be between 1 and the {number} records, found {list(edits)}")
    folder = Path(out)
    records = load_records("validation")[:number]
    _trials_in(folder, len(records))
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(records, any(kind_of(name).needs_statistics for name in names))
    chosen: dict[str, dict[str, Settings]] = {}
    with tqdm(total=len(edits) * sum(len(TRIALS[name]) for name in names), unit="trial") as bar:
        for count in edits:
            for name in names:
                bar.set_description(f"{name}, {count} at once")
                for trial in _missing(folder, name, count, len(records)):
                    _add_trial(
                        folder, len(records), name, count, {"settings": trial, **bench.try_out(name, trial, count)}
                    )
                chosen.setdefault(str(count), {})[name] = _choose(folder, name, count, len(records))
                bar.update(len(TRIALS[name]))
    return chosen


def best_of(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the trial with the best Avg, the first of equal ones."""
    return max(trials, key=lambda trial: trial["avg"])


class _Bench:
    """The backbone and the records that trials are made on."""

    def __init__(self, records: Sequence[Any], needs_statistics: bool) -> None:
        self.records = records
        self.model, self.tokenizer = load_backbone()
        self.statistics = atlas_statistics(self.model, self.tokenizer) if needs_statistics else None

    def try_out(self, name: str, settings: Mapping[str, Any], edits: int) -> dict[str, float | None]:
        """Return the scores in percent; reliability once more on edits that contradict what the model knows.

        With several edits at once no supporting hops are edited in, which would take longer than the edits
        themselves: multi-hop cases count as the edits alone leave them.
        """
        evaluation = evaluate_records(
            build_editor(name, self.model, statistics=self.statistics, **settings),
            self.model,
            self.tokenizer,
            self.records,
            sequential=edits,
            supporting_hops=edits == 1,
            batch_size=50 if edits == 1 else 100,
            progress=False,
            generate=False,
        )
        contradict = [
            row["score"] for row in evaluation.rows if row["role"] == "reliability" and row["kind"] == "counterfactual"
        ]
        scores = {score: evaluation.summary[score] for score in SCORES}
        counterfactual = 100 * sum(contradict) / len(contradict) if contradict else None
        return {"reliability": scores.pop("reliability"), "counterfactual_reliability": counterfactual, **scores}


# --- the files ---


def _missing(folder: Path, name: str, edits: int, number: int) -> Iterator[Settings]:
    """Yield the settings that no trial in the folder has, looking again before each."""
    for settings in trials_of(name, edits):
        trials = _trials_in(folder, number).get(str(edits), {}).get(name, [])
        if settings not in [trial["settings"] for trial in trials]:
            yield settings


def _add_trial(folder: Path, number: int, name: str, edits: int, trial: Mapping[str, Any]) -> None:
    """Write a trial among those that the folder holds, which another run may have added to."""
    with FileLock(folder / ".tuning.lock"):
        by_edits = _trials_in(folder, number)
        others = by_edits.get(str(edits), {}).get(name, [])
        trials = [dict(trial), *(other for other in others if other["settings"] != trial["settings"])]
        order = trials_of(name, edits)
        by_edits.setdefault(str(edits), {})[name] = sorted(
            (trial for trial in trials if trial["settings"] in order), key=lambda trial: order.index(trial["settings"])
        )
        write_json(folder / TRIALS_FILE, {"records": number, "edits": _in_order(by_edits)})


def _choose(folder: Path, name: str, edits: int, number: int) -> Settings:
    """Write the best of an editor's trials among the chosen settings; return it."""
    with FileLock(folder / ".tuning.lock"):
        best: Settings = dict(best_of(_trials_in(folder, number)[str(edits)][name])["settings"])
        file = folder / HYPER_PARAMETERS
        by_edits = read_json(file) if file.exists() else {}
        by_edits.setdefault(str(edits), {})[name] = best
        write_json(file, _in_order(by_edits))
    return best


def _trials_in(folder: Path, number: int) -> dict[str, dict[str, list[Any]]]:
    """Return the trials that a folder holds, by number of edits and editor."""
    file = folder / TRIALS_FILE
    content: dict[str, Any] = read_json(file) if file.exists() else {"records": number, "edits": {}}
    if content["records"] != number:
        raise ValueError(
            f"{file}: its trials are on {content['records']} records, these would be on {number}; "
            "choose another folder"
        )
    by_edits: dict[str, dict[str, list[Any]]] = content["edits"]
    return by_edits


def _in_order(by_edits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sort by number of edits, then as the editors are."""
    return {
        edits: {name: by_edits[edits][name] for name in TRIALS if name in by_edits[edits]}
        for edits in sorted(by_edits, key=int)
    }
