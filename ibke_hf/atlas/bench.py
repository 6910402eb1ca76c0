"""The Atlas table: all editors on the embedded language model, those with weights trained for equally many steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..benchmark import Bench, BenchmarkError
from ..core.records import EditRecord
from ..editors.catalogue import ARRANGEMENTS, kind_of, set_composition
from ..io import read_json, write_json
from ..lifelong.router import Router
from ..loading import load_editor
from ..training.strength import choose_strength, set_strength
from ..training.trainer import last_complete_checkpoint
from . import atlas_statistics, chosen_settings, load_backbone, load_records, load_rival, load_router, tuned_at
from .editors import LOG, TRAINING, train_atlas_editor
from .tuning import TUNING_RECORDS

STEPS = 700  # of each training run: 10 minutes of one core for IBKE and MEND, 15 for SERAC
TRIALS = {
    "ibke": (1.0, 0.9, 0.8, 0.7),
    "ibke_paper": (1.0, 0.9, 0.8, 0.7),
    "mend": (1.0, 0.9, 0.8, 0.7),
    "serac": (0.3, 0.5, 0.7, 0.9),
}  # as many as the others have
STEP_FACTORS_OF_MANY = (1.0, 0.5, 0.25, 0.1)  # relative to the choice for single edits
TRIALS_OF_MANY = {
    "ibke": STEP_FACTORS_OF_MANY,
    "ibke_paper": STEP_FACTORS_OF_MANY,
    "mend": STEP_FACTORS_OF_MANY,
    "serac": (0.5, 0.9, 0.99, 0.999),
}
SPLITS = ("test", "held_out")


class AtlasBench(Bench):
    """The Atlas backbone with its records.

    Args:
        steps: Training steps of each editor that is trained.
        cache: Folder of the key statistics.
        free: Let the model answer freely as well.
    """

    def __init__(self, steps: int = STEPS, cache: str | Path | None = None, *, free: bool = False) -> None:
        self.steps, self.cache = steps, cache
        self.settings = {"backbone": "ibke-atlas", "steps": steps, "hyper_parameters": chosen_settings()}
        self.settings |= {"free": True} if free else {}

    def load(self) -> tuple[Any, Any]:
        """Load the Atlas backbone and its tokenizer."""
        return load_backbone()

    def pool(self, split: str) -> Iterable[EditRecord]:
        """Return the committed records of a split."""
        records: list[EditRecord] = load_records(split)
        return records

    def prepare(self, name: str, seed: int, folder: Path) -> None:
        """Train an editor by the recipe of the shipped ones, with a fresh record for every place of every batch."""
        if not kind_of(name).trained:
            return
        if (folder / LOG).exists():
            self._require_steps(read_json(folder / LOG)["training"]["max_steps"], f"{folder}: was trained for")
            return
        started = last_complete_checkpoint(folder / "checkpoints")
        if started is not None:
            steps = read_json(Path(started) / "trainer_state.json")["max_steps"]
            self._require_steps(steps, f"{started}: is of a run of")
        train_atlas_editor(
            name,
            folder,
            seed=seed,
            records=self.steps * TRAINING["per_device_train_batch_size"],
            max_steps=self.steps,
            trials=TRIALS[name],
            locality_floor=None,
            resume=started is not None,
        )

    def _require_steps(self, steps: int, what: str) -> None:
        if steps != self.steps:
            raise BenchmarkError(f"{what} {steps} steps, {self.steps} are asked for; choose another folder")

    def editor(self, name: str, folder: Path, edits: int = 1) -> Any:
        """Load a trained editor, or build one; what is chosen on validation records is chosen for so many edits."""
        if kind_of(name).trained:
            editor = load_editor(folder, backbone=self.loaded[0])
            set_composition(editor, "sum")
            if edits > 1:
                self._tune(name, editor, folder / f"strength-{edits}.json", edits)
            return editor
        if name == "none":
            return None
        statistics = self._keys if kind_of(name).needs_statistics else None
        return load_rival(name, self.loaded[0], statistics, edits=edits)

    def router(self, folder: Path) -> Router:
        """Return the shipped router, which finds the edits of any editor of these layers."""
        return load_router()

    def tuned_at(self, name: str, edits: int) -> int | None:
        """Return the number of edits at once that an editor's settings for `edits` were chosen at."""
        if name == "none" or name in ARRANGEMENTS:
            return None
        return edits if kind_of(name).trained else tuned_at(name, edits)

    def _tune(self, name: str, editor: Any, file: Path, edits: int) -> None:
        """Set a trained editor's step sizes or threshold to what does best with so many edits, tried once and kept."""
        if file.exists():
            set_strength(editor, read_json(file)["trials"][-1])
            return
        records = load_records("validation")[:TUNING_RECORDS]
        tried = choose_strength(editor, *self.loaded, records, TRIALS_OF_MANY[name], edits=edits)
        write_json(file, {"editor": name, "edits": edits, "records": TUNING_RECORDS, "trials": tried})

    @cached_property
    def _keys(self) -> Any:
        return atlas_statistics(*self.loaded, cache=self.cache)
