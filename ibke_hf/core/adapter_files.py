"""Low-rank edits on disk and on the Hub: a PEFT LoRA adapter plus ``edit.json``, written without importing peft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file, extract_commit_hash

from .edit_values import EditInfo, info_json
from .files import FileError, read_json, written_together
from .records import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from .edits import LowRankEdit

WEIGHTS, CONFIG, INFO = "adapter_model.safetensors", "adapter_config.json", "edit.json"
PREFIX = "base_model.model."
FORMAT_VERSION = 1
NETWORK_ERRORS: tuple[type[Exception], ...] = tuple(  # of the HTTP library that the Hub's client uses
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError"
)
_INFO_FIELDS = ("editor", "backbone", "fingerprint", "transposed", "scores")


class AdapterError(FileError):
    """A saved edit or adapter that cannot be read as a low-rank edit; the message names the file and the key."""


class MissingFileError(AdapterError):
    """A file of a saved edit that is not there."""


def save_edit(
    edit: LowRankEdit,
    folder: str | Path,
    *,
    max_rank: int | None = None,
    rank: int | None = None,
    transposed: bool | None = None,
) -> None:
    """Save one edit as a LoRA adapter: A = ĥ, B = ûᵀ, alpha = r, full module names, one rank for all layers.

    Args:
        edit: A single edit; of several independent ones save ``edit[i]``.
        folder: Created if needed; each file is written to a temporary name and renamed.
        max_rank: Truncate to this rank (SVD) if the edit's is higher; ``edit.json`` gets the relative error of each
            layer.
        rank: Save in this very rank: truncated if the edit's is higher, else padded with zeros. Default: the highest
            layer's.
        transposed: PEFT's `fan_in_fan_out`, true for Conv1D backbones; remembered from the backbone by default.

    Raises:
        ValueError: If this holds several independent edits, a rank is below 1, or both ranks are given.
    """
    edit = with_uniform_rank(edit, max_rank, rank)
    rank = max(edit.ranks.values())
    weights = {}
    for name in edit.inputs:
        weights[f"{PREFIX}{name}.lora_A.weight"] = edit.inputs[name][0].detach().cpu().contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = edit.outputs[name][0].detach().cpu().T.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(edit.inputs),
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": edit.info.transposed if transposed is None else transposed,
        "base_model_name_or_path": edit.info.backbone or None,
    }

    with written_together(folder) as scratch:
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (scratch / INFO).write_text(info_json(edit.info, relative_error=dict(edit.relative_error)), encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], folder: str | Path, file: str, info: EditInfo, **more: Any) -> None:
    """Save an edit that is no adapter as one safetensors file and ``edit.json``, each written to a temporary name and renamed."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_together(folder) as scratch:
        save_file(weights, scratch / file, metadata={"format": "pt"})
        (scratch / INFO).write_text(info_json(info, **more), encoding="utf-8")


def with_uniform_rank(edit: LowRankEdit, max_rank: int | None = None, rank: int | None = None) -> LowRankEdit:
    """Return a single edit in the form it is saved in, see :func:`save_edit`; serving engines take no other LoRA."""
    edit._require_one("save")
    if max_rank is not None and rank is not None:
        raise ValueError(
            f"max_rank={max_rank} and rank={rank} say different things; give max_rank, or rank for one with padding"
        )
    limit = max_rank if rank is None else rank
    if limit is not None and limit < max(edit.ranks.values()):
        edit = edit.truncate(limit)
    return edit.padded(rank or max(edit.ranks.values()))


def read_edit(
    name_or_path: str | Path, **hub_arguments: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], EditInfo, dict[str, float]]:
    """Read an edit, or any LoRA adapter without DoRA, from a folder or the Hub.

    Args:
        name_or_path: Folder or Hub id.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Returns:
        The fields of a :class:`~ibke_hf.LowRankEdit`: ĥ (1, r, d_in) and û (1, r, d_out) by module name, provenance,
        and relative errors.

    Raises:
        AdapterError: If a file is missing, damaged or cannot be downloaded, or holds keys that are no LoRA factors, of
            layers that the config does not name, or not of all that it names.
    """
    hub_arguments |= _pinned(name_or_path, hub_arguments)
    config = _read_json(name_or_path, CONFIG, hub_arguments)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise AdapterError(
            f"{name_or_path}: only plain LoRA adapters can be read as edits, found {config.get('peft_type')!r}"
        )
    inputs, outputs = _factors(str(name_or_path), read_weights(name_or_path, WEIGHTS, hub_arguments), config)
    _require_targets(str(name_or_path), list(inputs), config.get("target_modules"))
    try:
        info, content = read_info(name_or_path, hub_arguments)
    except MissingFileError:
        info, content = EditInfo(backbone=config.get("base_model_name_or_path") or ""), {}
    return inputs, outputs, info, content.get("relative_error", {})


def read_weights(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file of a saved edit.

    Raises:
        AdapterError: If the file is missing, damaged, empty, or holds a value that is not finite.
    """
    try:
        weights = load_file(_file(name_or_path, name, hub_arguments))
    except SafetensorError as error:
        raise AdapterError(
            f"{name_or_path}/{name}: not a complete safetensors file ({error}); save or download it again"
        ) from error
    bad = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad or not weights:
        raise AdapterError(
            f"{name_or_path}/{name}: {f'{bad[0]} is not finite' if bad else 'the file holds no tensor'}"
        )
    return weights


def read_info(name_or_path: str | Path, hub_arguments: Mapping[str, Any]) -> tuple[EditInfo, dict[str, Any]]:
    """Read ``edit.json``: the provenance, and everything that the file holds.

    Raises:
        MissingFileError: If there is none.
        AdapterError: If it is damaged, lacks a field, or is of a newer format.
    """
    content = _read_json(name_or_path, INFO, hub_arguments)
    try:
        version = content["format_version"]
        requests = tuple(EditRequest(**request) for request in content["requests"])
        info = EditInfo(requests=requests, **{key: content[key] for key in _INFO_FIELDS})
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"{name_or_path}/{INFO}: not the description of an edit ({error!r}); save the edit again"
        ) from error
    if version > FORMAT_VERSION:
        raise AdapterError(f"{name_or_path}/{INFO}: format {version} is newer than {FORMAT_VERSION}; update ibke_hf")
    return info, content


def publisher() -> Any:
    """Return what publishes editors and edits, which does not travel with this code.

    Raises:
        ImportError: Where `ibke_hf` is not installed.
    """
    try:
        return import_module("ibke_hf.hub.push")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "ibke_hf":
            raise ImportError(
                "publishing needs the package ibke_hf itself; install it, or save and upload the folder with `hf "
                "upload`"
            ) from error
        raise


def _file(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> Path:
    try:
        found = cached_file(str(name_or_path), name, **hub_arguments)
    except OSError as error:
        if isinstance(error.__cause__, (HfHubHTTPError, LocalEntryNotFoundError)) and not _known_missing(
            name_or_path, name, hub_arguments
        ):
            raise AdapterError(f"{name_or_path}: {name} cannot be downloaded ({error})") from error
        raise MissingFileError(
            f"{name_or_path}: no {name}; a saved edit has its weights and a description beside ({error})"
        ) from error
    except NETWORK_ERRORS as error:
        raise AdapterError(f"{name_or_path}: {name} cannot be downloaded ({error}); try again") from error
    return Path(str(found))


def _pinned(name_or_path: str | Path, hub_arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the commit that a revision is now, so that a push between two files does not mix old weights with a new config."""
    commit = extract_commit_hash(str(_file(name_or_path, CONFIG, hub_arguments)), None)
    return {} if commit is None or Path(name_or_path).is_dir() else {"revision": commit}


def _known_missing(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> bool:
    """Tell whether the cache knows that the repository has no such file, as of an adapter of PEFT's that is read offline."""
    where = {key: hub_arguments[key] for key in ("cache_dir", "revision") if key in hub_arguments}
    return try_to_load_from_cache(str(name_or_path), name, **where) is _CACHED_NO_EXIST


def _read_json(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Any]:
    file = _file(name_or_path, name, hub_arguments)
    return read_json(file, name=f"{name_or_path}/{name}", cure="save or download it again", error=AdapterError)


def _factors(
    where: str, weights: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, tensor in weights.items():
        name, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if side not in sides:
            raise AdapterError(f"{where}/{WEIGHTS}: key {key!r} is not a LoRA factor of a linear layer")
        sides[side][name] = tensor
    unpaired = set(sides["lora_A"]) ^ set(sides["lora_B"])
    if unpaired:
        raise AdapterError(f"{where}/{WEIGHTS}: layers without both factors: {sorted(unpaired)}")
    inputs, outputs = {}, {}
    for name, a in sides["lora_A"].items():
        alpha = _alpha(config, name)
        rank = a.shape[0]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = sides["lora_B"][name].T
        inputs[name] = a.unsqueeze(0).contiguous()
        outputs[name] = (b if scale == 1 else b * scale).unsqueeze(0).contiguous()
    return inputs, outputs


def _require_targets(where: str, layers: Sequence[str], targets: Any) -> None:
    """Hold the layers of the weights against the config's: PEFT only warns about the difference.

    A target names a layer in full or by the end of its name; of the latter a model may have none.
    """
    if not isinstance(targets, list):  # a pattern, or none stated
        foreign, missing = (
            [name for name in layers if isinstance(targets, str) and not re.fullmatch(targets, name)],
            [],
        )
    else:
        foreign = [
            name for name in layers if not any(name == target or name.endswith(f".{target}") for target in targets)
        ]
        in_full = [target for target in targets if any(part.isdigit() for part in target.split("."))]
        missing = [
            target for target in in_full if not any(name == target or name.endswith(f".{target}") for name in layers)
        ]
    if foreign or missing:
        what = f"factors of {foreign[0]!r}, not named" if foreign else f"no factors of {missing[0]!r}, which is named"
        raise AdapterError(
            f"{where}/{WEIGHTS}: holds {what} in {CONFIG}; the two are not of one adapter, save or download it again"
        )


def _alpha(config: Mapping[str, Any], name: str) -> float:
    """Return a layer's alpha; PEFT matches the keys of `alpha_pattern` as patterns against the end of its name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(config.get("lora_alpha", 8))  # PEFT's default
