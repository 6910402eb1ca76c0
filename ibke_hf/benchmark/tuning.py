"""`ibke tune` and `ibke atlas tune`: hyper-parameters of the editors without weights, by trials on validation records.

Rivals are tuned as hard as the editors that are trained. Trials are kept as they are made, and a run that was stopped
goes on after the last one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from ..core.records import EditRecord
from ..editors.catalogue import build_editor, kind_of
from ..evaluation.protocol import evaluate_records
from ..io import read_json, write_json

TRIALS_FILE, CHOSEN_FILE = "trials.json", "hyper_parameters.json"
SCORES = ("reliability", "generality", "locality", "avg")
Settings = dict[str, Any]
Trials = Mapping[int, Mapping[str, Sequence[Settings]]]  # by number of edits at once and editor

VALUE = {
    "steps": 50,
    "learning_rate": 0.5,
}  # of ROME and AlphaEdit: a small model needs a longer search than the papers'
TRIALS_FOR_ANY: Mapping[str, tuple[Settings, ...]] = {  # around the papers' settings; the layers are each editor's own
    "ft": tuple({"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3)),
    "rome": ({}, {**VALUE}, {**VALUE, "prefixes": 0}, {**VALUE, "weight_decay": 0.1}),
    "alphaedit": (
        {},
        {**VALUE, "clamp": 4.0},
        {**VALUE, "clamp": 4.0, "prefixes": 0},
        {**VALUE, "clamp": 4.0, "null_threshold": 0.1, "regularisation": 0.001},
    ),
    "t_patcher": (
        {"memory_weight": 10.0},
        {"memory_weight": 1.0},
        {"memory_weight": 0.1},
        {"memory_weight": 0.1, "activation_threshold": -1.0, "activation_margin": -1.0},
    ),
    "lemoe": (
        {"learning_rate": 1e-2, "routing_threshold": 0.15},
        {"learning_rate": 1e-2, "routing_threshold": 0.25},
        {"learning_rate": 1e-2, "routing_threshold": 0.4},
        {"learning_rate": 3e-3, "routing_threshold": 0.25},
    ),
    "grace": tuple({"initial_radius": radius} for radius in (0.5, 1.0, 3.0, 10.0)),
}


def best_of(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the trial with the best Avg, the first of equal ones."""
    return max(trials, key=lambda trial: trial["avg"])


class TrialBench(ABC):
    """A backbone, and the validation records that settings are tried on.

    Args:
        records: The records.
    """

    def __init__(self, records: Sequence[EditRecord]) -> None:
        self.records = list(records)

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """Load the backbone and its tokenizer."""

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The backbone and its tokenizer, loaded once."""
        return self.load()

    @cached_property
    @abstractmethod
    def statistics(self) -> Any:
        """Key statistics of the backbone, for the editors that need them."""

    def try_out(self, name: str, settings: Mapping[str, Any], edits: int) -> dict[str, float | None]:
        """Return the scores in percent; reliability once more on edits that contradict what the model knows.

        With several edits at once no supporting hops are edited in, which would take longer than the edits
        themselves: multi-hop cases count as the edits alone leave them.
        """
        model, tokenizer = self.loaded
        statistics = self.statistics if kind_of(name).needs_statistics else None
        evaluation = evaluate_records(
            build_editor(name, model, statistics=statistics, **settings),
            model,
            tokenizer,
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


def choose_settings(
    out: str | Path, trials: Trials, bench: TrialBench, *, order: Sequence[str] = ()
) -> dict[str, dict[str, Settings]]:
    """Try the settings of each editor; keep those with the best Avg, and all trials.

    `out` receives ``trials.json``, written after each trial, so that a run that was stopped goes on there, and
    ``hyper_parameters.json``, the settings chosen by number of edits and editor, written once all trials of an editor
    are done. Both keep what they hold of others, also what another run adds meanwhile.

    Args:
        out: Folder, made if it is missing.
        trials: What is tried.
        bench: The backbone and the records.
        order: How the editors are sorted in the files; by default as in `trials`.

    Returns:
        The chosen settings by number of edits (as text, as JSON has it) and editor.

    Raises:
        ValueError: If a number of edits is out of range, or `out` holds trials on another number of records.
    """
    number = len(bench.records)
    if not trials or not all(1 <= count <= number for count in trials):
        raise ValueError(f"edits at once must be between 1 and the {number} records, found {list(trials)}")
    files = _Files(Path(out), number, trials, order or tuple(dict.fromkeys(n for by in trials.values() for n in by)))
    chosen: dict[str, dict[str, Settings]] = {}
    total = sum(len(settings) for by_name in trials.values() for settings in by_name.values())
    with tqdm(total=total, unit="trial") as bar:
        for count, by_name in trials.items():
            for name, settings in by_name.items():
                bar.set_description(f"{name}, {count} at once")
                for trial in files.missing(name, count):
                    files.add(name, count, {"settings": trial, **bench.try_out(name, trial, count)})
                chosen.setdefault(str(count), {})[name] = files.choose(name, count)
                bar.update(len(settings))
    return chosen


class _Files:
    """The trials that a folder holds, and the settings chosen of them."""

    def __init__(self, folder: Path, number: int, trials: Trials, order: Sequence[str]) -> None:
        self.folder, self.number, self.trials, self.order = folder, number, trials, order
        self.held()
        folder.mkdir(parents=True, exist_ok=True)

    def held(self) -> dict[str, dict[str, list[Any]]]:
        """Return the trials by number of edits and editor."""
        file = self.folder / TRIALS_FILE
        content: dict[str, Any] = read_json(file) if file.exists() else {"records": self.number, "edits": {}}
        if content["records"] != self.number:
            raise ValueError(
                f"{file}: its trials are on {content['records']} records, these would be on {self.number}; "
                "choose another folder"
            )
        by_edits: dict[str, dict[str, list[Any]]] = content["edits"]
        return by_edits

    def missing(self, name: str, edits: int) -> Iterator[Settings]:
        """Yield the settings that no trial in the folder has, looking again before each."""
        for settings in self.trials[edits][name]:
            if settings not in [trial["settings"] for trial in self.held().get(str(edits), {}).get(name, [])]:
                yield settings

    def add(self, name: str, edits: int, trial: Mapping[str, Any]) -> None:
        """Write a trial among those that the folder holds, which another run may have added to."""
        order = list(self.trials[edits][name])
        with self._locked():
            by_edits = self.held()
            others = by_edits.get(str(edits), {}).get(name, [])
            trials = [dict(trial), *(other for other in others if other["settings"] != trial["settings"])]
            by_edits.setdefault(str(edits), {})[name] = sorted(
                (trial for trial in trials if trial["settings"] in order),
                key=lambda trial: order.index(trial["settings"]),
            )
            write_json(self.folder / TRIALS_FILE, {"records": self.number, "edits": self._in_order(by_edits)})

    def choose(self, name: str, edits: int) -> Settings:
        """Write the best of an editor's trials among the chosen settings; return it."""
        with self._locked():
            best: Settings = dict(best_of(self.held()[str(edits)][name])["settings"])
            file = self.folder / CHOSEN_FILE
            by_edits = read_json(file) if file.exists() else {}
            by_edits.setdefault(str(edits), {})[name] = best
            write_json(file, self._in_order(by_edits))
        return best

    def _locked(self) -> FileLock:
        return FileLock(self.folder / ".tuning.lock")

    def _in_order(self, by_edits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Sort by number of edits, then as the editors are."""
        return {
            edits: {name: by_name[name] for name in dict.fromkeys((*self.order, *by_name)) if name in by_name}
            for edits, by_name in ((edits, by_edits[edits]) for edits in sorted(by_edits, key=int))
        }
