"""`ibke train`: settings from a YAML file and flags -> a trained editor for any backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..core.configuration_ibke import PRESETS
from ..core.records import EditRecord
from ..data.augmentation import RECORDS_OF_EACH, draw_records
from ..editors.catalogue import TRAINED, editor_class
from ..io import write_json

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from .trainer import IBKETrainingArguments

logger = logging.get_logger(__name__)
TOP_LEVEL = (
    "backbone",
    "records",
    "validation",
    "augment",
    "augment_records",
    "out",
    "kind",
    "layers",
    "dtype",
    "editor",
    "training",
)
SERAC_STARTS = ("scope", "counterfactual")  # decoders that its two parts start from
REQUIRED = ("backbone", "records", "out")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAPER_DTYPES = {  # SPEC §6
    "openai-community/gpt2-xl": "float32",
    "EleutherAI/gpt-j-6b": "float16",
    "Qwen/Qwen3-1.7B": "float32",
    "Qwen/Qwen3-8B": "float16",
}
PATIENCE = 50_000  # steps without a lower validation loss [paper]
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def training_settings(
    config: str | Path | None, flags: Mapping[str, Any], editor: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge a YAML file with flags, which win; None means not given.

    Args:
        config: The file, with settings of `TOP_LEVEL`.
        flags: Settings of `TOP_LEVEL`.
        editor: Fields of :class:`IBKEConfig`, or of the config of another ``kind``.
        training: Fields of :class:`IBKETrainingArguments`.

    Raises:
        ValueError: For an unknown or missing setting, naming it.
    """
    settings = read_settings(config) if config is not None else {}
    settings |= _given(flags)
    if (kind := settings.get("kind", "ibke")) not in TRAINED:
        raise ValueError(f"kind must be one of {', '.join(TRAINED)}, found {kind!r}")
    for name, given in (("editor", editor), ("training", training)):
        settings[name] = {**(settings.get(name) or {}), **_given(given)}
        known = _known_fields(name, kind)
        unknown = sorted(set(settings[name]) - set(known))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r} under {name}:; settings are {', '.join(known)}")
    missing = [name for name in REQUIRED if not settings.get(name)]
    if missing:
        raise ValueError(
            f"missing setting: {', '.join(missing)}; give it as a flag (--{missing[0]}) or in the YAML file"
        )
    for name in ("records", "validation", "augment"):
        if isinstance(settings.get(name), str):
            settings[name] = [settings[name]]
    if settings.get("dtype") not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {settings['dtype']!r}")
    number = settings.get("augment_records", RECORDS_OF_EACH)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"augment_records must be a whole number of at least 1, found {number!r}")
    return settings


def read_settings(config: str | Path, known: Sequence[str] = TOP_LEVEL) -> dict[str, Any]:
    """Read a YAML file of settings by name.

    Args:
        config: The file.
        known: Names of the settings that it may hold.

    Raises:
        ValueError: If it is no such file, or holds another setting; names it.
    """
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: not a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{config}: expected settings by name, found {settings!r}; settings are {', '.join(known)}")
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{config}: unknown setting {unknown[0]!r}; settings are {', '.join(known)}")
    for name in ("editor", "editors", "training"):
        if not isinstance(settings.get(name) or {}, dict):
            raise ValueError(f"{config}: {name}: must hold settings by name, found {settings[name]!r}")
    return {name: _numbers(value) for name, value in settings.items()}


def _numbers(value: Any) -> Any:
    """Read 1e-4 as the number that it is, wherever it stands; YAML takes a number without a point in it for text."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _known_fields(group: str, kind: str) -> list[str]:
    if group == "editor":
        found = {
            "backbone",
            "edited_layers",
            "input_dims",
            "output_dims",
            "scope_model",
            "counterfactual_model",
            "separator",
        }
        found |= {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(editor_class(kind).config_class) if field.name not in found] + (
            list(SERAC_STARTS) if kind == "serac" else []
        )
    from .trainer import IBKETrainingArguments

    return [field.name for field in fields(IBKETrainingArguments) if field.init and field.name != "output_dir"]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def train_editor(settings: Mapping[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """Train an editor, of kind IBKE unless ``settings["kind"]`` says otherwise, and save it under ``settings["out"]``.

    With validation records, the checkpoint of the lowest validation loss is kept, and training stops once that has not
    fallen for `PATIENCE` steps.

    Args:
        settings: What :func:`training_settings` returns.
        resume: Go on from the last complete checkpoint in the output folder.

    Returns:
        The last evaluation, or without validation records the training loss.

    Raises:
        ImportError: If the `train` extra is missing.
        ValueError: For settings or records that cannot be used, or checkpoints of an earlier run that are not to be
            resumed.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError('training needs the extra "train": pip install "ibke-hf[train]"') from error
    from transformers import EarlyStoppingCallback, set_seed

    from .serac import SERACTrainer
    from .trainer import GradientEditorTrainer, last_complete_checkpoint

    arguments = _arguments(settings)
    checkpoints = str(arguments.output_dir)
    if not resume and last_complete_checkpoint(checkpoints) is not None:
        raise ValueError(
            f"{checkpoints} holds checkpoints of an earlier run; resume it (--resume), remove them or choose "
            f"another folder"
        )
    train = _records(settings, "records", _augmentation(settings, arguments.seed))
    validation = _records(settings, "validation")
    set_seed(arguments.seed)
    editor, backbone, tokenizer = _editor(settings, arguments)
    stopping = [EarlyStoppingCallback(_patience(arguments))] if arguments.load_best_model_at_end else []
    trainer = (SERACTrainer if settings.get("kind") == "serac" else GradientEditorTrainer)(
        editor,
        backbone=backbone,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=stopping,
    )
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(settings["out"]))
    return dict(trainer.evaluate()) if validation else {"train_loss": result.training_loss}


def _arguments(settings: Mapping[str, Any]) -> IBKETrainingArguments:
    from .trainer import IBKETrainingArguments

    training = settings["training"]
    every = training.get("eval_steps", training.get("save_steps", 3000))
    defaults = {"save_steps": every, "save_total_limit": 2, "report_to": []}
    if settings.get("validation"):
        defaults |= {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    return IBKETrainingArguments(str(Path(settings["out"]) / "checkpoints"), **{**defaults, **training})


def _patience(arguments: IBKETrainingArguments) -> int:
    """Return the number of evaluations that `PATIENCE` steps make up; 17 with one each 3,000."""
    every = arguments.eval_steps or PATIENCE
    return math.ceil(
        PATIENCE / (every if every >= 1 else max(every * arguments.max_steps, 1))
    )  # a share of all steps below 1


def _records(settings: Mapping[str, Any], name: str, more: Sequence[EditRecord] = ()) -> Dataset[EditRecord] | None:
    """Return the records of the sources that a setting names, kept on disk, and `more`; None where it names none."""
    from torch.utils.data import ConcatDataset

    from ..data.rows import StoredRecords, records_dataset
    from .trainer import RecordDataset

    sources = settings.get(name)
    if not sources:
        return None
    stored: list[Any] = [StoredRecords(records_dataset(source)) for source in sources]
    return ConcatDataset([*stored, *([RecordDataset(more)] if more else [])])


def _augmentation(settings: Mapping[str, Any], seed: int) -> list[EditRecord]:
    """Draw the few-shot records of other datasets; what was drawn is logged in ``augmentation.json`` of the output folder."""
    if not settings.get("augment"):
        return []
    records, log = draw_records(settings["augment"], settings.get("augment_records", RECORDS_OF_EACH), seed)
    for part in log:
        logger.warning(f"augment: {part['drawn']} records of {part['source']}")
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "augmentation.json", log, ensure_ascii=False)
    return records


def _editor(settings: Mapping[str, Any], arguments: IBKETrainingArguments) -> tuple[Any, Any, Any]:
    """Load the backbone with its tokenizer and build an untrained editor for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, kind = settings["backbone"], settings.get("kind", "ibke")
    dtype = settings.get("dtype") or PAPER_DTYPES.get(name, "auto")
    backbone = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval().to(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if kind == "serac":
        starts = {
            part: _start(settings["editor"][part], backbone) for part in SERAC_STARTS if settings["editor"].get(part)
        }
        return (
            editor_class(kind).for_backbone(backbone, settings.get("layers"), **{**settings["editor"], **starts}),
            backbone,
            tokenizer,
        )
    preset = PRESETS.get(name, {})
    fields_of_editor = {"edited_modules": preset.get("edited_modules"), **settings["editor"]}
    if backbone.dtype == torch.float16:
        fields_of_editor.setdefault("capture_loss_scale", 1024.0)  # or small gradients vanish
    editor = editor_class(kind).for_backbone(
        backbone, settings.get("layers") or preset.get("edited_layers"), **fields_of_editor
    )
    return editor, backbone, tokenizer


def _start(name: str, backbone: Any) -> Any:
    """Return the decoder whose weights a part of SERAC starts from, ``"backbone"`` for the backbone's own."""
    from transformers import AutoModelForCausalLM

    return backbone if name == "backbone" else AutoModelForCausalLM.from_pretrained(name, dtype="float32")
