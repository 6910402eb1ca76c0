"""Training of gradient editors, IBKE and MEND, for any backbone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..core.capture import GradientFactors
from ..core.modeling_ibke import GradientEditor
from ..core.tokens import TokenBatch, context_length, encode_requests
from .activations import ActivationCache
from .arguments import IBKETrainingArguments
from .batches import EditCollator, RecordDataset
from .checkpoints import last_complete_checkpoint
from .editor_trainer import EditorTrainer
from .objective import JudgedBatch, run_batch

__all__ = [
    "EditCollator",
    "GradientEditorTrainer",
    "IBKETrainer",
    "IBKETrainingArguments",
    "RecordDataset",
    "last_complete_checkpoint",
]


class GradientEditorTrainer(EditorTrainer):
    """Trains an editor that adapts gradient factors, IBKE or MEND: ℓ_SG + ℓ_IL + β ℓ_ITM (Eq. 36).

    Before the first step the editor is calibrated on requests of the training set.
    """

    reads_activations = True

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> JudgedBatch:
        """Edit and judge one batch; MEND, which has no latent, has no information term."""
        return run_batch(
            model,
            self.editor,
            self.backbone,
            inputs,
            hops=self.args.train_supporting_hops,
            sg_includes_edit=self.args.sg_includes_edit,
            judge_gates=self.args.gate_weight > 0,
            cache=self.activations,
        )

    @cached_property
    def activations(self) -> ActivationCache | None:
        """What the backbone makes of the texts, kept on disk where the arguments name a folder for it."""
        folder = self.args.activation_cache
        if folder is None:
            return None
        return ActivationCache.open(folder, self.backbone, self.editor, self.args.activation_cache_gb)

    def term_weights(self) -> Mapping[str, float]:
        """Return β, the weight of the information term, and that of the scale factors."""
        return {"loss_itm": self.args.beta, "loss_gate": self.args.gate_weight}

    def term_shares(self, counts: Sequence[int], totals: Sequence[int] | None) -> Mapping[str, float]:
        """Return the share of this micro-batch in the cases that each term is a mean over."""
        if totals is None:
            return {}
        parts = self.current_gradient_accumulation_steps * self.args.world_size
        extra = int(self.args.sg_includes_edit)
        (edits, generality, locality), (all_edits, all_generality, all_locality) = counts, totals
        of_all = {
            "loss_sg": (generality + extra * edits, all_generality + extra * all_edits),
            "loss_il": (locality, all_locality),
            "loss_itm": (edits, all_edits),
            "loss_gate": (edits, all_edits),
        }
        return {name: parts * part / max(whole, 1) for name, (part, whole) in of_all.items()}

    def prepare_editor(self, *, resumed: bool) -> None:
        """Have the config say how many edits are learnt together, and calibrate an editor that is not yet."""
        self.editor.config.trained_edits_per_group = self.args.records_per_group
        if not resumed and not self.editor.is_calibrated:
            self.calibrate(self.editor)

    def calibrate(self, editor: GradientEditor) -> None:
        """Measure statistics and η's start on requests drawn from the training set, the same on every rank."""
        records: Any = self.train_dataset
        if hasattr(records, "__len__"):  # record files are often sorted by domain
            order = random.Random(self.args.seed).sample(range(len(records)), len(records))
            records = map(records.__getitem__, order)
        requests = list(
            islice((request for record in records for request in record.requests), self.args.calibration_requests)
        )
        size, limit = self.args.per_device_train_batch_size, context_length(self.backbone)
        requests.sort(
            key=lambda request: len(request.prompt) + len(request.target)
        )  # like lengths pad each other less
        chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
        batches = [encode_requests(self.tokenizer, chunk, max_length=limit) for chunk in chunks]
        editor.calibrate(self.backbone, batches, None if self.activations is None else self._stored_factors)

    def _stored_factors(self, backbone: Any, requests: TokenBatch) -> list[GradientFactors]:
        assert self.activations is not None
        self.activations.new_batch()
        names = [f"request {i} of the calibration" for i in range(len(requests))]
        return self.activations.factors(self.editor, backbone, requests, names)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer that ``args.optim`` names, with a learning rate of its own for θ = log η."""
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.editor)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"optim={self.args.optim} leaves no room for step_size_learning_rate; use adamw_torch_fused"
                )
            named = [(name, p) for name, p in self.editor.named_parameters() if p.requires_grad]
            theta = {"lr": self.args.step_size_learning_rate, "weight_decay": 0.0}
            groups = [
                {
                    "params": [p for name, p in named if "log_step_sizes" not in name],
                    "weight_decay": self.args.weight_decay,
                },
                {"params": [p for name, p in named if "log_step_sizes" in name], **theta},
            ]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def place_of(self, parameter: str) -> str:
        """Return the layer of the backbone that a parameter of the editor belongs to, as errors say it."""
        layers = self.editor.config.module_names()
        index = next((int(part) for part in parameter.split(".") if part.isdigit()), None)
        return f"layer {', '.join(layers) if index is None else layers[index]}, "

    def editor_logs(self) -> dict[str, float]:
        """Return what is logged of the editor itself: η."""
        return {"step_size": float(self.editor.step_sizes.detach().mean())}


class IBKETrainer(GradientEditorTrainer):
    """Trains an IBKE editor for a backbone: ``IBKETrainer(editor, backbone=…, processing_class=…, args=…)``."""
