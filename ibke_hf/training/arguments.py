"""What training is told: `transformers.TrainingArguments` and the settings of the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..core.configuration_ibke import require_choice

logger = logging.get_logger(__name__)
MAX_STEPS = 1_000_000  # [paper]
HOPS = ("none", "unknown", "all")
LOWEST = {
    "beta": 0,
    "edits_per_group": 0,
    "gate_weight": 0,
    "calibration_requests": 2,
    "step_size_learning_rate": 0,
    "learning_rate": 0,
    "seed": 0,
}
HIGHEST_SEED = 2**32 - 1  # that every generator of random numbers takes


@dataclass
class IBKETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with IBKE's own settings; the defaults are SPEC §6's.

    Args:
        max_steps: Steps of training; by default `num_train_epochs` where that is given, else `MAX_STEPS` [paper].
        num_train_epochs: Passes over the training records; `max_steps` wins where both are given.
        beta: β, weight of the information-transfer term [paper: 0.1].
        step_size_learning_rate: Learning rate of θ = log η [settled].
        edits_per_group: Whole records edited jointly; 0 for the whole per-device batch [settled].
        mixed_groups: Draw how many records are edited jointly anew for each batch, from the powers of two up to
            `edits_per_group` [ours, off].
        gate_weight: Weight of a term that is the mean scale factor, which has an editor close the gates that it does
            not need [ours, off].
        sg_includes_edit: Count the request itself as one more generality case [settled: off].
        train_supporting_hops: Which supporting hops are edited in too: none, unknown (to the backbone) or all
            [settled].
        calibration_requests: Requests that statistics and η's start are measured on [settled: at least 256].
        activation_cache: Folder that keeps what the backbone computes of each text, in 16 bit, so that later steps run
            its upper blocks only; None for none. Runs of the same backbone and layers share it.
        activation_cache_gb: Room for it, in gigabytes; texts that do not fit are computed at every step.
    """

    output_dir: str | None = field(default="ibke-editor")
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant"
    optim: str = "adamw_torch_fused"  # Adam, as long as weight_decay is 0
    weight_decay: float = 0.0
    max_grad_norm: float = 100.0
    per_device_train_batch_size: int = 8
    num_train_epochs: float | None = None  # type: ignore[assignment]
    save_steps: float = 3000
    eval_steps: float | None = 3000
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["records"])
    ddp_find_unused_parameters: bool | None = False  # every parameter takes part in every step
    ddp_broadcast_buffers: bool | None = False  # the statistics are frozen
    restore_callback_states_from_checkpoint: bool = True  # or a resumed run would forget the patience that it has used
    beta: float = 0.1
    step_size_learning_rate: float = 1e-3
    edits_per_group: int = 0
    mixed_groups: bool = False
    gate_weight: float = 0.0
    sg_includes_edit: bool = False
    train_supporting_hops: str = "unknown"
    calibration_requests: int = 512
    activation_cache: str | None = None
    activation_cache_gb: float = 20.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and the allowed values."""
        self._require_finite()
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be at least 1, found {self.max_steps}")
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # transformers' own default, which max_steps overrides
            self.max_steps = self.max_steps if self.max_steps > 0 else MAX_STEPS
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nowhere to copy to, and torch warns of it at every run
        require_choice("train_supporting_hops", self.train_supporting_hops, HOPS)
        for name, low in LOWEST.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if self.activation_cache_gb <= 0:
            raise ValueError(f"activation_cache_gb must be above 0, found {self.activation_cache_gb}")
        if self.seed > HIGHEST_SEED:
            raise ValueError(f"seed must be at most {HIGHEST_SEED}, found {self.seed}")
        if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value} would publish pickles; use end or every_save"
            )
        if self.n_gpu > 1:
            logger.warning("one process trains on one device; start one per device with torchrun to use them all")
            self._n_gpu = 1  # or the Trainer would wrap the editor in nn.DataParallel, which splits tensors alone

    def _require_finite(self) -> None:
        for each in fields(self):
            value: Any = getattr(self, each.name, None)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{each.name} must be a finite number, found {value}")

    @property
    def records_per_group(self) -> int:
        """Records that are edited jointly."""
        return self.edits_per_group or self.per_device_train_batch_size
