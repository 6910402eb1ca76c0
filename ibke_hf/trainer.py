"""Training of gradient editors for any backbone: collator, arguments and a `transformers.Trainer` subclass.

The model that the Trainer owns is the editor; the backbone is only held beside it, frozen, and never saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from .capture import NonFiniteError, evaluating, target_logits
from .losses import independence_for_locality, information_transfer, sufficiency_for_generality
from .modeling_ibke import GradientEditor
from .records import EditRecord, EditRequest, collides
from .tokens import IGNORED, TokenBatch, context_length, encode_requests

RELIABILITY, GENERALITY, LOCALITY = 0, 1, 2
ROLES = {"reliability": RELIABILITY, "generality": GENERALITY, "locality": LOCALITY}
HOPS = ("none", "unknown", "all")


@dataclass
class IBKETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with IBKE's own settings; the defaults are SPEC §6's.

    Args:
        beta: β, weight of the information-transfer term [paper: 0.1].
        step_size_learning_rate: Learning rate of θ = log η [settled].
        edits_per_group: Whole records edited jointly; 0 for the whole per-device batch [settled].
        sg_includes_edit: Count the request itself as one more generality case [settled: off].
        train_supporting_hops: Which supporting hops are edited in too: none, unknown (to the backbone) or all [settled].
        calibration_requests: Requests that statistics and η's start are measured on [settled: at least 256].
    """

    output_dir: str | None = field(default="ibke-editor")
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant"
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 100.0
    per_device_train_batch_size: int = 8
    max_steps: int = 1_000_000
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["records"])
    beta: float = 0.1
    step_size_learning_rate: float = 1e-3
    edits_per_group: int = 0
    sg_includes_edit: bool = False
    train_supporting_hops: str = "unknown"
    calibration_requests: int = 512

    def __post_init__(self) -> None:
        """Check our own fields; a bad value names the field and the allowed values."""
        super().__post_init__()
        if self.train_supporting_hops not in HOPS:
            raise ValueError(f"train_supporting_hops must be one of {', '.join(HOPS)}, found {self.train_supporting_hops!r}")
        for name, low in (("beta", 0), ("edits_per_group", 0), ("calibration_requests", 2), ("step_size_learning_rate", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")


class RecordDataset(Dataset):
    """A list of records as a dataset for the Trainer."""

    def __init__(self, records: Sequence[EditRecord]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        return self.records[index]


@dataclass
class EditCollator:
    """Records -> token batches: requests, generality and locality cases, each row with the index of its group.

    A locality case that collides with an edit of its own group is left out (SPEC §4).
    """

    tokenizer: PreTrainedTokenizerBase
    edits_per_group: int = 0
    sg_includes_edit: bool = False
    supporting_hops: bool = False
    max_length: int | None = None

    def __call__(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Return tokens and groups by role, and the records themselves for error messages."""
        per_group = self.edits_per_group or len(records)
        groups = [i // per_group for i in range(len(records))]
        edits: dict[int, list[Any]] = {}
        for group, record in zip(groups, records, strict=True):
            edits.setdefault(group, []).extend(record.edits)
        rows: dict[str, list[tuple[int, Any]]] = {"requests": [], "generality": [], "locality": [], "hops": []}
        for group, record in zip(groups, records, strict=True):
            rows["requests"] += [(group, request) for request in record.requests]
            rows["generality"] += [(group, case) for case in record.generality]
            rows["generality"] += [(group, request) for request in record.requests if self.sg_includes_edit]
            rows["locality"] += [(group, case) for case in record.locality if not collides(case, edits[group])]
            if self.supporting_hops:
                rows["hops"] += [(group, hop) for case in record.generality for hop in case.supporting]
        names = [f"{record.id} request {i}" for record in records for i in range(len(record.requests))]
        return {"records": names, **{role: self._tokenised(role, cases) for role, cases in rows.items()}}

    def _tokenised(self, role: str, rows: Sequence[tuple[int, Any]]) -> tuple[TokenBatch, Tensor] | None:
        if not rows:
            return None
        batch = encode_requests(self.tokenizer, [case for _, case in rows], name=role, max_length=self.max_length)
        return batch, torch.tensor([group for group, _ in rows])


class IBKETrainer(Trainer):
    """Trains a gradient editor (IBKE, MEND) on edit records.

    Args:
        model: The editor.
        backbone: The frozen language model; put it on its device yourself, in the precision it is to be edited in.
        processing_class: The backbone's tokenizer.
        args: :class:`IBKETrainingArguments`.
        train_dataset: Records (:class:`RecordDataset`, or any dataset that yields :class:`EditRecord`).
        eval_dataset: Held-out records; the loss is Eq. 36 at ε = 0, beside reliability, generality and locality.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self, model: GradientEditor, backbone: Any, args: IBKETrainingArguments, processing_class: PreTrainedTokenizerBase, **kwargs: Any
    ) -> None:
        self.backbone = backbone
        collator = EditCollator(
            processing_class, args.edits_per_group, args.sg_includes_edit, args.train_supporting_hops != "none", context_length(backbone)
        )
        kwargs.setdefault("data_collator", collator)
        kwargs.setdefault("compute_metrics", _mean_scores)
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[float]] = {}
        model.modules_of(backbone)  # an editor that does not fit is refused before anything runs

    # --- before the first step ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Calibrate an uncalibrated editor, then train; a resumed run has its statistics from the checkpoint."""
        editor = self.accelerator.unwrap_model(self.model)
        if not editor.is_calibrated and not resume_from_checkpoint:
            self.calibrate(editor)
        set_seed(self.args.seed)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def calibrate(self, editor: GradientEditor) -> None:
        """Measure statistics and η's start on the first requests of the training set, the same on every rank."""
        requests: list[EditRequest] = []
        for record in self.train_dataset:  # type: ignore[union-attr]
            requests += record.requests
            if len(requests) >= self.args.calibration_requests:
                break
        size = self.args.per_device_train_batch_size
        limit = context_length(self.backbone)
        chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
        editor.calibrate(self.backbone, [encode_requests(self.processing_class, chunk, max_length=limit) for chunk in chunks])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Adam, with a learning rate of its own for θ = log η."""
        if self.optimizer is None:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in named if "log_step_sizes" not in name], "lr": self.args.learning_rate},
                {"params": [p for name, p in named if "log_step_sizes" in name], "lr": self.args.step_size_learning_rate},
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.Adam(groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    # --- one step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """ℓ_SG + ℓ_IL + β ℓ_ITM of one batch (Eq. 36), each term logged by name."""
        requests, groups = self._requests(inputs)
        editor = self.accelerator.unwrap_model(model)
        factors = editor.capture(self.backbone, requests, names=_names(inputs, len(requests)))
        adapted = model(factors, sample=model.training)
        edit = editor.as_edit(adapted, groups)
        terms, logits = self._edited_terms(edit, inputs)
        latents = [(a.mean, a.log_variance) for a in adapted if a.log_variance is not None]
        if latents:
            terms["loss_itm"] = information_transfer(latents)
        total = sum(terms.values()) + (self.args.beta - 1) * terms.get("loss_itm", 0.0)
        self._require_finite(terms, inputs)
        if model.training:
            for name, value in terms.items():
                self._terms.setdefault(name, []).append(float(value.detach()))
        return (total, logits) if return_outputs else total

    def _edited_terms(self, edit: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run every generality and locality case in one edited forward, the locality cases once more unedited."""
        roles = [role for role in ("generality", "locality") if inputs[role] is not None]
        zero = next(iter(edit.outputs.values())).sum() * 0
        terms = {"loss_sg": zero, "loss_il": zero}
        if not roles:
            return terms, {}
        cases = TokenBatch.cat([inputs[role][0] for role in roles])
        rows = torch.cat([inputs[role][1] for role in roles])
        original = self._original_logits(inputs["locality"][0]) if "locality" in roles else None
        with evaluating(self.backbone):
            logits = bucketed_logits(self.backbone, edit, cases, rows)
        labels = cases.labels[:, -cases.kept :].to(logits.device)
        split = len(inputs["generality"][0]) if "generality" in roles else 0
        if split:
            terms["loss_sg"] = sufficiency_for_generality(logits[:split], labels[:split]).to(zero.device)
        if original is not None:
            width = original.shape[1]
            terms["loss_il"] = independence_for_locality(logits[split:, -width:], original, labels[split:, -width:]).to(zero.device)
        return terms, {"logits": logits, "labels": labels}

    @torch.no_grad()
    def _original_logits(self, cases: TokenBatch) -> Tensor:
        with evaluating(self.backbone):
            return target_logits(self.backbone, cases)[0]

    def _requests(self, inputs: Mapping[str, Any]) -> tuple[TokenBatch, Tensor]:
        """Return the requests of the batch, with the supporting hops that are edited in too."""
        requests, groups = inputs["requests"]
        if inputs["hops"] is None:
            return requests, groups
        hops, hop_groups = inputs["hops"]
        if self.args.train_supporting_hops == "unknown":
            logits, labels = self._original_logits(hops), hops.labels[:, -hops.kept :]
            unknown = (_ranks(logits, labels.to(logits.device)) >= 5).any(-1).cpu()
            hops, hop_groups = hops[unknown], hop_groups[unknown]
        return (TokenBatch.cat([requests, hops]), torch.cat([groups, hop_groups])) if len(hops) else (requests, groups)

    def _require_finite(self, terms: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        for name, value in terms.items():
            if not torch.isfinite(value):
                raise NonFiniteError(
                    f"{name} is {float(value.detach())} at step {self.state.global_step}, records {', '.join(inputs['records'][:8])}; "
                    "lower the learning rate or initial_edit_ratio"
                )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; a gradient that is not finite stops the run and names the parameter."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
            finite = torch.isfinite(torch.stack([gradient.norm() for _, gradient in named])).tolist()
            if not all(finite):
                name = named[finite.index(False)][0]
                raise NonFiniteError(f"the gradient of {name} is not finite at step {self.state.global_step}; lower the learning rate")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term and η since the last log."""
        if "loss" in logs and self._terms:
            logs |= {name: float(np.mean(values)) for name, values in self._terms.items()}
            logs["step_size"] = float(self.accelerator.unwrap_model(self.model).step_sizes.detach().mean())
            self._terms = {}
        super().log(logs, *args, **kwargs)

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss at ε = 0, and per case its score and role for :func:`_mean_scores`."""
        inputs = dict(inputs)
        requests, groups = inputs["requests"]
        editor = self.accelerator.unwrap_model(model)
        loss, judged = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only or not judged:
            return loss.detach(), None, None
        edit = editor.as_edit(model(editor.capture(self.backbone, self._requests(inputs)[0])), self._requests(inputs)[1])
        with evaluating(self.backbone), edit.attached(self.backbone, rows=groups):
            own_logits, own_labels = target_logits(self.backbone, requests)
        scores = [_case_scores(own_logits, own_labels, 1)]
        roles = [torch.full((len(requests),), RELIABILITY)]
        split = len(inputs["generality"][0]) if inputs["generality"] is not None else 0
        logits, labels = judged["logits"], judged["labels"]
        if split:
            scores.append(_case_scores(logits[:split], labels[:split], 5))
            roles.append(torch.full((split,), GENERALITY))
        if inputs["locality"] is not None:
            original = self._original_logits(inputs["locality"][0])
            kept = labels[split:, -original.shape[1] :]
            expected = torch.where(kept == IGNORED, IGNORED, original.argmax(-1))
            scores.append(_case_scores(logits[split:, -original.shape[1] :], expected, 5))
            roles.append(torch.full((len(expected),), LOCALITY))
        device = self.args.device
        return loss.detach(), torch.cat([s.to(device) for s in scores]), torch.cat([r.to(device) for r in roles])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave the inputs as they are: each part goes to the device of the model that reads it."""
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Report none: the editor's own operations say little of the cost."""
        return 0


def bucketed_logits(backbone: Any, edit: Any, cases: TokenBatch, rows: Tensor, buckets: int = 2) -> Tensor:
    """Logits (cases, k, vocabulary) of left-padded cases under their edits, the short and the long ones in a forward each.

    One long question would otherwise pad every short one: on Atlas this halves the tokens of a step.
    """
    order = cases.attention_mask.sum(-1).argsort(stable=True)
    parts = []
    for chunk in order.chunk(buckets):
        with edit.attached(backbone, rows=rows[chunk]):
            logits, _ = target_logits(backbone, cases[chunk].trimmed())
        parts.append(nn.functional.pad(logits, (0, 0, cases.kept - logits.shape[1], 0)))
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def _names(inputs: Mapping[str, Any], number: int) -> list[str]:
    names = list(inputs["records"])
    return names + [f"supporting hop {i}" for i in range(number - len(names))]


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank of each label, 0 for the best, ties to the lowest id; 0 where nothing is judged."""
    values = logits.float()
    target = values.gather(-1, labels.clamp(min=0).unsqueeze(-1))
    ids = torch.arange(values.shape[-1], device=values.device)
    before = (values > target) | ((values == target) & (ids < labels.unsqueeze(-1)))
    return before.sum(-1).masked_fill(labels == IGNORED, 0)


def _case_scores(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    judged = labels != IGNORED
    hits = (_ranks(logits, labels) < top_k) & judged
    return hits.sum(-1) / judged.sum(-1).clamp(min=1)


def _mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Mean score of each role, in percent."""
    scores, roles = np.asarray(prediction.predictions).ravel(), np.asarray(prediction.label_ids).ravel()
    return {name: 100 * float(scores[roles == role].mean()) for name, role in ROLES.items() if (roles == role).any()}
