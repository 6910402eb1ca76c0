"""What lies beside the adapter of edits that were solved together: each of them with its keys, in one file.

PEFT and serving engines do not read it; ``edit.json`` says what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_files import key_tensors, read_info, read_weights, save_edit
from .adapter_schema import INFO, PARTS, AdapterError, part_info
from .edit_values import EditInfo
from .hub_files import pinned

if TYPE_CHECKING:
    from torch import Tensor

    from .composition import SolvedEdit
    from .edits import LowRankEdit

FACTORS = ("inputs", "outputs", "keys")
COVARIANCE = "covariance"


def save_parts(edit: SolvedEdit, folder: str | Path, **options: Any) -> None:
    """Save a solved edit: its LoRA adapter as :func:`save_edit` does, and its parts beside it.

    Args:
        edit: A single one; of several independent ones save ``edit[i]``.
        folder: Created if needed.
        options: Those of :func:`save_edit`; an adapter that is truncated is saved without parts.
    """
    edit._require_one("save")
    stored = replace(edit, parts=tuple(_as_stored(part) for part in edit.parts))
    adapter = stored.low_rank()
    limit = options.get("max_rank") if options.get("rank") is None else options["rank"]
    if limit is not None and limit < max(adapter.ranks.values()):
        save_edit(adapter, folder, **options)
        return
    tensors: dict[str, Tensor] = {f"{COVARIANCE}.{name}": metric for name, metric in edit.covariance.items()}
    for place, part in enumerate(stored.parts):
        for field, by_name in (("inputs", part.inputs), ("outputs", part.outputs), ("keys", part.keys)):
            tensors |= {f"{place}.{field}.{name}": rows[0] for name, rows in by_name.items()}
    parts = [_difference(part.info, edit.info) for part in edit.parts]
    solved = {"ridge": float(edit.ridge), "parts": parts}
    save_edit(adapter, folder, **options, beside={PARTS: tensors}, solved=solved)


def _as_stored(part: LowRankEdit) -> LowRankEdit:
    return replace(part, keys={name: rows.unsqueeze(0) for name, rows in key_tensors(part).items()})


def _difference(info: EditInfo, whole: EditInfo) -> dict[str, Any]:
    """Return the requests of a part, and what else differs from the whole's provenance."""
    fields, others = asdict(info), asdict(whole)
    differing = {
        name: value for name, value in fields.items() if name not in ("requests", "rows") and value != others[name]
    }
    return {"requests": [request.to_json() for request in info.requests], **differing}


def read_parts(
    name_or_path: str | Path, hub_arguments: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], float, dict[str, Tensor], EditInfo]:
    """Read what a solved edit was saved with.

    Returns:
        The fields of each part, a :class:`~ibke_hf.LowRankEdit`; λ; the covariance by module name; provenance of all.

    Raises:
        AdapterError: If a file is missing or damaged, or the folder holds no solved edit.
    """
    hub_arguments = {**hub_arguments, **pinned(name_or_path, INFO, hub_arguments)}
    info, content = read_info(name_or_path, hub_arguments)
    solved = content.get("solved")
    if not solved:
        raise AdapterError(
            f"{name_or_path}: holds no edits that were solved together, but one edit; load it with "
            f"LowRankEdit.from_pretrained"
        )
    where = f"{name_or_path}/{PARTS}"
    fields: list[dict[str, Any]] = [
        {"info": part_info(part, info, f"{name_or_path}/{INFO}"), **{field: {} for field in FACTORS}}
        for part in solved["parts"]
    ]
    covariance = {}
    for key, tensor in read_weights(name_or_path, PARTS, hub_arguments).items():
        place, _, rest = key.partition(".")
        field, _, name = rest.partition(".")
        if place == COVARIANCE:
            covariance[rest] = tensor
        elif place.isdigit() and int(place) < len(fields) and field in FACTORS:
            fields[int(place)][field][name] = tensor.unsqueeze(0)
        else:
            raise AdapterError(f"{where}: {key!r} is of none of the {len(fields)} edits; save or download it again")
    return fields, float(solved["ridge"]), covariance, info
