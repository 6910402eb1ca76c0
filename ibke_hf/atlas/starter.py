"""Settings and records that ship with the package, for an editor of any backbone: `ibke train` without records."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.folders import write_records
from ..io import read_json, write_json
from ..training.recipe import CHECKPOINTS, STARTER
from ..training.settings import TrainingSettings
from . import ASSETS, load_split
from .datasets import TRAINING_CASES, TRAINING_OPTIONS
from .editors import IBKE_OPTIONS, TRAINING, TRAINING_OF
from .splits import HELD_OUT_DOMAINS, RECORDS, build_records

MOST_RECORDS = 12_000  # 75 MB; more of the same 1,700 triples teach little
EVERY = 500  # steps from checkpoint to checkpoint
STARTER_TRAINING: Mapping[str, Any] = {
    **TRAINING,
    "max_steps": 3000,  # of SmolLM2-135M, three hours of one core
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "save_steps": EVERY,
    "seed": 0,
}
MANIFEST = "records.json"  # written last, once all records are
HEADS = (4, 2, 1)


def starter_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a training on the records that ship, by what is given of `settings` (which wins)."""
    kind, editor = settings.get("kind") or "ibke", settings.get("editor") or {}
    folder = Path(str(settings.get("out") or "")) / STARTER
    defaults: dict[str, Any] = {
        "training": _training(kind, settings.get("training") or {}),
        "records": [str(folder / "train")],
        "validation": [str(folder / "validation")],
        "save_dtype": "float16",
        "fit_width": kind != "serac",
    }
    if kind == "ibke":
        width = editor.get("latent_dim")
        heads = next(number for number in HEADS if not isinstance(width, int) or width % number == 0)
        chosen_by_size = ("latent_dim", "second_stage_mlp")
        fields = {name: value for name, value in IBKE_OPTIONS.items() if name not in chosen_by_size}
        defaults["editor"] = {**fields, "second_stage_heads": heads}
    if kind == "mend":
        defaults["editor"] = {"initial_edit_ratio": IBKE_OPTIONS["initial_edit_ratio"]}
    return defaults


def _training(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training arguments, without those that would overrule or contradict what is given."""
    training = {**STARTER_TRAINING, **TRAINING_OF.get(kind, {})}
    for name, instead in (("num_train_epochs", "max_steps"), ("eval_steps", "save_steps")):
        if name in given:
            del training[instead]
    return training


def write_starter_records(settings: TrainingSettings, *, keep: bool) -> dict[str, int]:
    """Write the records that :func:`starter_settings` names, of all domains of Atlas but the held-out ones.

    Args:
        settings: The settings; a run of few steps gets fewer records.
        keep: Leave what lies there whole, such as for a run that goes on.

    Returns:
        Number of ``train`` and ``validation`` records.
    """
    folder = Path(settings.out) / STARTER
    if keep and (folder / MANIFEST).is_file():
        return dict(read_json(folder / MANIFEST)["records"])
    number = _number(settings)
    for name in ("train", "validation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    built = build_records(
        load_split(), "train", number, seed=settings.training["seed"], **TRAINING_CASES, **TRAINING_OPTIONS
    )
    write_records(built, folder / "train")
    shutil.copytree(ASSETS / "records" / "validation", folder / "validation")
    counts = {"train": len(built), "validation": RECORDS["validation"]}
    write_json(folder / MANIFEST, {"seed": settings.training["seed"], "records": counts})
    return counts


def _number(settings: TrainingSettings) -> int:
    """Return how many records the steps draw, up to `MOST_RECORDS`; all of them where passes are given."""
    steps, batch = settings.training.get("max_steps", -1), settings.training["per_device_train_batch_size"]
    return MOST_RECORDS if steps < 1 else min(steps * batch, MOST_RECORDS)


def expectations(settings: TrainingSettings, counts: Mapping[str, int]) -> str:
    """Return in plain words what a training on these records is going to be."""
    training, folder = settings.training, Path(settings.out)
    steps, every = training.get("max_steps", -1), training.get("save_steps", training.get("eval_steps", EVERY))
    length = f"{steps:,} steps" if steps > 0 else f"{training['num_train_epochs']:g} passes"
    at = f"each {every:,.0f} steps" if every >= 1 else f"each {every:.0%} of them"
    rows = {
        "records": f"{counts['train']:,} edits of plain facts in English, in {len(_domains())} domains from art to "
        f"sport, and {counts['validation']:,} for validation; in {folder / STARTER}",
        "steps": f"{length} of {training['per_device_train_batch_size']} records: minutes on a GPU, hours on a CPU; "
        "the time to the end is said after the first steps",
        "checkpoints": f"{at} in {folder / CHECKPOINTS}; Ctrl-C saves one and shows the line that goes on",
        "expect": "edits of such facts that take, carry over to most other wordings and leave most else alone; "
        "the end says how well on the validation records",
        "better": "records of your own facts, domain and language: `ibke data build`, then --records",
    }
    head = f"training an editor for {settings.backbone} on facts that ship with this package:"
    return "\n".join((head, *(f"  {name:<12} {text}" for name, text in rows.items())))


def _domains() -> list[str]:
    relations = load_split().world.relations.values()
    return sorted({relation.domain for relation in relations} - {*HELD_OUT_DOMAINS})
