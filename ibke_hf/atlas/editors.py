"""One recipe for all trained Atlas editors: the shipped ones (`ibke atlas train-editor`) and `ibke table`'s."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..core.modeling_ibke import GradientEditor, IBKEEditor
from ..core.records import EditRecord
from ..editors.mend import MENDConfig, MENDEditor
from ..editors.serac import SERACEditor
from ..io import read_json, write_json
from ..lifelong.router import Router
from ..training.router import RouterTraining, judged, shares_found, train_router
from ..training.router_batches import routed_records
from ..training.router_strength import EDITS, choose_threshold_by_scores
from ..training.serac import SERACTrainer
from ..training.strength import choose_strength, save_in_16_bit
from ..training.trainer import GradientEditorTrainer, IBKETrainingArguments, RecordDataset
from . import load_backbone, load_editor, load_records, load_split
from .datasets import training_records

LAYERS = [1, 2, 3, 4]
IBKE_OPTIONS: dict[str, Any] = {
    "latent_dim": 176,
    "latent_length": 10,
    "second_stage_skip": True,
    "second_stage_mlp": 352,
    "second_stage_heads": 4,
    "initial_edit_ratio": 0.1,
}
# The paper's network: no skip, no MLP and one head. The parameters that these would take go into its width, so that it
# is as large as ours (4.49 and 4.48 million).
PLAIN_OPTIONS: dict[str, Any] = {"latent_dim": 219, "latent_length": 10, "initial_edit_ratio": 0.1}
TRAINING: dict[str, Any] = {
    "max_steps": 6500,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 25,
    "learning_rate": 5e-4,
    "step_size_learning_rate": 1e-3,
    "beta": 0.1,
    "edits_per_group": 1,
    "sg_includes_edit": True,
    "train_supporting_hops": "none",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "logging_steps": 25,
    "report_to": [],
}
TRAINING_OF = {
    "serac": {"learning_rate": 2e-3}
}  # a whole language model has to learn to read a request; 5e-4 takes too long for that
STEP_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
LOCALITY_FLOOR = 97.0  # percent
ROUTER_STEPS, ROUTER_RECORDS = 1800, 12000
# few facts are withheld from the backbone, so a router sees most of those that it was taught, with cases as they are
# drawn for evaluation and more of them: telling texts apart takes no forward of the editor
ROUTER_DATA: Mapping[str, Any] = {"unknown_share": 0.25, "shares": None, "generality": 4, "locality": 5}
LOG = "log.json"  # written last, once all else of a run is


def new_editor(name: str, backbone: Any, **options: Any) -> GradientEditor | SERACEditor:
    """Return an untrained editor of the recipe.

    Args:
        name: ``ibke``; ``ibke_paper``, the paper's plain network, or ``mend``, each with about as many parameters as
            ``ibke``; or ``serac``, whose parts start as the backbone.
        backbone: The Atlas backbone.
        options: Fields of the editor's config that differ from the recipe, and ``layers``.
    """
    if name == "serac":
        return SERACEditor.for_backbone(backbone, scope=backbone, counterfactual=backbone, **options)
    layers = options.pop("layers", LAYERS)
    if name == "ibke_paper":
        return IBKEEditor.for_backbone(backbone, layers, **{**PLAIN_OPTIONS, **options})
    ibke = IBKEEditor.for_backbone(backbone, layers, **{**IBKE_OPTIONS, **(options if name == "ibke" else {})})
    if name == "ibke":
        return ibke
    budget = sum(p.numel() for p in ibke.parameters())
    hidden = MENDConfig.hidden_dim_for(budget, ibke.config.input_dims, ibke.config.output_dims)
    shared = {"hidden_dim": hidden, "initial_edit_ratio": IBKE_OPTIONS["initial_edit_ratio"]}
    return MENDEditor.for_backbone(backbone, layers, **{**shared, **options})


def train_atlas_editor(
    name: str,
    out: str | Path,
    *,
    seed: int = 0,
    records: int | Sequence[EditRecord] = 48_000,
    validation: int | None = None,
    options: dict[str, Any] | None = None,
    resume: bool = False,
    trials: Sequence[float] = STEP_FACTORS,
    locality_floor: float | None = LOCALITY_FLOOR,
    callbacks: Sequence[TrainerCallback] = (),
    **training: Any,
) -> dict[str, Any]:
    """Train an editor on Atlas train records and save it in 16 bit (statistics in fp32) with its log.

    Args:
        name: One of :func:`new_editor`.
        out: Folder of the result; checkpoints lie in its sub-folder ``checkpoints`` until the end.
        seed: Seeds records, initialisation and order.
        records: Number of training records, or these.
        validation: Number of validation records that are evaluated; by default all.
        options: Fields of the editor's config that differ from the recipe, and ``layers``.
        resume: Go on from the last checkpoint.
        trials: What :func:`~ibke_hf.training.strength.choose_strength` tries once the editor is trained;
            empty: the step sizes stay as trained.
        locality_floor: See there.
        callbacks: Told of the training's steps.
        training: Fields of :class:`IBKETrainingArguments` that differ from the recipe.

    Returns:
        The last evaluation on validation records, as trained, with minutes and parameters.
    """
    started, target = time.monotonic(), Path(out)
    backbone, tokenizer = load_backbone()
    torch.manual_seed(seed)
    editor = new_editor(name, backbone, **(options or {}))
    settings = {**TRAINING, **TRAINING_OF.get(name, {}), **training}
    drawn = training_records(load_split(), records, seed) if isinstance(records, int) else records
    datasets = {
        "train_dataset": RecordDataset(drawn),
        "eval_dataset": RecordDataset(load_records("validation")[:validation]),
    }
    arguments = _arguments(target / "checkpoints", seed, settings)
    kind: Any = SERACTrainer if name == "serac" else GradientEditorTrainer
    trainer = kind(
        editor,
        backbone=backbone,
        args=arguments,
        processing_class=tokenizer,
        callbacks=[_Minutes(), *callbacks],
        **datasets,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    report = trainer.evaluate()
    tried = _choose_strength(name, editor, backbone, tokenizer, trials, locality_floor)
    report |= {"minutes": round((time.monotonic() - started) / 60, 1), "parameters": editor.num_parameters()}
    save_in_16_bit(editor, target)
    shutil.rmtree(target / "checkpoints", ignore_errors=True)
    log = {
        "editor": name,
        "seed": seed,
        "records": len(drawn),
        "options": options or {},
        "training": settings,
        **tried,
        "report": report,
        "history": trainer.state.log_history,
    }
    write_json(target / LOG, log)
    return report


def train_atlas_router(
    out: str | Path, *, steps: int = ROUTER_STEPS, records: int = ROUTER_RECORDS, seed: int = 0, resume: bool = False
) -> dict[str, Any]:
    """Train the router of the Atlas editors on train records; scores of validation records choose when it picks.

    Args:
        out: Folder of the result.
        steps: Training steps.
        records: Number of training records.
        seed: Seeds records, initialisation and batches.
        resume: Go on from the last checkpoint.

    Returns:
        The report of :func:`~ibke_hf.training.router.train_router`.
    """
    backbone, tokenizer = load_backbone()
    layers = new_editor("ibke", backbone).config.module_names()
    drawn = training_records(load_split(), records, seed, **ROUTER_DATA)
    validation, settings = load_records("validation"), RouterTraining(steps=steps, seed=seed)
    report = train_router(backbone, tokenizer, layers, drawn, validation, out, settings, resume=resume)
    trials = choose_atlas_threshold(out)
    return {**report, "threshold": trials[-1]["threshold"], "threshold_trials": trials}


def choose_atlas_threshold(folder: str | Path) -> list[dict[str, float]]:
    """Choose when a trained router picks an edit by the scores of the IBKE editor, and save it in 16 bit.

    Returns:
        What was tried, the chosen one last; the log beside the router gets it too.
    """
    backbone, tokenizer = load_backbone()
    router = Router.from_pretrained(folder, dtype="float16").float().eval()  # as it is stored: the package keeps small
    validation = load_records("validation")
    trials = choose_threshold_by_scores(router, load_editor("ibke"), backbone, tokenizer, validation[:EDITS])
    kept = routed_records(tokenizer, validation)
    shares = shares_found(*judged(router, backbone, kept), router.config.threshold)
    router.half().save_pretrained(folder)
    log = Path(folder) / LOG
    write_json(log, {**read_json(log), "threshold_trials": trials, "found_at_threshold": shares})
    return trials


def _choose_strength(
    name: str, editor: Any, backbone: Any, tokenizer: Any, trials: Sequence[float], locality_floor: float | None
) -> dict[str, Any]:
    """Return what the log says of the trials, which leave the editor with the chosen strength; nothing without any."""
    if not trials:
        return {}
    tried = choose_strength(editor, backbone, tokenizer, load_records("validation"), trials, locality_floor)
    return {"threshold_trials" if name == "serac" else "step_size_trials": tried}


def _arguments(checkpoints: Path, seed: int, settings: dict[str, Any]) -> IBKETrainingArguments:
    """Return the arguments of a trainer that evaluates and saves half-way unless the settings say otherwise."""
    every = max(settings["max_steps"] // 2, 1)
    checkpointing = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,
    }
    return IBKETrainingArguments(
        str(checkpoints), seed=seed, use_cpu=not torch.accelerator.is_available(), **{**checkpointing, **settings}
    )


class _Minutes(TrainerCallback):
    """Adds the minutes since the start to each log line."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["minutes"] = round((time.monotonic() - self.started) / 60, 2)
