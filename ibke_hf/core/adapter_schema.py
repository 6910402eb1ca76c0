"""What may stand in a saved edit's ``adapter_config.json`` and ``edit.json``, checked key by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex  # transformers depends on it: unlike `re` it can give up on a pattern that never ends

from .edit_values import EditInfo
from .files import FileError
from .records import EditRequest

WEIGHTS, CONFIG, INFO = "adapter_model.safetensors", "adapter_config.json", "edit.json"
KEYS, PARTS = "keys.safetensors", "parts.safetensors"  # beside the adapter, for composition
FORMAT_VERSION = 1
MATCHING_SECONDS = 0.2  # of processor time that one pattern may take on one name
OTHER_MATHEMATICS = {  # fields of PEFT whose adapters are no sum of products
    "use_dora": "DoRA, which also scales the whole weight",
    "use_qalora": "QALoRA, which pools the inputs",
    "alora_invocation_tokens": "aLoRA, which is switched on by tokens",
    "arrow_config": "Arrow, which routes between adapters",
    "use_bdlora": "BD-LoRA, which is block-diagonal",
    "layer_replication": "layer replication, which adds layers",
    "target_parameters": "target_parameters, which are no linear layers",
}
Check = Callable[[Any], bool]


class AdapterError(FileError):
    """A saved edit or adapter that cannot be read; the message names the file and the key."""


@dataclass(frozen=True)
class Key:
    """What a key may hold: a check, the words for it, and what stands for the key where it is absent."""

    check: Check
    words: str
    default: Any = None
    required: bool = False


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _mapping_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_request(value: Any) -> bool:
    """Tell a request as :meth:`EditRequest.to_json` writes it."""
    if not isinstance(value, dict) or not isinstance(value.get("format", {}), dict):
        return False
    if not (
        _is_text(value.get("prompt")) and _is_text(value.get("target")) and _or_null(_is_text)(value.get("subject"))
    ):
        return False
    try:
        EditRequest(**value)
    except (TypeError, ValueError):  # a key that it does not have, or a format that does not exist
        return False
    return True


def _is_solved(value: Any) -> bool:
    """Tell what :func:`ibke_hf.core.part_files.save_parts` says of edits that were solved together."""
    if not isinstance(value, dict) or not _is_number(value.get("ridge")) or not value["ridge"] > 0:
        return False
    return _list_of(lambda part: isinstance(part, dict))(value.get("parts")) and bool(value["parts"])


ADAPTER_KEYS = {
    "peft_type": Key(_is_text, "a text", required=True),
    "lora_alpha": Key(_is_number, "a finite number", default=8),  # PEFT's default
    "use_rslora": Key(_or_null(_is_flag), "true or false", default=False),
    "alpha_pattern": Key(_or_null(_mapping_of(_is_number)), "an object of finite numbers by pattern"),
    "rank_pattern": Key(_or_null(_mapping_of(_is_count)), "an object of ranks by pattern"),
    "target_modules": Key(
        lambda v: v is None or _is_text(v) or _list_of(_is_text)(v), "a pattern, or names in a list"
    ),
    "base_model_name_or_path": Key(_or_null(_is_text), "a text"),
}
INFO_KEYS = {
    "format_version": Key(_is_count, "a whole number", required=True),
    "requests": Key(_list_of(_is_request), "a list of objects with prompt, target and subject", required=True),
    "editor": Key(_is_text, "a text", required=True),
    "backbone": Key(_is_text, "a text", required=True),
    "fingerprint": Key(_mapping_of(_list_of(_is_number)), "an object of lists of finite numbers", required=True),
    "transposed": Key(_is_flag, "true or false", required=True),
    "scores": Key(_mapping_of(_is_number), "an object of finite numbers", required=True),
    "rows": Key(_list_of(_list_of(_is_count)), "a list of lists of whole numbers", default=()),
    "model_type": Key(_is_text, "a text", default=""),
    "relative_error": Key(_mapping_of(_is_number), "an object of finite numbers", default={}),
    "kind": Key(_is_text, "a text", default="low-rank"),
    "keys": Key(_is_text, "a text", default=""),
    "solved": Key(_is_solved, "an object with a ridge above 0 and the edits in a list", default=None),
    "settings": Key(lambda v: isinstance(v, dict), "an object"),
}


def _checked(content: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    """Return the value of every key, its default where it is absent.

    Raises:
        AdapterError: If a key is missing or holds something else.
    """
    values = {}
    for name, key in keys.items():
        if name not in content:
            if key.required:
                raise AdapterError(f"{where}: {name} is missing; save or download the edit again")
            values[name] = key.default
            continue
        if not key.check(content[name]):
            shown = repr(content[name])
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise AdapterError(f"{where}: {name} must be {key.words}, found {shown}; save or download the edit again")
        values[name] = content[name]
    return values


@dataclass(frozen=True)
class AdapterSettings:
    """What ``adapter_config.json`` says that bears on the maths.

    Attributes:
        where: The file, as errors name it.
        values: Checked values by key.
    """

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> AdapterSettings:
        """Check the content of the file.

        Raises:
            AdapterError: If it is no plain LoRA adapter's, or a key holds something else than it may.
        """
        values = _checked(content, ADAPTER_KEYS, where)
        if values["peft_type"] != "LORA":
            raise AdapterError(f"{where}: only LoRA adapters can be read as edits, found {values['peft_type']!r}")
        for name, kind in OTHER_MATHEMATICS.items():
            if content.get(name):
                raise AdapterError(f"{where}: only plain LoRA adapters can be read as edits, found {kind} ({name})")
        return cls(where, values)

    @property
    def backbone(self) -> str:
        """Name of the backbone, empty where none is stated."""
        return self.values["base_model_name_or_path"] or ""

    def scale(self, name: str, rank: int) -> float:
        """Return what the product of a layer's factors is multiplied by; PEFT matches patterns with its name's end."""
        alpha = self.values["lora_alpha"]
        for pattern, value in (self.values["alpha_pattern"] or {}).items():
            if self._matches(rf"(.*\.)?({pattern})$", name, "alpha_pattern"):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.values["use_rslora"] else rank)

    def require_targets(self, layers: Sequence[str], where: str) -> None:
        """Hold the layers of the weights against the config's: PEFT only warns about the difference.

        A target names a layer in full or by the end of its name; of the latter a model may have none.

        Raises:
            AdapterError: If the weights are of other layers.
        """
        targets, missing = self.values["target_modules"], []
        if isinstance(targets, str):
            any_layer = targets.lower() == "all-linear"  # PEFT's word for it
            foreign = [
                name
                for name in layers
                if not any_layer and not self._matches(targets, name, "target_modules", whole=True)
            ]
        elif targets is None:
            foreign = []
        else:
            foreign = [name for name in layers if not any(_ends(name, target) for target in targets)]
            in_full = [target for target in targets if any(part.isdigit() for part in target.split("."))]
            missing = [target for target in in_full if not any(_ends(name, target) for name in layers)]
        if foreign or missing:
            what = (
                f"factors of {foreign[0]!r}, not named" if foreign else f"no factors of {missing[0]!r}, which is named"
            )
            raise AdapterError(
                f"{where}: holds {what} in {CONFIG}; the two are not of one adapter, save or download it again"
            )

    def _matches(self, pattern: str, name: str, key: str, *, whole: bool = False) -> bool:
        try:
            compiled = regex.compile(pattern)
            match = compiled.fullmatch if whole else compiled.match
            return match(name, timeout=MATCHING_SECONDS) is not None
        except TimeoutError as error:
            raise AdapterError(
                f"{self.where}: {key}: the pattern {pattern!r} takes more than {MATCHING_SECONDS:g} s on {name!r}; "
                f"write it more simply"
            ) from error
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterError(
                f"{self.where}: {key}: {pattern!r} is no valid regular expression ({error}); mend it"
            ) from error


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def edit_info(content: Mapping[str, Any], where: str) -> tuple[EditInfo, dict[str, Any]]:
    """Return the provenance that ``edit.json`` holds, and all of its checked values.

    Raises:
        AdapterError: If a key is missing or holds something else than it may, or the format is newer.
    """
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:  # before what a newer format may have changed
        raise AdapterError(f"{where}: format {version} is newer than {FORMAT_VERSION}; update ibke_hf")
    values = _checked(content, INFO_KEYS, where)
    requests = tuple(EditRequest(**request) for request in values["requests"])
    rows = tuple(map(tuple, values["rows"]))
    if any(place >= len(requests) for row in rows for place in row):
        raise AdapterError(f"{where}: rows names a request beyond the {len(requests)} that there are")
    names = ("editor", "backbone", "fingerprint", "transposed", "scores", "model_type")
    return EditInfo(requests=requests, rows=rows, **{name: values[name] for name in names}), values


def part_info(content: Mapping[str, Any], whole: EditInfo, where: str) -> EditInfo:
    """Return the provenance of one of several edits, the whole's where ``edit.json`` says nothing else of it.

    Raises:
        AdapterError: As :func:`edit_info` does.
    """
    names = ("editor", "backbone", "fingerprint", "transposed", "scores", "model_type")
    shared = {name: getattr(whole, name) for name in names}
    return edit_info({"format_version": FORMAT_VERSION, **shared, **content}, where)[0]
