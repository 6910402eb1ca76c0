"""`ibke train`: settings from a YAML file and flags -> a trained editor for any backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .configuration_ibke import PRESETS
from .data.folders import read_files

TOP_LEVEL = ("backbone", "records", "validation", "out", "layers", "dtype", "editor", "training")
REQUIRED = ("backbone", "records", "out")


def training_settings(
    config: str | Path | None, flags: Mapping[str, Any], editor: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge a YAML file with flags, which win; None means not given.

    Raises:
        ValueError: For an unknown or missing setting, naming it.
    """
    settings: dict[str, Any] = {}
    if config is not None:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        unknown = sorted(set(settings) - set(TOP_LEVEL))
        if unknown:
            raise ValueError(f"{config}: unknown setting {unknown[0]!r}; settings are {', '.join(TOP_LEVEL)}")
    settings |= _given(flags)
    settings["editor"] = {**settings.get("editor", {}), **_given(editor)}
    settings["training"] = {**settings.get("training", {}), **_given(training)}
    missing = [name for name in REQUIRED if not settings.get(name)]
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)}; give it as a flag (--{missing[0]}) or in the YAML file")
    return settings


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def train_editor(settings: Mapping[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """Train an IBKE editor and save it under ``settings["out"]``; return the last evaluation.

    Raises:
        ImportError: If the `train` extra is missing.
        ValueError: For settings or records that cannot be used.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError('training needs the extra "train": pip install "ibke-hf[train]"') from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

    from .modeling_ibke import IBKEEditor
    from .trainer import IBKETrainer, IBKETrainingArguments, RecordDataset

    out = Path(settings["out"])
    evaluated = bool(settings.get("validation"))
    every = settings["training"].get("eval_steps", 3000)
    best = {"eval_strategy": "steps", "eval_steps": every, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    defaults = {"save_steps": every, "save_total_limit": 2, "report_to": [], **(best if evaluated else {})}
    arguments = IBKETrainingArguments(str(out / "checkpoints"), **{**defaults, **settings["training"]})
    train, validation = (RecordDataset(list(read_files(settings.get(name) or []))) for name in ("records", "validation"))
    backbone = AutoModelForCausalLM.from_pretrained(settings["backbone"], dtype=settings.get("dtype") or "auto").eval().to(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(settings["backbone"])
    preset = PRESETS.get(settings["backbone"], {})
    layers = settings.get("layers") or preset.get("edited_layers")
    editor = IBKEEditor.for_backbone(backbone, layers, preset.get("edited_modules"), **settings["editor"])
    trainer = IBKETrainer(
        editor, backbone, arguments, tokenizer, train_dataset=train, eval_dataset=validation if evaluated else None,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=17)] if evaluated else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    editor.save_pretrained(out)
    return trainer.evaluate() if evaluated else {"train_loss": trainer.state.log_history[-1].get("train_loss")}
