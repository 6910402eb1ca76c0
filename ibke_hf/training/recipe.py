"""`ibke train`: settings and records -> a trained editor for any backbone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..core.configuration_ibke import PRESETS
from ..core.records import EditRecord
from ..data.augmentation import draw_records
from ..data.chat import as_asked
from ..data.subjects import edited_subjects
from ..editors.catalogue import TRAINED, editor_class
from ..io import LOCK, FileError, locked, read_json, write_json
from ..loading import load_model
from .checkpoints import TrainingStopped, last_complete_checkpoint, on_stop_signals
from .report import before_and_after, spread
from .settings import SERAC_STARTS, TrainingSettings, read_settings, training_settings
from .sharding import shard_backbone
from .strength import choose_strength, in_16_bit
from .width import fit_width

if TYPE_CHECKING:
    from torch.utils.data import ConcatDataset

    from .arguments import IBKETrainingArguments

__all__ = ["PAPER_DTYPES", "PATIENCE", "TrainingSettings", "read_settings", "train_editor", "training_settings"]

logger = logging.get_logger(__name__)
PAPER_DTYPES = {  # SPEC §6
    "openai-community/gpt2-xl": "float32",
    "EleutherAI/gpt-j-6b": "float16",
    "Qwen/Qwen3-1.7B": "float32",
    "Qwen/Qwen3-8B": "float16",
}
PATIENCE = 50_000  # steps without a lower validation loss [paper]
STEP_SIZE_RECORDS = 100  # validation records that step sizes are tried on: minutes, where all of them may take hours
CHECKPOINTS, AUGMENTATION, LOG = "checkpoints", "augmentation.json", "training.json"
STARTER = "starter_records"  # the folder of the records that ship with the package
BESIDE = {CHECKPOINTS, AUGMENTATION, LOG, STARTER, LOCK, "settings.json", "trained.json"}  # ours, and `ibke table`'s


def train_editor(
    settings: Mapping[str, Any] | TrainingSettings,
    *,
    resume: bool = False,
    force: bool = False,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train an editor, of kind IBKE unless ``settings["kind"]`` says otherwise, and save it under ``settings["out"]``.

    With validation records, the checkpoint of the lowest validation loss is kept, and training stops once that has not
    fallen for `PATIENCE` steps. The first Ctrl-C or SIGTERM saves a checkpoint and ends the run. ``training.json``
    beside the editor keeps the settings, the step sizes that were tried, the report and the log.

    Args:
        settings: What :func:`training_settings` returns, or the like.
        resume: Go on from the last complete checkpoint in the output folder.
        force: Put the editor in a folder that holds something else, and forget the checkpoints of an earlier run.
        prepare: Called once the output folder is known to be free, before records are read; in the first process.

    Returns:
        ``steps``, ``parameters``, ``train_loss`` and ``records_left_out``; with validation records the last
        evaluation, as trained, and the scores of the model ``before`` and ``after`` an edit; ``step_sizes``, where
        some were tried (see :func:`~ibke_hf.training.strength.choose_strength`).

    Raises:
        ImportError: If the `train` extra is missing.
        ValueError: For settings or records that cannot be used, an output folder that holds something else, or
            checkpoints of an earlier run that are not to be resumed.
        TrainingStopped: If a signal has ended the run; a checkpoint is saved.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError('training needs the extra "train": pip install "ibke-hf[train]"') from error
    settings = settings if isinstance(settings, TrainingSettings) else TrainingSettings.of(settings)
    arguments = training_arguments(settings)
    _require_no_source(settings)
    first = arguments.process_index == 0
    owned: AbstractContextManager[Any] = locked(settings.out) if first else nullcontext()
    with owned:
        with arguments.main_process_first(desc="the output folder and its records"):
            if first:
                _require_free(Path(settings.out), resume=resume, force=force)
                if prepare is not None:
                    prepare()
        return _train(settings, arguments, resume)


def _train(settings: TrainingSettings, arguments: IBKETrainingArguments, resume: bool) -> dict[str, Any]:
    trainer = new_trainer(settings, arguments)
    with on_stop_signals(trainer.request_stop):
        result = trainer.train(resume_from_checkpoint=resume)
    if trainer.stopped:
        raise TrainingStopped(
            f"stopped after step {trainer.state.global_step}; a checkpoint is in {arguments.output_dir}"
        )
    report = {
        "steps": trainer.state.global_step,
        "parameters": sum(parameter.numel() for parameter in trainer.editor.parameters()),
        "train_loss": result.training_loss,
        "records_left_out": len(trainer.unusable),
    }
    if settings.validation is not None:
        report |= trainer.evaluate()
    first = trainer.is_world_process_zero()
    asks = first or settings.shard_backbone  # sharded weights are gathered by all processes, for each pass
    if asks and settings.chooses_step_size:
        report["step_sizes"] = _choose_step_size(settings, trainer)
    with in_16_bit(trainer.editor) if settings.save_dtype == "float16" else nullcontext():
        trainer.save_model(settings.out)
    if asks and settings.validation is not None:
        editor, held_out = trainer.editor.eval(), trainer.eval_dataset
        report |= before_and_after(editor, trainer.backbone, trainer.tokenizer, held_out)
    if first:
        log = {"settings": asdict(settings), "report": report, "history": trainer.state.log_history}
        write_json(Path(settings.out) / LOG, log, ensure_ascii=False)
    return report


def _choose_step_size(settings: TrainingSettings, trainer: Any) -> list[dict[str, float]]:
    """Leave the editor with the step size of the best Avg on validation records; return the trials."""
    logger.warning("training is done; step sizes are tried on validation records")
    records, rounded = spread(trainer.eval_dataset, STEP_SIZE_RECORDS), settings.save_dtype == "float16"
    return choose_strength(trainer.editor, trainer.backbone, trainer.tokenizer, records, rounded=rounded)


def new_trainer(settings: TrainingSettings, arguments: IBKETrainingArguments) -> Any:
    """Load the backbone and the records, and return the trainer of an untrained editor."""
    from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

    from .batches import AlsoInChat
    from .serac import SERACTrainer
    from .time_left import TimeLeft
    from .trainer import GradientEditorTrainer

    changes = settings.prompt_changes()
    without = sorted(edited_subjects(settings.without or ()))
    train: Any = records_of(settings.records, changes, _augmentation(settings, arguments.seed, without), without)
    validation = records_of(settings.validation, changes)
    set_seed(arguments.seed)
    editor, backbone, tokenizer = _editor(settings, arguments)
    if settings.chat_share and not settings.chat and getattr(tokenizer, "chat_template", None) and train is not None:
        train = AlsoInChat(train, settings.chat_share, settings.chat_options)
    patience = _patience(arguments, 0 if train is None else len(train))
    stopping = [EarlyStoppingCallback(patience)] if arguments.load_best_model_at_end else []
    callbacks: list[TrainerCallback] = [TimeLeft(), *stopping]
    return (SERACTrainer if settings.kind == "serac" else GradientEditorTrainer)(
        editor,
        backbone=backbone,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=callbacks,
    )


def _require_no_source(settings: TrainingSettings) -> None:
    """Refuse to write the editor where something lies that it is made of."""
    starts = {name: settings.editor.get(name) for name in SERAC_STARTS}
    sources = {"the backbone": [settings.backbone], "training records": settings.records}
    sources |= {"validation records": settings.validation or [], "other datasets": settings.augment or []}
    sources |= {f"the {name} model": [start] for name, start in starts.items() if start}
    out = Path(settings.out).resolve()
    for what, places in sources.items():
        if any(Path(place).resolve() == out for place in places):
            raise FileError(f"{settings.out}: holds {what}, which the editor would replace; choose another --out")


def _require_free(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output folder with something else in it, which an editor would replace or lie among.

    Raises:
        FileError: If it holds another model, something else without `force`, or checkpoints without `resume` or
            `force`.
    """
    if out.is_dir() and (kind := _model_in(out)) is not None and kind not in TRAINED:
        raise FileError(f"{out}: holds a model ({kind}), which the editor would replace; choose another --out")
    if resume:
        return
    if force:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        return
    if last_complete_checkpoint(out / CHECKPOINTS) is not None:
        raise FileError(
            f"{out / CHECKPOINTS} holds checkpoints of an earlier run; resume it (--resume), replace it (--force) or "
            f"choose another folder"
        )
    others = sorted(path.name for path in out.iterdir() if path.name not in BESIDE)
    if others:
        raise FileError(
            f"{out}: holds {', '.join(others[:3])}{' and more' * (len(others) > 3)}; choose another --out, or put the "
            f"editor there all the same (--force)"
        )


def _model_in(folder: Path) -> str | None:
    """Return what kind of model a folder holds, None for none."""
    if (folder / "config.json").is_file():
        try:
            return str(read_json(folder / "config.json")["model_type"])
        except (FileError, KeyError):
            return "with a config.json of another kind"
    weights = (name for name in ("adapter_config.json", "model.safetensors") if (folder / name).is_file())
    return next(weights, None)


def training_arguments(settings: TrainingSettings) -> IBKETrainingArguments:
    """Return the arguments of a training by its settings."""
    from .arguments import IBKETrainingArguments

    training = settings.training
    every = training.get("eval_steps", training.get("save_steps", 3000))
    defaults = {"save_steps": every, "save_total_limit": 2, "report_to": []}
    if settings.validation:
        defaults |= {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    return IBKETrainingArguments(str(Path(settings.out) / CHECKPOINTS), **{**defaults, **training})


def _patience(arguments: IBKETrainingArguments, records: int = 0) -> int:
    """Return the number of evaluations that `PATIENCE` steps make up; 17 with one each 3,000."""
    every = arguments.eval_steps or PATIENCE
    if every < 1:  # a share of all steps
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        in_epochs = arguments.num_train_epochs * math.ceil(records / batch)
        every = max(every * (arguments.max_steps if arguments.max_steps > 0 else in_epochs), 1)
    return math.ceil(PATIENCE / every)


def records_of(
    sources: Sequence[str] | None,
    changes: Mapping[str, Any],
    more: Sequence[EditRecord] = (),
    without: Sequence[str] = (),
    cache_dir: str | Path | None = None,
) -> ConcatDataset[EditRecord] | None:
    """Return the records of sources, kept on disk, and `more`, in a changed format; None without sources.

    Args:
        sources: Files or folders of any format, or Hub ids.
        changes: Fields of :class:`~ibke_hf.core.records.PromptFormat` that the records are put in.
        more: Further records, held in memory.
        without: Subjects whose records are left out.
        cache_dir: Where the sources are kept on disk; by default in the cache of `datasets`.
    """
    from torch.utils.data import ConcatDataset

    from ..data.rows import StoredRecords, records_dataset
    from .batches import RecordDataset

    if not sources:
        return None
    stored: list[Any] = [
        StoredRecords(records_dataset(source, cache_dir=cache_dir, without=without), changes) for source in sources
    ]
    drawn = [as_asked(record, **changes) for record in more]
    return ConcatDataset([*stored, *([RecordDataset(drawn)] if drawn else [])])


def _augmentation(settings: TrainingSettings, seed: int, without: Sequence[str]) -> list[EditRecord]:
    """Draw the few-shot records of other datasets; what was drawn is logged in the output folder."""
    if not settings.augment:
        return []
    records, log = draw_records(settings.augment, settings.augment_records, seed, without)
    for part in log:
        logger.warning(f"augment: {part['drawn']} records of {part['source']}")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / AUGMENTATION, log, ensure_ascii=False)
    return records


def _editor(settings: TrainingSettings, arguments: IBKETrainingArguments) -> tuple[Any, Any, Any]:
    """Load the backbone with its tokenizer and build an untrained editor for it."""
    import torch

    name, kind = settings.backbone, settings.kind
    dtype = settings.dtype or PAPER_DTYPES.get(name, "auto")
    placed: dict[str, Any] = {"device": arguments.device}
    if settings.device_map is not None or settings.shard_backbone:
        placed = {"device_map": settings.device_map}
    backbone, tokenizer = load_model(name, dtype=dtype, bits=settings.bits, **placed)
    if settings.shard_backbone:
        shard_backbone(backbone, arguments.device)
    if kind == "serac":
        starts = {part: _start(settings.editor[part], backbone) for part in SERAC_STARTS if settings.editor.get(part)}
        return (
            editor_class(kind).for_backbone(backbone, settings.layers, **{**settings.editor, **starts}),
            backbone,
            tokenizer,
        )
    preset = PRESETS.get(name, {})
    fields_of_editor = {"edited_modules": preset.get("edited_modules"), **settings.editor}
    if backbone.dtype == torch.float16:
        fields_of_editor.setdefault("capture_loss_scale", 1024.0)  # or small gradients vanish
    layers = settings.layers or preset.get("edited_layers")
    if settings.fit_width:
        fields_of_editor = fit_width(kind, backbone, layers, fields_of_editor)
    editor = editor_class(kind).for_backbone(backbone, layers, **fields_of_editor)
    return editor, backbone, tokenizer


def _start(name: str, backbone: Any) -> Any:
    """Return the decoder whose weights a part of SERAC starts from, ``"backbone"`` for the backbone's own."""
    return backbone if name == "backbone" else load_model(name, dtype="float32")[0]
