"""The file of one edit of a library, named by the digest of what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.adapter_schema import edit_info
from ..core.capture import NonFiniteError
from ..core.edit_values import info_json
from ..core.edits import LowRankEdit
from .index import LibraryError

SIDES = ("inputs", "outputs", "keys")


def single_edits(edit: Any) -> list[LowRankEdit]:
    """Return the single low-rank edits that an edit of any of our low-rank editors holds.

    Raises:
        TypeError: If it is none.
    """
    parts = getattr(edit, "parts", (edit,))
    if not all(isinstance(part, LowRankEdit) for part in parts):
        raise TypeError(
            f"a library holds low-rank edits, found {type(edit).__name__}; those of IBKE, MEND, ROME and AlphaEdit are"
        )
    return [single for part in parts for single in part]


def edit_bytes(edit: LowRankEdit) -> bytes:
    """Return the file of one edit: its factors and keys, and what ``edit.json`` says of it.

    Raises:
        NonFiniteError: If a value is not finite.
    """
    tensors = {
        f"{side}.{name}": tensor.detach().cpu().contiguous()
        for side in SIDES
        for name, tensor in getattr(edit, side).items()
    }
    if bad := next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
        raise NonFiniteError(f"{bad} of the edit is NaN or infinite; nothing is added: make the edit again")
    about = json.loads(info_json(edit.info, relative_error=dict(edit.relative_error)))
    return packed_bytes(tensors, json.dumps(about, ensure_ascii=False, sort_keys=True))


def packed_bytes(tensors: Mapping[str, Tensor], about: str) -> bytes:
    """Return the file of one edit, the same for the same content whatever the order that it comes in."""
    return save({name: tensors[name] for name in sorted(tensors)}, metadata={"edit": about})


def read_edit_file(file: Path) -> LowRankEdit:
    """Read what :func:`edit_bytes` gave.

    Raises:
        LibraryError: If the file is missing or damaged.
    """
    sides: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
    try:
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {})["edit"])
            for key in stored.keys():  # noqa: SIM118  it is no mapping
                side, _, name = key.partition(".")
                sides[side][name] = stored.get_tensor(key).clone()
        info, values = edit_info(about, str(file))
        return LowRankEdit(sides["inputs"], sides["outputs"], info, values["relative_error"], sides["keys"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LibraryError(f"{file}: is no edit of a library ({error}); pull it, or add it again") from error
