"""`ibke atlas train-editor` and `train-mend`: the recipe of the shipped editors, the same for both."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..editors.mend import MENDConfig, MENDEditor
from ..evaluation.protocol import evaluate_records
from ..modeling_ibke import GradientEditor, IBKEEditor
from ..trainer import IBKETrainer, IBKETrainingArguments, RecordDataset
from . import load_backbone, load_records, load_split
from .datasets import training_records

LAYERS = [1, 2, 3, 4]
IBKE_OPTIONS: dict[str, Any] = {
    "latent_dim": 176, "latent_length": 10, "second_stage_skip": True, "second_stage_mlp": 352, "second_stage_heads": 4,
    "initial_edit_ratio": 0.1,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "max_steps": 6500, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 25, "learning_rate": 5e-4,
    "step_size_learning_rate": 1e-3, "beta": 0.1, "edits_per_group": 1, "sg_includes_edit": True, "train_supporting_hops": "none",
    "lr_scheduler_type": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0, "logging_steps": 25, "report_to": [],
}  # fmt: skip
STEP_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
LOCALITY_FLOOR = 97.0  # percent


def new_editor(name: str, backbone: Any, **options: Any) -> GradientEditor:
    """Return an untrained Atlas editor: ``ibke``, or ``mend`` with about the same number of parameters."""
    layers = options.pop("layers", LAYERS)
    ibke = IBKEEditor.for_backbone(backbone, layers, **{**IBKE_OPTIONS, **(options if name == "ibke" else {})})
    if name == "ibke":
        return ibke
    budget = sum(p.numel() for p in ibke.parameters())
    hidden = MENDConfig.hidden_dim_for(budget, ibke.config.input_dims, ibke.config.output_dims)
    shared = {"hidden_dim": hidden, "initial_edit_ratio": IBKE_OPTIONS["initial_edit_ratio"]}
    return MENDEditor.for_backbone(backbone, layers, **{**shared, **options})


def train_atlas_editor(
    name: str, out: str | Path, *, seed: int = 0, records: int = 48_000, options: dict[str, Any] | None = None, resume: bool = False,
    **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train an editor on Atlas train records and save it in 16 bit (statistics in fp32) with its log.

    Args:
        name: ``ibke`` or ``mend``.
        out: Folder of the result; checkpoints lie in its sub-folder ``checkpoints`` until the end.
        seed: Seeds records, initialisation and order.
        records: Number of training records.
        options: Fields of the editor's config that differ from the recipe, and ``layers``.
        resume: Go on from the last checkpoint.
        training: Fields of :class:`IBKETrainingArguments` that differ from the recipe.

    Returns:
        The last evaluation on validation records, of the step size as trained, with minutes and parameters.
    """
    started, target = time.monotonic(), Path(out)
    backbone, tokenizer = load_backbone()
    torch.manual_seed(seed)
    editor = new_editor(name, backbone, **(options or {}))
    checkpoints = target / "checkpoints"
    settings = {**TRAINING, **training}
    every = max(settings["max_steps"] // 2, 1)
    checkpointing = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every, "save_total_limit": 1}
    arguments = IBKETrainingArguments(
        str(checkpoints), seed=seed, use_cpu=not torch.accelerator.is_available(), **{**checkpointing, **settings}
    )
    trainer = IBKETrainer(
        editor, backbone, arguments, tokenizer, train_dataset=RecordDataset(training_records(load_split(), records, seed)),
        eval_dataset=RecordDataset(load_records("validation")), callbacks=[_Minutes()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    report = trainer.evaluate()
    trials = shrink_step_size(editor, backbone, tokenizer)
    report |= {"minutes": round((time.monotonic() - started) / 60, 1), "parameters": sum(p.numel() for p in editor.parameters())}
    save_in_16_bit(editor, target)
    log = {"editor": name, "seed": seed, "records": records, "options": options or {}, "training": settings,
           "step_size_trials": trials, "report": report, "history": trainer.state.log_history}  # fmt: skip
    (target / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def shrink_step_size(editor: GradientEditor, backbone: Any, tokenizer: Any) -> list[dict[str, float]]:
    """Multiply η by the first of `STEP_FACTORS` that leaves locality at `LOCALITY_FLOOR` on validation, else by that of the best Avg.

    A smaller step moves less of everything; the hypernetworks are rounded to 16 bit first, as they are stored.

    Returns:
        The factors tried, with their validation scores in percent; the chosen one comes last.
    """
    for parameter in editor.hypernetworks.parameters():
        parameter.data = parameter.data.half().float()
    trained, records, trials = editor.log_step_sizes.data.clone(), load_records("validation"), []

    def use(factor: float) -> None:
        editor.log_step_sizes.data = trained + math.log(factor)

    for factor in STEP_FACTORS:
        use(factor)
        summary = evaluate_records(editor, backbone, tokenizer, records, batch_size=100, progress=False, generate=False).summary
        trials.append({"factor": factor, **{name: summary[name] for name in ("reliability", "generality", "locality", "avg")}})
        if summary["locality"] >= LOCALITY_FLOOR:
            return trials
    best = max(trials, key=lambda trial: trial["avg"])
    use(best["factor"])
    return [*trials, best]


def save_in_16_bit(editor: GradientEditor, folder: str | Path) -> None:
    """Save hypernetworks in fp16; statistics and η stay in fp32."""
    editor.hypernetworks.half()
    try:
        editor.save_pretrained(folder)
    finally:
        editor.hypernetworks.float()


class _Minutes(TrainerCallback):
    """Adds the minutes since the start to each log line."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["minutes"] = round((time.monotonic() - self.started) / 60, 2)
