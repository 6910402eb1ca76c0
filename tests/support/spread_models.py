"""Models whose parts lie in several places, as a `device_map` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch

ENDS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
HALF_ON_DISK = {**dict.fromkeys(ENDS, "cpu"), **{f"model.layers.{i}": "cpu" if i > 1 else "disk" for i in range(4)}}


def offloaded(model: Any, where: str, folder: Path) -> Any:
    """Put two blocks, the embeddings and the head on the disk, or everything in memory to be brought in."""
    if where == "disk":
        places = {"model.embed_tokens": where, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": where}
        places |= {f"model.layers.{i}": "cpu" if i % 2 else where for i in range(4)}
        return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_two_devices(model: Any, first: torch.device, second: torch.device) -> Any:
    """Put the lower half of a decoder of four blocks on one device, and the upper half on another."""
    places = dict(zip(ENDS, (first, first, second, second), strict=True))
    places |= {f"model.layers.{i}": first if i < 2 else second for i in range(4)}
    return accelerate.dispatch_model(model, places, force_hooks=True, main_device=first)
