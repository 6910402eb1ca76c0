"""A full model with an edit merged into its weights, as transformers saves one: in its precision and shards."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils.hub import cached_file

from ..core.edits import WeightEdit
from ..core.files import FileError, written_together
from ..core.weights import weight_of
from ..io import read_json, write_json

INDEX = "model.safetensors.index.json"
IN_ONE_FILE = "100000GB"


def write_merged(edit: WeightEdit, model: Any, tokenizer: Any, out: str | Path, *, force: bool = False) -> list[Path]:
    """Merge an edit, save the model and its tokenizer, read the edited weights back, and undo the merge exactly.

    Args:
        edit: A single edit.
        model: The backbone; its weights are what they were when this returns.
        tokenizer: Saved beside the model.
        out: Folder of the full model; a write that is cut leaves no half of one.
        force: Merge also into weights other than the edit was made on.

    Returns:
        The files of weights.

    Raises:
        BackboneError: If a layer does not fit, or is quantised, offloaded to disk or tied to another module's.
        NonFiniteError: If a merged weight would not be finite.
        FileError: If the files read back otherwise than they were written.
    """
    merged = edit.merge_into(model, force=force)
    try:
        with written_together(out) as scratch:
            model.save_pretrained(scratch, max_shard_size=IN_ONE_FILE)
            _shard(scratch, shards_of(model))
            tokenizer.save_pretrained(scratch)
            _require_same(scratch, {name: weight_of(module) for name, module in merged.modules.items()})
    finally:
        merged.undo()
    return sorted(Path(out).glob("*.safetensors"))


def shards_of(model: Any) -> dict[str, str]:
    """Return the file of each weight where a model was loaded from; empty where it lies in one file, or is no folder.

    Of a model of the Hub the index is the one that was downloaded.
    """
    name = str(getattr(model.config, "name_or_path", "") or "")
    try:
        index = cached_file(name, INDEX, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return {} if index is None else dict(read_json(index)["weight_map"])
    except (OSError, ValueError, KeyError):
        return {}


def _shard(folder: Path, shards: Mapping[str, str]) -> None:
    """Distribute the weights of a folder over files as they were before, one file in memory at a time.

    Left as they are where the names differ, as of a model that transformers saves in another form than it loaded.
    """
    homes = {key: file for file in folder.glob("*.safetensors") for key in _keys(file)}
    if homes.keys() != shards.keys():
        return
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        moved = {file: file.rename(Path(aside) / file.name) for file in set(homes.values())}
        total = 0
        for shard in sorted(set(shards.values())):
            tensors = {key: _tensor(moved[homes[key]], key) for key in shards if shards[key] == shard}
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, folder / shard, metadata={"format": "pt"})
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(shards)}, indent=2)


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _tensor(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(key)


def _require_same(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare the edited weights with those on disk; a name that transformers saves otherwise is not compared."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for key in set(stored.keys()) & {f"{name}.weight" for name in weights}:
                weight, saved = weights[key.removesuffix(".weight")], stored.get_tensor(key)
                if saved.dtype != weight.dtype or not torch.equal(saved, weight.cpu()):
                    raise FileError(f"{file.name}: {key} reads back otherwise than it was merged; write it again")
