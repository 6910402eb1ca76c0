"""Clients of the loopback Hub."""

from __future__ import annotations

import pytest

# Files of an editor that are its code, beside weights and card.
CODE = {
    "modeling_ibke.py",
    "editor_model.py",
    "hypernetworks.py",
    "factor_statistics.py",
    "configuration_ibke.py",
    "records.py",
    "prompts.py",
    "tokens.py",
    "layers.py",
    "attachment.py",
    "capture.py",
    "composition.py",
    "conflicts.py",
    "edits.py",
    "edit_values.py",
    "adapter_files.py",
    "adapter_schema.py",
    "files.py",
    "fingerprints.py",
    "factors.py",
    "forward.py",
    "hub_files.py",
    "library_internals.py",
    "offload.py",
    "part_files.py",
    "ridge.py",
    "shards.py",
    "weights.py",
}


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client's repeated attempts follow at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
