"""Low-rank edits on disk and on the Hub: a PEFT LoRA adapter plus ``edit.json``, written without importing peft."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from .records import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from .edits import EditInfo, LowRankEdit

WEIGHTS, CONFIG, INFO = "adapter_model.safetensors", "adapter_config.json", "edit.json"
PREFIX = "base_model.model."
FORMAT_VERSION = 1
_INFO_FIELDS = ("editor", "backbone", "fingerprint", "transposed", "scores")


class AdapterError(ValueError):
    """A saved edit or adapter that cannot be read as a low-rank edit; the message names the file and the key."""


class MissingFileError(AdapterError):
    """A file of a saved edit that is not there."""


def save_edit(edit: LowRankEdit, folder: str | Path, *, rank: int | None = None, transposed: bool | None = None) -> None:
    """Save one edit as a LoRA adapter: A = ĥ, B = ûᵀ, alpha = r, full module names.

    Args:
        edit: A single edit; of several independent ones save ``edit[i]``.
        folder: Created if needed; each file is written to a temporary name and renamed.
        rank: Truncate to this rank (SVD) if the edit's is higher, else pad to it with zeros. Default: the highest layer's.
        transposed: PEFT's `fan_in_fan_out`, true for Conv1D backbones; remembered from the backbone by default.
    """
    edit._require_one("save")
    if rank is not None and rank < max(edit.ranks.values()):
        edit = edit.truncate(rank)
    edit = edit.padded(rank or max(edit.ranks.values()))
    rank = max(edit.ranks.values())
    weights = {}
    for name in edit.inputs:
        weights[f"{PREFIX}{name}.lora_A.weight"] = edit.inputs[name][0].detach().cpu().contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = edit.outputs[name][0].detach().cpu().T.contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(edit.inputs), "inference_mode": True, "use_dora": False, "use_rslora": False,
        "fan_in_fan_out": edit.info.transposed if transposed is None else transposed,
        "base_model_name_or_path": edit.info.backbone or None,
    }  # fmt: skip
    from .edits import info_json

    with written_whole(folder) as scratch:
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (scratch / INFO).write_text(info_json(edit.info, relative_error=dict(edit.relative_error)), encoding="utf-8")


def load_edit(name_or_path: str | Path, **hub_arguments: Any) -> LowRankEdit:
    """Load an edit, or any LoRA adapter without DoRA, from a folder or the Hub.

    Args:
        name_or_path: Folder or Hub id.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Raises:
        AdapterError: If a file is missing, damaged, or holds keys that are not LoRA factors.
    """
    from .edits import EditInfo, LowRankEdit

    config = _read_json(name_or_path, CONFIG, hub_arguments)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise AdapterError(f"{name_or_path}: only plain LoRA adapters can be read as edits, found {config.get('peft_type')!r}")
    inputs, outputs = _factors(str(name_or_path), read_weights(name_or_path, WEIGHTS, hub_arguments), config)
    try:
        info, content = read_info(name_or_path, hub_arguments)
    except MissingFileError:
        info, content = EditInfo(backbone=config.get("base_model_name_or_path") or ""), {}
    try:
        return LowRankEdit(inputs, outputs, info, content.get("relative_error", {}))
    except ValueError as error:
        raise AdapterError(f"{name_or_path}/{WEIGHTS}: {error}; save or download it again") from error


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder`, each by one rename, once all are written."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            path.replace(target / path.name)


def read_weights(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file of a saved edit.

    Raises:
        AdapterError: If the file is missing, damaged, empty, or holds a value that is not finite.
    """
    try:
        weights = load_file(_file(name_or_path, name, hub_arguments))
    except SafetensorError as error:
        raise AdapterError(f"{name_or_path}/{name}: not a complete safetensors file ({error}); save or download it again") from error
    bad = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad or not weights:
        raise AdapterError(f"{name_or_path}/{name}: {f'{bad[0]} is not finite' if bad else 'the file holds no tensor'}")
    return weights


def read_info(name_or_path: str | Path, hub_arguments: Mapping[str, Any]) -> tuple[EditInfo, dict[str, Any]]:
    """Read ``edit.json``: the provenance, and everything that the file holds.

    Raises:
        MissingFileError: If there is none.
        AdapterError: If it is damaged, lacks a field, or is of a newer format.
    """
    from .edits import EditInfo

    content = _read_json(name_or_path, INFO, hub_arguments)
    try:
        version = content["format_version"]
        requests = tuple(EditRequest(**request) for request in content["requests"])
        info = EditInfo(requests=requests, **{key: content[key] for key in _INFO_FIELDS})
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{name_or_path}/{INFO}: not the description of an edit ({error!r}); save the edit again") from error
    if version > FORMAT_VERSION:
        raise AdapterError(f"{name_or_path}/{INFO}: format {version} is newer than {FORMAT_VERSION}; update ibke_hf")
    return info, content


def push_edit(edit: LowRankEdit, repo_id: str, *, rank: int | None = None, **hub_arguments: Any) -> Any:
    """Publish an edit in one commit; takes `token`, `private`, `revision`, `commit_message`, `create_pr` of the Hub client."""
    from huggingface_hub import HfApi

    api = HfApi(token=hub_arguments.pop("token", None))
    api.create_repo(repo_id, private=hub_arguments.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_edit(edit, folder, rank=rank)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **{"commit_message": "Add edit", **hub_arguments})


def _file(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> Path:
    try:
        found = cached_file(str(name_or_path), name, **hub_arguments)
    except OSError as error:
        raise MissingFileError(f"{name_or_path}: no {name}; a saved edit has its weights and a description beside ({error})") from error
    return Path(str(found))


def _read_json(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Any]:
    text = _file(name_or_path, name, hub_arguments).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{name_or_path}/{name}: not complete JSON ({error}); save or download it again") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{name_or_path}/{name}: expected a JSON object, found {type(content).__name__}")
    return content


def _factors(where: str, weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def _alpha(config: Mapping[str, Any], name: str) -> float:
    """Return a layer's alpha; PEFT matches the keys of `alpha_pattern` as patterns against the end of its name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(config.get("lora_alpha", 8))  # PEFT's default
