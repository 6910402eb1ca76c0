"""Settings of `ibke train`: a YAML file and flags -> a dataclass, its types checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

import torch
from huggingface_hub.dataclasses import strict, validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..core.configuration_ibke import PRESETS
from ..core.records import PromptFormat
from ..data.augmentation import RECORDS_OF_EACH
from ..editors.catalogue import TRAINED, config_class
from ..io import read_yaml

SERAC_STARTS = ("scope", "counterfactual")  # decoders that its two parts start from
REQUIRED = ("backbone", "records", "out")
LISTS = ("records", "validation", "augment", "without")  # one source may stand for a list of it
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAVED_DTYPES = ("float32", "float16")
MOST_SHOWN = 60  # names in an error; the training arguments are twice as many
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
DECIDED = {  # fields of the editors' configs that the backbone and the settings beside them decide
    "backbone",
    "base_model_name_or_path",
    "trained_edits_per_group",
    "edited_layers",
    "input_dims",
    "output_dims",
    "scope_model",
    "counterfactual_model",
    "separator",
}
OF_A_BACKBONE = {"edited_modules": "{i}", "edited_module": "0", "edited_layers": (0,), "edited_layer": 0}
EXAMPLES = {**OF_A_BACKBONE, "expert_width": 1}  # of fields without a default, which the backbone decides


@strict
@dataclass
class TrainingSettings:
    """What `ibke train` is told.

    Attributes:
        backbone: Folder or Hub id of the language model.
        records: Sources of the training records.
        out: Folder of the trained editor.
        validation: Sources of held-out records, for early stopping and the report.
        augment: Other datasets, some records of each of which are mixed in.
        augment_records: Records drawn of each of them.
        kind: Kind of editor.
        layers: Edited layers; by default the preset's, else by depth.
        dtype: Precision of the backbone; by default the paper's for its backbones, else as saved.
        device_map: Where the parts of the backbone go, see :func:`~ibke_hf.loading.load_model`; by default all to
            the device that is trained on.
        bits: Quantise the backbone as it is loaded, to 8 or 4 bits, see :func:`~ibke_hf.loading.load_model`.
        shard_backbone: Shard the backbone over the processes of the training (FSDP2), which each hold the whole
            editor, see :func:`~ibke_hf.training.sharding.shard_backbone`.
        editor: Fields of the editor's config.
        training: Fields of :class:`~ibke_hf.training.arguments.IBKETrainingArguments`.
        chat: Ask through the backbone's chat template.
        chat_options: What the template is given.
        chat_share: Share of the records that are asked in a chat beside their plain requests, where the tokenizer has
            a chat template, see :class:`~ibke_hf.training.batches.AlsoInChat`.
        without: Record files whose subjects are not trained on, such as those that are to measure the editor.
        choose_step_size: Try step sizes (SERAC: thresholds) on validation records once training is done, and keep the
            best Avg, see :func:`~ibke_hf.training.strength.choose_strength`. By default where there are validation
            records, except for the paper's backbones, whose presets are to give what the paper describes: training
            sets η for its loss, which says little of how edits and locality weigh against each other in Avg, and the
            trials take minutes.
        save_dtype: Precision that the editor is saved in, float32 or float16 (statistics and η stay in fp32); the
            step size is then chosen with weights rounded to it.
        fit_width: Choose d_m, or MEND's hidden_dim, by the size of the backbone, where it is not among `editor`, see
            :func:`~ibke_hf.training.width.fit_width`.
        leading_space: What stands before targets, see :class:`~ibke_hf.core.records.PromptFormat`; by default as the
            records have it.
    """

    backbone: str
    records: list[str]
    out: str
    validation: list[str] | None = None
    augment: list[str] | None = None
    augment_records: int = RECORDS_OF_EACH
    kind: str = "ibke"
    layers: list[int] | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | None = None
    bits: int | None = None
    shard_backbone: bool = False
    editor: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    chat_options: dict[str, Any] = field(default_factory=dict)
    leading_space: str | None = None
    chat_share: float = 0.5
    without: list[str] | None = None
    choose_step_size: bool | None = None
    save_dtype: str = "float32"
    fit_width: bool = False

    @property
    def chooses_step_size(self) -> bool:
        """Whether step sizes are tried once training is done."""
        if self.choose_step_size is None:
            return self.validation is not None and self.backbone not in PRESETS
        return self.choose_step_size

    def prompt_changes(self) -> dict[str, Any]:
        """Return the fields of :class:`~ibke_hf.core.records.PromptFormat` that the settings change."""
        changes = {"chat": self.chat, "chat_options": self.chat_options, "leading_space": self.leading_space}
        return {name: value for name, value in changes.items() if value}

    def validate_values(self) -> None:
        """Check what a type cannot say; a bad value is named with what is allowed."""
        if self.augment_records < 1:
            raise ValueError(f"augment_records must be a whole number of at least 1, found {self.augment_records}")
        if not 0 <= self.chat_share <= 1:
            raise ValueError(f"chat_share must be from 0 to 1, found {self.chat_share}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.save_dtype not in SAVED_DTYPES:
            raise ValueError(f"save_dtype must be one of {', '.join(SAVED_DTYPES)}, found {self.save_dtype!r}")
        if self.choose_step_size and not self.validation:
            raise ValueError("choose_step_size tries step sizes on validation records; give some (--validation)")
        if self.training.get("activation_cache") is not None:
            require_reader(self.kind)
        if self.shard_backbone:
            self._require_shardable()
        PromptFormat(**self.prompt_changes())

    def _require_shardable(self) -> None:
        if self.kind not in ("ibke", "mend"):
            raise ValueError(f"shard_backbone goes with ibke and mend; leave it out for {self.kind}")
        if self.bits is not None:
            raise ValueError(
                "bits and shard_backbone do not go together; a quantised backbone is whole in each process"
            )
        if self.device_map is not None:
            raise ValueError("device_map and shard_backbone both say where the backbone goes; give one of them")
        if self.training.get("activation_cache") is not None:
            raise ValueError("activation_cache runs a backbone in parts, which one that is sharded cannot; give one")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainingSettings:
        """Check settings by name; None means not given.

        Raises:
            ValueError: For an unknown or missing setting, or a value that cannot be; one line that names it.
        """
        values = _without_none(settings)
        for name in LISTS:
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        if (kind := values.get("kind", "ibke")) not in TRAINED:
            raise ValueError(f"kind must be one of {', '.join(TRAINED)}, found {kind!r}")
        hints = get_type_hints(cls)
        unknown = [name for name in values if name not in hints]
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; settings are {', '.join(hints)}")
        for name, value in values.items():
            require_type(name, value, hints[name])
        values["training"] = training_fields(values.get("training", {}))
        values["editor"] = editor_fields(values.get("editor", {}), kind)
        missing = [name for name in REQUIRED if values.get(name) in (None, "", [])]
        if missing:
            raise ValueError(
                f"missing setting: {', '.join(missing)}; give it as a flag (--{missing[0]}) or in the YAML file"
            )
        try:
            return cls(**values)
        except StrictDataclassError as error:
            raise ValueError(_reason(error)) from error


def require_reader(kind: str) -> None:
    """Check that a kind of editor reads what a cache of activations holds.

    Raises:
        ValueError: If it does not.
    """
    if kind not in ("ibke", "mend"):
        raise ValueError(f"activation_cache holds what ibke and mend read; leave it out for {kind}")


TOP_LEVEL = tuple(each.name for each in fields(TrainingSettings))


def training_settings(
    config: str | Path | None,
    flags: Mapping[str, Any],
    editor: Mapping[str, Any],
    training: Mapping[str, Any],
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Merge a YAML file with flags, which win; None means not given.

    Args:
        config: The file, with settings of `TOP_LEVEL`.
        flags: Settings of `TOP_LEVEL`.
        editor: Fields of the editor's config.
        training: Fields of :class:`~ibke_hf.training.arguments.IBKETrainingArguments`.
        defaults: Returns settings, by all that is given, over which the file and the flags win.

    Returns:
        What is given of :class:`TrainingSettings`, as JSON values.

    Raises:
        ValueError: As :meth:`TrainingSettings.of`.
    """
    settings = (read_settings(config) if config is not None else {}) | _without_none(flags)
    for name, group in (("editor", editor), ("training", training)):
        settings[name] = {**(settings.get(name) or {}), **_without_none(group)}
    if defaults is not None:
        settings = _over(defaults(settings), settings)
    checked = asdict(TrainingSettings.of(settings))
    return {name: checked[name] for name, value in settings.items() if value is not None}


def _over(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with what they leave out; fields of a group count one by one."""
    groups = {name: {**(defaults.get(name) or {}), **settings[name]} for name in ("editor", "training")}
    return {**defaults, **_without_none(settings), **groups}


def read_settings(config: str | Path, known: Sequence[str] = TOP_LEVEL) -> dict[str, Any]:
    """Read a YAML file of settings by name.

    Args:
        config: The file.
        known: Names of the settings that it may hold.

    Raises:
        ValueError: If it is no such file, or holds another setting; names it.
    """
    settings = read_yaml(config, cure=f"the settings are {', '.join(known)}")
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{config}: unknown setting {unknown[0]!r}; settings are {', '.join(known)}")
    for name in ("editor", "editors", "training"):
        if not isinstance(settings.get(name) or {}, dict):
            raise ValueError(f"{config}: {name}: must hold settings by name, found {settings[name]!r}")
    return {name: _numbers(value) for name, value in settings.items()}


def require_type(name: str, value: Any, hint: Any) -> None:
    """Check a value against a type, as `huggingface_hub` checks configs.

    Raises:
        ValueError: If it has another one; names setting, type and value.
    """
    make: Any = TypedDict  # mypy has no idea of one that is made here
    try:
        validate_typed_dict(make("Setting", {"value": hint}), {"value": value})
    except StrictDataclassError as error:
        kind = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
        raise ValueError(f"{name} must be of type {kind}, found {value!r}") from error


def training_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check fields of the training arguments by their types; whole numbers become the floats that are wanted.

    Raises:
        ValueError: For an unknown field, or a value of another type; one line that names it.
    """
    from .arguments import IBKETrainingArguments

    _require_finite(values, "training")
    hints = get_type_hints(IBKETrainingArguments)
    known = [each.name for each in fields(IBKETrainingArguments) if each.init and each.name != "output_dir"]
    _require_known(values, known, "training")
    checked = {name: _as_float(value, hints[name]) for name, value in values.items()}
    for name, value in checked.items():
        require_type(f"training: {name}", value, hints[name])
    return checked


def editor_fields(values: Mapping[str, Any], name: str, group: str = "editor") -> dict[str, Any]:
    """Check fields of an editor's config, by building one; whole numbers become the floats that are wanted.

    Args:
        values: The fields.
        name: Id of the editor, see :data:`~ibke_hf.editors.catalogue.KINDS`.
        group: Where errors say that the fields stand.

    Raises:
        ValueError: For an unknown field, or a value that cannot be; one line that names it.
    """
    _require_finite(values, group)
    config = config_class(name)
    required = [each.name for each in fields(config) if each.default is MISSING and each.default_factory is MISSING]
    decided = DECIDED | {each.name for each in fields(PreTrainedConfig)} | ({*required} & {*OF_A_BACKBONE})
    starts = SERAC_STARTS if name == "serac" else ()
    known = [each.name for each in fields(config) if each.name not in decided] + list(starts)
    _require_known(values, known, group)
    hints = get_type_hints(config, localns={"torch": torch}) | dict.fromkeys(starts, str)  # a name of transformers'
    checked = {field: _as_float(value, hints[field]) for field, value in values.items()}
    for field_name, value in checked.items():
        require_type(f"{group}: {field_name}", value, hints[field_name])
    examples = {field: EXAMPLES[field] for field in required if field not in checked}
    try:
        config(**examples, **{field: value for field, value in checked.items() if field not in starts})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{group}: {_reason(error)}") from error
    return checked


def _require_known(values: Mapping[str, Any], known: Sequence[str], group: str) -> None:
    from .arguments import LOWEST

    unknown = [name for name in values if name not in known]
    if unknown:
        shown = known if len(known) <= MOST_SHOWN else [*get_close_matches(str(unknown[0]), known), *LOWEST]
        more = "" if len(shown) == len(known) else " and the others of IBKETrainingArguments"
        raise ValueError(f"unknown setting {unknown[0]!r} under {group}:; settings are {', '.join(shown)}{more}")


def _require_finite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, found {value}")
    for key, inner in value.items() if isinstance(value, dict) else ():
        _require_finite(inner, f"{name}: {key}")
    for inner in value if isinstance(value, list | tuple) else ():
        _require_finite(inner, name)


def _as_float(value: Any, hint: Any) -> Any:
    """Return a whole number as the float that a field wants, and a list as the tuple."""
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):  # YAML has lists alone
        return tuple(_as_float(inner, kind) for inner, kind in zip(value, kinds, strict=False)) + tuple(
            value[len(kinds) :]
        )
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in kinds and int not in kinds else value


def _numbers(value: Any) -> Any:
    """Read 1e-4 as the number that it is, wherever it stands; YAML takes a number without a point in it for text."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _reason(error: BaseException) -> str:
    """Return an error in one line, without the name of its class."""
    last = str(error.__cause__ or error)
    return " ".join(last.split())
