"""Low-rank edits on disk and on the Hub: a PEFT LoRA adapter plus ``edit.json``, written without importing peft."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .adapter_schema import CONFIG, INFO, KEYS, PARTS, WEIGHTS, AdapterError, AdapterSettings, edit_info
from .capture import NonFiniteError
from .edit_values import EditInfo, info_json, whole_package
from .files import read_json, written_together
from .hub_files import NETWORK_ERRORS, MissingFileError, find_file, pinned
from .library_internals import is_redirected_by_peft
from .ridge import in_16_bit

if TYPE_CHECKING:
    from torch import Tensor

    from .edits import LowRankEdit

__all__ = [
    "CONFIG",
    "INFO",
    "NETWORK_ERRORS",
    "WEIGHTS",
    "AdapterError",
    "MissingFileError",
    "publisher",
    "read_edit",
    "read_info",
    "read_weights",
    "save_edit",
    "save_tensors",
    "with_uniform_rank",
]

PREFIX = "base_model.model."
LARGEST_RANK = 512  # that serving engines take; a layer may have more
LARGEST_NORM = 1e30  # of an update; far below fp32's end, so that products of its entries are finite


def save_edit(
    edit: LowRankEdit,
    folder: str | Path,
    *,
    max_rank: int | None = None,
    rank: int | None = None,
    transposed: bool | None = None,
    keys: bool = True,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    **more: Any,
) -> None:
    """Save one edit as a LoRA adapter: A = ĥ, B = ûᵀ, alpha = r, full module names, one rank for all layers.

    Its keys lie in a file beside the adapter, in 16 bit, which PEFT does not read.

    Args:
        edit: A single edit; of several independent ones save ``edit[i]``.
        folder: Created if needed; each file is written to a temporary name and renamed.
        max_rank: Truncate to this rank (SVD) if the edit's is higher; ``edit.json`` gets the relative error of each
            layer.
        rank: Save in this very rank: truncated if the edit's is higher, else padded with zeros. Default: the highest
            layer's.
        transposed: PEFT's `fan_in_fan_out`, true for Conv1D backbones; remembered from the backbone by default.
        keys: Save the keys, if the edit has any: without them it cannot be solved together with others.
        beside: Tensors of further files, by the files' names.
        more: Further fields of ``edit.json``.

    Raises:
        ValueError: If this holds several independent edits, a rank is below 1 or far too high, or both are given.
        AdapterError: If PEFT would not apply the adapter, as to the experts of a mixture.
        NonFiniteError: If a factor is NaN or infinite; nothing is written then.
    """
    edit = with_uniform_rank(edit, max_rank, rank)
    _require_finite(edit.tensors())
    _require_applied_by_peft(edit)
    weights = {}
    for name in edit.inputs:
        weights[f"{PREFIX}{name}.lora_A.weight"] = edit.inputs[name][0]
        weights[f"{PREFIX}{name}.lora_B.weight"] = edit.outputs[name][0].T
    files = {WEIGHTS: weights, **(beside or {})}
    if keys and edit.keys:
        files[KEYS], more = key_tensors(edit), {"keys": KEYS, **more}
        _require_finite({f"the key at {name}": rows for name, rows in files[KEYS].items()})
    config = _lora_config(edit, transposed)
    with written_together(folder) as scratch:
        for file, tensors in files.items():  # edits may share tensors, which the format does not
            stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(stored, scratch / file, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        text = info_json(edit.info, relative_error=dict(edit.relative_error), **more)
        (scratch / INFO).write_text(text, encoding="utf-8")
    for file in {KEYS, PARTS} - set(files):  # of an edit that was saved here before
        (Path(folder) / file).unlink(missing_ok=True)


def _require_applied_by_peft(edit: LowRankEdit) -> None:
    lost = [name for name in edit.layers if is_redirected_by_peft(edit.info.model_type, name)]
    if lost:
        raise AdapterError(
            f"PEFT takes a LoRA adapter of {lost[0]} on {edit.info.model_type} models for one of other weights, where "
            f"it has no effect: it is not saved as one. Merge the edit (edit.merge_into(model)), or edit other "
            f"layers, such as the attention's output projection (edited_modules=...)"
        )


def _lora_config(edit: LowRankEdit, transposed: bool | None) -> dict[str, Any]:
    rank = max(edit.ranks.values())
    return {
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


def save_tensors(tensors: Mapping[str, Tensor], folder: str | Path, file: str, info: EditInfo, **more: Any) -> None:
    """Save an edit that is no adapter as one safetensors file and ``edit.json``, each written whole or not at all.

    Raises:
        NonFiniteError: If a value is NaN or infinite; nothing is written then.
    """
    _require_finite(tensors)
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
    most = max(LARGEST_RANK, *(min(h.shape[2], edit.outputs[name].shape[2]) for name, h in edit.inputs.items()))
    if rank is not None and rank > most:
        raise ValueError(
            f"rank {rank} is beyond what any of these layers or a serving engine takes; {most} is the most"
        )
    limit = max_rank if rank is None else rank
    if limit is not None and limit < max(edit.ranks.values()):
        edit = edit.truncate(limit)
    return edit.padded(rank or max(edit.ranks.values()))


def read_edit(
    name_or_path: str | Path, **hub_arguments: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], EditInfo, dict[str, float], dict[str, Tensor]]:
    """Read an edit, or any LoRA adapter without DoRA, from a folder or the Hub.

    Args:
        name_or_path: Folder or Hub id.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Returns:
        The fields of a :class:`~ibke_hf.LowRankEdit`: ĥ (1, r, d_in) and û (1, r, d_out) by module name, provenance,
        relative errors, and keys (1, l, d_in) where they were saved.

    Raises:
        AdapterError: If a file is missing, damaged or cannot be downloaded, or holds keys that are no LoRA factors, of
            layers that the config does not name, or not of all that it names.
    """
    hub_arguments |= pinned(name_or_path, CONFIG, hub_arguments)
    config = _read_json(name_or_path, CONFIG, hub_arguments)
    settings = AdapterSettings.of(config, f"{name_or_path}/{CONFIG}")
    where = f"{name_or_path}/{WEIGHTS}"
    inputs, outputs = _factors(where, read_weights(name_or_path, WEIGHTS, hub_arguments), settings)
    settings.require_targets(list(inputs), where)
    try:
        info, content = read_info(name_or_path, hub_arguments)
    except MissingFileError:
        info, content = EditInfo(backbone=settings.backbone), {}
    keys = _read_keys(name_or_path, content, hub_arguments)
    return inputs, outputs, info, content.get("relative_error", {}), keys


def key_tensors(edit: LowRankEdit, prefix: str = "") -> dict[str, Tensor]:
    """Return the keys of a single edit by module name, (l, d_in), in 16 bit and without the rows of padding."""
    tensors = {}
    for name, keys in edit.keys.items():
        rows = in_16_bit(keys.detach()[0])
        tensors[f"{prefix}{name}"] = rows[rows.abs().amax(-1) > 0] if bool(rows.any()) else rows[:1]
    return tensors


def _read_keys(
    name_or_path: str | Path, content: Mapping[str, Any], hub_arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Read the keys of a saved edit, (1, l, d_in) by module name; none where ``edit.json`` lists no file of them.

    Raises:
        AdapterError: If the file is missing or damaged.
    """
    if not content.get("keys"):
        return {}
    weights = read_weights(name_or_path, KEYS, hub_arguments)
    return {name: rows.unsqueeze(0) for name, rows in weights.items()}


def read_weights(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file of a saved edit.

    The tensors are copied to where the allocator would put them: those of a memory-mapped file may lie at odd
    addresses, where other kernels run, and the edit's answers would differ in their last bits from the saved edit's.

    Raises:
        AdapterError: If the file is missing, damaged, empty, or holds a value that is not finite or of an odd type.
    """
    where = f"{name_or_path}/{name}"
    try:
        weights = load_file(find_file(name_or_path, name, hub_arguments))
    except AdapterError:
        raise
    except (SafetensorError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise AdapterError(f"{where}: not a complete safetensors file ({error}); save or download it again") from error
    if not weights:
        raise AdapterError(f"{where}: the file holds no tensor; save or download it again")
    for key, tensor in weights.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize < 2):
            raise AdapterError(f"{where}: {key} is {dtype}, which cannot be read as an edit; save it in float32")
        if not tensor.ndim:
            raise AdapterError(f"{where}: {key} is a single number, not a tensor of an edit; save the edit again")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{where}: {key} is not finite; make the edit again")
    return {key: tensor.clone() for key, tensor in weights.items()}


def read_info(name_or_path: str | Path, hub_arguments: Mapping[str, Any]) -> tuple[EditInfo, dict[str, Any]]:
    """Read ``edit.json``: the provenance, and everything that the file holds.

    Raises:
        MissingFileError: If there is none.
        AdapterError: If it is damaged, lacks a field, or is of a newer format.
    """
    return edit_info(_read_json(name_or_path, INFO, hub_arguments), f"{name_or_path}/{INFO}")


def publisher() -> Any:
    """Return what publishes editors and edits, which does not travel with this code.

    Raises:
        ImportError: Where `ibke_hf` is not installed.
    """
    return whole_package("hub.push", "publishing")


def _read_json(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, Any]:
    file = find_file(name_or_path, name, hub_arguments)
    return read_json(file, name=f"{name_or_path}/{name}", cure="save or download it again", error=AdapterError)


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise NonFiniteError(f"{bad[0]} of the edit is NaN or infinite; nothing is saved: make the edit again")


def _factors(
    where: str, weights: dict[str, Tensor], settings: AdapterSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ĥ (1, r, d_in) and û (1, r, d_out) by layer, the adapter's scale folded into û."""
    sides: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, tensor in weights.items():
        name, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if side not in sides:
            raise AdapterError(f"{where}: key {key!r} is not a LoRA factor of a linear layer")
        if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.numel():
            raise AdapterError(
                f"{where}: {key} must be a matrix of floating-point numbers, found {tuple(tensor.shape)} of "
                f"{str(tensor.dtype).removeprefix('torch.')}; save or download it again"
            )
        sides[side][name] = tensor
    unpaired = set(sides["lora_A"]) ^ set(sides["lora_B"])
    if unpaired:
        raise AdapterError(f"{where}: layers without both factors: {sorted(unpaired)}")
    inputs, outputs = {}, {}
    for name, a in sides["lora_A"].items():
        scale, b = settings.scale(name, a.shape[0]), sides["lora_B"][name].T
        if math.prod((a.double().norm().item(), b.double().norm().item(), abs(scale))) > LARGEST_NORM:
            raise AdapterError(
                f"{where}: the factors of {name} times lora_alpha / r = {scale:g} are no finite update; make the edit "
                f"again"
            )
        inputs[name] = a.unsqueeze(0).contiguous()
        outputs[name] = (b if scale == 1 else b * scale).unsqueeze(0).contiguous()
    return inputs, outputs
