"""Training of gradient editors for any backbone: collator, arguments and a `transformers.Trainer` subclass.

The model that the Trainer owns is the editor; the backbone is only held beside it, frozen, and never saved.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, set_seed
from transformers.utils import logging

from ..core.capture import NonFiniteError
from ..core.modeling_ibke import GradientEditor
from ..core.tokens import IGNORED, context_length, encode_requests
from .batches import EditCollator, JudgedBatch, RecordDataset, case_scores, run_batch

__all__ = ["EditCollator", "IBKETrainer", "IBKETrainingArguments", "RecordDataset", "last_complete_checkpoint"]

logger = logging.get_logger(__name__)
ROLES = ("reliability", "generality", "locality")  # the order of the cases of a batch
TERMS = ("loss_sg", "loss_il", "loss_itm")
HOPS = ("none", "unknown", "all")
CURE = "lower the learning rate or initial_edit_ratio"


@dataclass
class IBKETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with IBKE's own settings; the defaults are SPEC §6's.

    Args:
        beta: β, weight of the information-transfer term [paper: 0.1].
        step_size_learning_rate: Learning rate of θ = log η [settled].
        edits_per_group: Whole records edited jointly; 0 for the whole per-device batch [settled].
        sg_includes_edit: Count the request itself as one more generality case [settled: off].
        train_supporting_hops: Which supporting hops are edited in too: none, unknown (to the backbone) or all
            [settled].
        calibration_requests: Requests that statistics and η's start are measured on [settled: at least 256].
    """

    output_dir: str | None = field(default="ibke-editor")
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant"
    optim: str = "adamw_torch_fused"  # Adam, as long as weight_decay is 0
    weight_decay: float = 0.0
    max_grad_norm: float = 100.0
    per_device_train_batch_size: int = 8
    max_steps: int = 1_000_000
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
    sg_includes_edit: bool = False
    train_supporting_hops: str = "unknown"
    calibration_requests: int = 512

    def __post_init__(self) -> None:
        """Check our own fields; a bad value names the field and the allowed values."""
        super().__post_init__()
        if self.train_supporting_hops not in HOPS:
            raise ValueError(
                f"train_supporting_hops must be one of {', '.join(HOPS)}, found {self.train_supporting_hops!r}"
            )
        for name, low in (
            ("beta", 0),
            ("edits_per_group", 0),
            ("calibration_requests", 2),
            ("step_size_learning_rate", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value} would publish pickles; use end or every_save"
            )
        if self.n_gpu > 1:
            logger.warning("one process trains on one device; start one per device with torchrun to use them all")
            self._n_gpu = 1  # or the Trainer would wrap the editor in nn.DataParallel, which splits tensors alone


class IBKETrainer(Trainer):
    """Trains a gradient editor (IBKE, MEND) on edit records.

    Args:
        model: The editor.
        backbone: The language model. Its weights are frozen by this (`requires_grad_(False)`) and never changed; put
            it on its device yourself, in the precision that it is to be edited in.
        processing_class: The backbone's tokenizer.
        args: :class:`IBKETrainingArguments`.
        train_dataset: Records (:class:`RecordDataset`, or any dataset that yields :class:`EditRecord`).
        eval_dataset: Held-out records; the loss is Eq. 36 at ε = 0, beside its terms, reliability, generality and
            locality.

    Raises:
        BackboneError: If the editor does not fit the backbone.
        NonFiniteError: In training, if a loss, factor or gradient is not finite; names layer and record.
    """

    args: IBKETrainingArguments
    terms: tuple[str, ...] = TERMS  # of the loss, in the order of a batch; an editor without a latent lacks the last
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: GradientEditor,
        backbone: Any,
        args: IBKETrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        model.modules_of(backbone)  # an editor that does not fit is refused before anything runs
        self.backbone = backbone.requires_grad_(False)
        hops = args.train_supporting_hops != "none"
        kwargs.setdefault(
            "data_collator", EditCollator(processing_class, args.edits_per_group, hops, context_length(backbone))
        )
        kwargs.setdefault("compute_metrics", partial(mean_scores, terms=self.terms))
        super().__init__(
            model, args, **kwargs
        )  # without the tokenizer, whose special tokens it would write to the editor's config
        self.tokenizer = self.callback_handler.processing_class = processing_class
        self.model_accepts_loss_kwargs = False
        self.add_callback(_OwnNoise())
        self._terms, self._logged = torch.zeros(()), 0  # sum and number of the terms since the last log

    @property
    def editor(self) -> GradientEditor:
        """The editor without what DDP, autocast or torch.compile wrap around it."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    # --- before the first step ----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Calibrate an uncalibrated editor, then train; a resumed run has its statistics from the checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last complete one in ``args.output_dir``.
            trial: As in :meth:`transformers.Trainer.train`.
            ignore_keys_for_eval: As in :meth:`transformers.Trainer.train`.

        Raises:
            ValueError: If there is no checkpoint to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"no complete checkpoint in {self.args.output_dir}; start from the beginning, without resuming"
                )
        if not resume_from_checkpoint and not self.editor.is_calibrated:
            self.calibrate(self.editor)
        set_seed(self.args.seed)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

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
        chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
        editor.calibrate(self.backbone, [encode_requests(self.tokenizer, chunk, max_length=limit) for chunk in chunks])

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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the batches of one step, and how many requests, generality and locality cases they hold on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([batch["counts"] for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(
            counts.to(device), "sum"
        ).tolist() if self.args.world_size > 1 else counts.tolist()

    # --- one step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """ℓ_SG + ℓ_IL + β ℓ_ITM of one batch (Eq. 36), each term logged by name.

        Args:
            model: The editor, wrapped or not.
            inputs: What :class:`EditCollator` returns.
            return_outputs: Return what was predicted beside the loss.
            num_items_in_batch: Requests, generality and locality cases in all micro-batches of the step on all ranks;
                a term of this one is weighted by its share, so that a step is a mean over cases however its batch is
                split.
        """
        batch = self.run(model, inputs)
        shares = self._shares(inputs["counts"], num_items_in_batch)
        terms = {
            name: term.to(self.args.device) * share
            for (name, term), share in zip(batch.terms.items(), shares, strict=False)
        }
        values = torch.stack(list(terms.values())).detach().cpu()
        if not torch.isfinite(values).all():
            bad = next(name for name, value in zip(terms, values.tolist(), strict=True) if not math.isfinite(value))
            culprit = batch.culprit(self.editor.config.module_names(), inputs)
            raise NonFiniteError(f"{bad} is not finite at step {self.state.global_step}: {culprit}; {CURE}")
        if model.training:
            self._terms, self._logged = self._terms + values, self._logged + 1
        total = sum(self.args.beta * term if name == "loss_itm" else term for name, term in terms.items())
        return (total, batch) if return_outputs else total

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> JudgedBatch:
        """Edit and judge one batch; the terms of its loss are some of `terms`, by name."""
        hops, sg_includes_edit = self.args.train_supporting_hops, self.args.sg_includes_edit
        return run_batch(model, self.editor, self.backbone, inputs, hops=hops, sg_includes_edit=sg_includes_edit)

    def _shares(self, counts: Sequence[int], totals: Sequence[int] | None) -> list[float]:
        """Return the weight of this micro-batch in each of `terms`, 1 where it is all of the step."""
        if totals is None:
            return [1.0] * len(self.terms)
        parts = self.current_gradient_accumulation_steps * self.args.world_size
        extra = int(self.args.sg_includes_edit)
        pairs = [(generality + extra * edits, locality, edits) for edits, generality, locality in (counts, totals)]
        return [parts * own / max(whole, 1) for own, whole in zip(*pairs, strict=True)]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; a gradient that is not finite stops the run and names parameter, layer and records."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        gradients = {name: p.grad for name, p in self.editor.named_parameters() if p.grad is not None}
        scaled = self.accelerator.scaler is not None  # the fp16 scaler overflows by design and skips such a step
        if not scaled and not torch.isfinite(nn.utils.get_total_norm(list(gradients.values()))):
            name = next(
                (name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "all parameters"
            )
            raise NonFiniteError(
                f"the gradient of {name} is not finite at step {self.state.global_step}: "
                f"{self.place_of(name)}records {', '.join(inputs['records'])}; {CURE}"
            )
        return loss

    def place_of(self, parameter: str) -> str:
        """Return the layer of the backbone that a parameter of the editor belongs to, as errors say it."""
        layers = self.editor.config.module_names()
        index = next((int(part) for part in parameter.split(".") if part.isdigit()), None)
        return f"layer {', '.join(layers) if index is None else layers[index]}, "

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term over ranks and steps since the last log, and η."""
        if "loss" in logs and self._logged:
            means = self.accelerator.reduce((self._terms / self._logged).to(self.args.device), "mean")
            logs |= dict(zip(self.terms, means.tolist(), strict=False)) | self.editor_logs()
            self._terms, self._logged = torch.zeros(()), 0
        super().log(logs, *args, **kwargs)

    def editor_logs(self) -> dict[str, float]:
        """Return what is logged of the editor itself: η."""
        return {"step_size": float(self.editor.step_sizes.detach().mean())}

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss at ε = 0; per record, the sums of its cases' scores by role and of the terms, and what :func:`mean_scores` divides by.

        One row per record, so that the Trainer can drop the records that it repeats to fill the last batch.
        """
        loss, batch = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        device, counts, expected = loss.device, inputs["counts"], batch.labels.clone()
        local = expected[sum(counts[:2]) :]
        local[local != IGNORED] = batch.original.argmax(-1)
        scores = case_scores(batch.logits, expected, inputs["top_k"]).to(device)
        roles = torch.arange(len(ROLES), device=device).repeat_interleave(torch.tensor(counts, device=device))
        where, zeros = (
            (inputs["owners"].to(device), roles),
            torch.zeros(len(inputs["records"]), len(ROLES), device=device),
        )
        sums, number = (
            zeros.index_put(where, values, accumulate=True) for values in (scores, torch.ones_like(scores))
        )
        terms = torch.stack([term.to(device) for term in batch.terms.values()]).expand(len(zeros), -1)
        return loss.detach(), torch.cat((sums, terms), 1), torch.cat((number, torch.ones_like(terms)), 1)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave the inputs as they are: each part goes to the device of the model that reads it."""
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Report none: the editor's own operations say little of the cost."""
        return 0

    # --- files and the Hub --------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the editor alone: neither the tokenizer nor the arguments, which the Trainer would pickle."""
        if self.args.should_save:
            self.editor.save_pretrained(output_dir or str(self.args.output_dir), state_dict=state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state of the Trainer comes last, and only when all else is there

    def push_to_hub(
        self,
        commit_message: str | None = "Add the editor",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        results: Any = None,
        **card: Any,
    ) -> Any:
        """Publish the editor's weights, config, card and code: no pickle, no checkpoint, nothing of the backbone.

        Args:
            commit_message: Title of the commit.
            blocking: Ignored, the call returns when the upload is done.
            token: Token with write access; by default ``args.hub_token``.
            revision: Branch to commit to; by default ``args.hub_revision``.
            private: Make a new repository private.
            create_pr: Open a pull request instead.
            results: What `ibke eval` made of this editor: a folder or file.
            card: Metadata of the card, such as ``license`` or ``datasets``.

        Returns:
            The commit's information; None on other ranks than the first.

        Raises:
            UploadError: If the upload is cut; another call finishes it.
        """
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        scores = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        return self.editor.push_to_hub(
            str(self.hub_model_id),
            results=results,
            scores=scores,
            metadata=card,
            private=private,
            create_pr=create_pr,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "Add the editor",
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish what :meth:`push_to_hub` does at each checkpoint, where ``hub_strategy`` asks for it."""
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")


class _OwnNoise(TrainerCallback):
    """Gives every rank its own ε; rank 0 goes on with the seed, and a resumed run loads its ranks' states after this."""

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)


def mean_scores(prediction: EvalPrediction, terms: Sequence[str] = TERMS) -> dict[str, float]:
    """Mean score of each role over its cases, in percent, and mean of each loss term."""
    sums, numbers = (
        torch.as_tensor(array).double().sum(0).tolist() for array in (prediction.predictions, prediction.label_ids)
    )
    scales = dict.fromkeys(ROLES, 100.0) | dict.fromkeys(terms, 1.0)
    return {
        name: scale * total / number
        for (name, scale), total, number in zip(scales.items(), sums, numbers, strict=False)
        if number
    }


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint whose trainer state, which is written last, can be read: a killed run may leave half of one."""
    found = [
        path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None
