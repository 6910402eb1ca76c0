"""What this package takes from inside its libraries, each with its reason; tests fail when a library changes it."""

from __future__ import annotations

from threading import _DummyThread, current_thread

import torch


def on_autograd_thread() -> bool:
    """Tell whether this is a thread of autograd's own, where a gradient checkpoint may recompute a layer.

    Such a thread has no context of the block that runs the backward pass. Nothing public tells it: torch says by a
    private function alone that a backward pass is running here, and Python knows threads that it did not start by a
    private stand-in class.
    """
    return torch._C._current_graph_task_id() != -1 and isinstance(current_thread(), _DummyThread)
