"""Clients of the loopback Hub."""

from __future__ import annotations

import pytest


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client's repeated attempts follow at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
