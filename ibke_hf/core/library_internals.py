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


def is_redirected_by_peft(model_type: str, layer: str) -> bool:
    """Tell whether PEFT takes a target of this name for another, so that an adapter has no effect on the layer.

    PEFT converts adapters of mixtures from before their experts were fused, by the last part of a name alone and for
    the architectures in a private table of transformers: a shared expert or a dense FFN bears the same last part.
    It also renames an adapter's weights as transformers renames those of old checkpoints, by patterns that may fit a
    new name as well: ``mlp.shared_expert.``, whose dots fit any letter, makes ``shared_experts..`` of
    ``shared_experts.``.
    """
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a version before or after the fused experts
        return False
    renamings = [r for r in get_checkpoint_conversion_mapping(model_type) or () if isinstance(r, WeightRenaming)]
    if rename_source_key(f"{layer}.lora_A.weight", renamings, [])[0] != f"{layer}.lora_A.weight":
        return True
    experts = {"qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"), "mixtral": ("gate", "w1", "w2", "w3")}
    pattern = "mixtral" if model_type == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return layer.rpartition(".")[2] in experts.get(str(pattern), ())
