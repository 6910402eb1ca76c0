"""What keeps a library from being served: files that were changed, edits of another model, and what is missing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ..core.edits import LowRankEdit
from ..core.fingerprints import fingerprint, same_backbone
from ..core.layers import modules_to_edit
from .edit_files import read_edit_file
from .index import Entry, LibraryError

if TYPE_CHECKING:
    from .library import EditLibrary


def faults_of(library: EditLibrary, model: Any = None) -> list[str]:
    """Return what is wrong with a library, one line each; nothing if it can be served.

    Args:
        library: Every file of it is read.
        model: The backbone that it is to be served with; its weights are compared with those that each edit was made
            on.
    """
    faults: list[str] = []
    known: dict[tuple[str, ...], Any] = {}
    for entry in library.list():
        name, file = entry.id[:12], library.file(entry.id)
        try:
            if hashlib.sha256(file.read_bytes()).hexdigest() != entry.id:
                faults.append(f"{name}: its file was changed; pull or add it again")
                continue
            edit = read_edit_file(file)
        except (OSError, LibraryError) as error:
            faults.append(f"{name}: {error}")
            continue
        if model is not None:
            faults += _misfit(edit, entry, model, known)
        if not entry.requests:
            faults.append(f"{name}: does not say which request it was made for, so no prompt finds it")
    if library.router is None:
        faults.append("no router, which finds the edits of a prompt: ibke train-router")
    return faults


def _misfit(edit: LowRankEdit, entry: Entry, model: Any, known: dict[tuple[str, ...], Any]) -> list[str]:
    """Say so where a model lacks the layers of an edit, or has other weights than it was made on."""
    try:
        edit.modules(model)
        if edit.layers not in known:
            known[edit.layers] = fingerprint(modules_to_edit(model, edit.layers))
    except ValueError as error:
        return [f"{entry.id[:12]}: {error}"]
    if edit.info.fingerprint and not same_backbone(edit.info.fingerprint, known[edit.layers]):
        return [f"{entry.id[:12]}: was made on {edit.info.backbone or 'another model'}, whose weights differ"]
    return []
