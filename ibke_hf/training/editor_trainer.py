"""A `transformers.Trainer` for every kind of editor with weights: logs, errors, evaluation, checkpoints, the Hub.

The model that the Trainer owns is the editor; the backbone is only held beside it, frozen, and never saved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy, TrainOutput, set_seed
from transformers.utils import logging

from ..core.capture import NonFiniteError
from ..core.tokens import IGNORED, context_length
from .arguments import IBKETrainingArguments
from .batches import EditCollator, UsableRecords, without_unusable
from .checkpoints import last_complete_checkpoint
from .objective import JudgedBatch, hit_rates

logger = logging.get_logger(__name__)
ROLES = ("reliability", "generality", "locality")  # the order of the cases of a batch
CURE = "lower the learning rate or initial_edit_ratio"


class EditorTrainer(Trainer, ABC):
    """Trains an editor with weights on edit records; a subclass says what a batch's loss is.

    Args:
        model: The editor.
        backbone: The language model. Its weights are frozen by this (`requires_grad_(False)`) and never changed; put
            it on its device yourself, in the precision that it is to be edited in.
        processing_class: The backbone's tokenizer.
        args: :class:`IBKETrainingArguments`; by default their defaults.
        train_dataset: Records (:class:`RecordDataset`, or any dataset that yields :class:`EditRecord`). Records that
            the backbone cannot be asked, such as over-long ones, are left out and counted in `unusable`.
        eval_dataset: Held-out records; the loss is the training loss without noise, beside its terms, reliability,
            generality and locality.

    Attributes:
        stopped: Whether the last training ended because :meth:`request_stop` was called.

    Raises:
        BackboneError: If the editor does not fit the backbone.
        NonFiniteError: In training, if a loss, factor or gradient is not finite; names layer and record.
    """

    args: IBKETrainingArguments
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        *,
        backbone: Any,
        processing_class: PreTrainedTokenizerBase,
        args: IBKETrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        model.modules_of(backbone)  # an editor that does not fit is refused before anything runs
        args = IBKETrainingArguments() if args is None else args
        if args.activation_cache is not None and not self.reads_activations:
            raise ValueError("activation_cache holds what ibke and mend read; leave it out for another editor")
        self.backbone = backbone.requires_grad_(False)
        hops = self.reads_hops and args.train_supporting_hops != "none"
        collator = EditCollator(
            processing_class, args.edits_per_group, hops, context_length(backbone), mixed_groups=args.mixed_groups
        )
        kwargs = {"data_collator": collator, "compute_metrics": mean_scores, **kwargs}
        if isinstance(kwargs["data_collator"], EditCollator):
            _leave_out_unusable(kwargs)
        super().__init__(model, args, **kwargs)  # without the tokenizer, or its tokens would enter the editor's config
        self.tokenizer = self.callback_handler.processing_class = processing_class
        self.model_accepts_loss_kwargs = False
        self.add_callback(_NoisePerRank())
        self.add_callback(_StopWhenAsked(self))
        self.stopped = self._stop_requested = self._stop_agreed = False
        self._sums: dict[str, Tensor] = {}  # of the terms since the last log
        self._logged = 0

    reads_hops = True  # whether supporting hops are tokenised at all
    reads_activations = False  # whether what a cache of activations holds is of use

    @property
    def editor(self) -> Any:
        """The editor without what DDP, autocast or torch.compile wrap around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def unusable(self) -> dict[int, str]:
        """What is wrong with the training records that were left out so far, by their index."""
        return self.train_dataset.unusable if isinstance(self.train_dataset, UsableRecords) else {}

    # --- what a subclass says -----------------------------------------------------------------------------------

    @abstractmethod
    def run(self, model: nn.Module, inputs: dict[str, Any]) -> JudgedBatch:
        """Edit and judge one batch; the terms of its loss by name."""

    def term_weights(self) -> Mapping[str, float]:
        """Return the weights of the terms that do not count once."""
        return {}

    def term_shares(self, counts: Sequence[int], totals: Sequence[int] | None) -> Mapping[str, float]:
        """Return what a micro-batch contributes to each term of its step; terms that are not named count once.

        Args:
            counts: Its requests, generality and locality cases.
            totals: Those of all micro-batches of the step on all ranks; None where it is all of the step.
        """
        return {}

    def prepare_editor(self, *, resumed: bool) -> None:
        """Make the editor ready for training; the weights of a resumed run come from its checkpoint after this."""

    def place_of(self, parameter: str) -> str:
        """Return the layer of the backbone that a parameter of the editor belongs to, as errors say it."""
        return ""

    def editor_logs(self) -> dict[str, float]:
        """Return what is logged of the editor itself."""
        return {}

    # --- a run --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Prepare the editor, then train; a resumed run has its statistics from the checkpoint.

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
        self.stopped = self._stop_agreed = False
        self.prepare_editor(resumed=bool(resume_from_checkpoint))
        set_seed(self.args.seed)
        try:
            return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        except _EvaluationCut:  # between two steps, so that a checkpoint is as good as any other
            self.stopped = True
            self._save_checkpoint(self.model_wrapped, trial)
            return TrainOutput(self.state.global_step, float("nan"), {})
        finally:
            self._stop_requested = False

    def request_stop(self) -> None:
        """Have training save a checkpoint after the step at hand and end; for signal handlers and other threads."""
        self._stop_requested = True

    def agree_to_stop(self) -> bool:
        """Tell whether the run ends after this step: at once in one process, as agreed at its beginning in several."""
        if self._stop_agreed or (self._stop_requested and self.args.world_size == 1):
            self.stopped = True
        return self.stopped

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the batches of one step, and how many requests, generality and locality cases all ranks hold.

        Ranks that were told to stop say so along with it.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([batch["counts"] for batch in batches]).sum(0)
        if self.args.world_size == 1:
            return batches, counts.tolist()
        counts = torch.cat((counts, torch.tensor([int(self._stop_requested)]))).to(device)
        *totals, stopping = self.accelerator.reduce(counts, "sum").tolist()
        self._stop_agreed = stopping > 0
        return batches, totals

    # --- one step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted sum of the terms of one batch, each logged by name.

        Args:
            model: The editor, wrapped or not.
            inputs: What :class:`EditCollator` returns.
            return_outputs: Return what was predicted beside the loss.
            num_items_in_batch: Requests, generality and locality cases in all micro-batches of the step on all ranks;
                a term of this one is weighted by its share, so that a step is a mean over cases however its batch is
                split.
        """
        batch = self.run(model, inputs)
        shares, weights = self.term_shares(inputs["counts"], num_items_in_batch), self.term_weights()
        terms = {name: term.to(self.args.device) * shares.get(name, 1.0) for name, term in batch.terms.items()}
        values = dict(zip(terms, torch.stack(list(terms.values())).detach().cpu(), strict=True))
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            culprit = batch.culprit(self.editor.config.module_names(), inputs)
            raise NonFiniteError(f"{bad} is not finite at step {self.state.global_step}: {culprit}; {CURE}")
        if model.training:
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
            self._logged += 1
        total = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        return (total, batch) if return_outputs else total

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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term over ranks and steps since the last log, and what the editor logs."""
        if "loss" in logs and self._logged:
            means = {name: (total / self._logged).to(self.args.device) for name, total in self._sums.items()}
            means = self.accelerator.reduce(means, "mean")
            logs |= {name: float(mean) for name, mean in means.items()} | self.editor_logs()
            self._sums, self._logged = {}, 0
        super().log(logs, *args, **kwargs)

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Loss at ε = 0, and per record what :func:`mean_scores` reads.

        Returns:
            The loss; by role the sums of the scores of each record's cases, and by name the terms; by the same names
            what to divide by. One row per record, so that the Trainer can drop the records that it repeats to fill
            the last batch.
        """
        if self._stop_requested and self.args.world_size == 1 and self.is_in_train:
            raise _EvaluationCut
        loss, batch = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        device, counts, expected = loss.device, inputs["counts"], batch.labels.clone()
        local = expected[sum(counts[:2]) :]
        local[local != IGNORED] = batch.original.argmax(-1)
        scores = hit_rates(batch.logits, expected, inputs["top_k"]).to(device)
        owners = inputs["owners"].to(device)
        zeros, ones = torch.zeros(len(inputs["records"]), device=device), torch.ones_like(scores)
        sums, numbers, start = {}, {}, 0
        for role, count in zip(ROLES, counts, strict=True):
            rows = slice(start, start + count)
            sums[role] = zeros.index_add(0, owners[rows], scores[rows])
            numbers[role] = zeros.index_add(0, owners[rows], ones[rows])
            start += count
        for name, term in batch.terms.items():
            sums[name], numbers[name] = term.to(device).expand(len(zeros)).clone(), torch.ones_like(zeros)
        return loss.detach(), sums, numbers

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


class _NoisePerRank(TrainerCallback):
    """Gives every rank its own ε; rank 0 goes on with the seed, and a resumed run loads its states after this."""

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)


class _StopWhenAsked(TrainerCallback):
    """Ends training at the end of a step, with a checkpoint, once the trainer was asked to."""

    def __init__(self, trainer: EditorTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.agree_to_stop():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class _EvaluationCut(Exception):  # noqa: N818  control flow
    """An evaluation in the middle of training that is not finished, since the run is to stop."""


def _leave_out_unusable(options: dict[str, Any]) -> None:
    """Wrap the datasets among a trainer's options; those without a length are read as they come."""
    collator, held_out = options["data_collator"], options.get("eval_dataset")
    if hasattr(options.get("train_dataset"), "__len__"):
        options["train_dataset"] = UsableRecords(options["train_dataset"], collator)
    if isinstance(held_out, dict):
        options["eval_dataset"] = {name: without_unusable(records, collator) for name, records in held_out.items()}
    elif hasattr(held_out, "__len__"):
        options["eval_dataset"] = without_unusable(held_out, collator)


def mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Mean score of each role over its cases, in percent, and mean of each loss term."""
    sums: Any = prediction.predictions
    numbers: Any = prediction.label_ids
    totals = {name: (float(sums[name].sum(dtype="float64")), float(numbers[name].sum())) for name in sums}
    return {
        name: (100.0 if name in ROLES else 1.0) * total / number for name, (total, number) in totals.items() if number
    }
