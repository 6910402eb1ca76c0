"""Training of SERAC: the records, batches, files and logs of the other editors, with two terms of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.capture import mean_per_row
from ..core.tokens import IGNORED, TokenBatch
from ..editors.serac import Entry, ScopesAndAnswers, SERACEdit, memory_of
from .editor_trainer import EditorTrainer
from .objective import JudgedBatch, bucketed_logits

# generality cases of a record that a training step reads: two models read each, so that more take most of its time
READ = 2


class SERACTrainer(EditorTrainer):
    """Trains a SERAC editor on edit records.

    The loss is the binary cross-entropy of the scope classifier plus the cross-entropy of the counterfactual model on
    what is in scope (Mitchell et al. 2022). A micro-batch counts as one, whatever its number of cases. The backbone
    takes part in evaluation alone, where the memory holds the requests of the batch.
    """

    reads_hops = False

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> JudgedBatch:
        """Return the terms of a batch; in evaluation, what the edited model predicts too."""
        return run_serac_batch(model, self.editor, self.backbone, inputs)


@dataclass(frozen=True)
class SERACBatch(JudgedBatch):
    """One batch of SERAC; `logits` and `original` are empty in training."""

    def culprit(self, layers: Sequence[str], inputs: Mapping[str, Any]) -> str:
        """Name the records: the terms are means over all of them."""
        return f"records {', '.join(inputs['records'])}"


def run_serac_batch(model: nn.Module, editor: Any, backbone: Any, inputs: Mapping[str, Any]) -> SERACBatch:
    """Score every case against every request of a batch, and answer those in scope by the requests of their records.

    Requests and generality cases are in the scope of their records' requests. Locality cases are out of it, and so is
    everything of another record. Positives, the record's own locality cases and foreign cases count a third each,
    however many they are. In training the first `READ` generality cases of each record are read, in evaluation all.

    Args:
        model: The editor, wrapped or not.
        editor: The editor itself.
        backbone: The language model; it runs in evaluation only.
        inputs: What :class:`~ibke_hf.training.batches.EditCollator` returns.
    """
    cases, owners, (requests, generality, _) = inputs["cases"], inputs["owners"], inputs["counts"]
    if model.training:
        of_record = [
            (owners[requests : requests + generality] == owner).nonzero()[:READ, 0]
            for owner in owners[:requests].unique()
        ]
        kept = requests + torch.cat(of_record)
        read = torch.cat((torch.arange(requests), kept, torch.arange(requests + generality, len(owners))))
        cases, owners, generality = cases[read].trimmed(), owners[read], len(kept)
    entries, split = entries_of(cases[:requests]), requests + generality
    pairs = [(k, k) for k in range(requests)]
    pairs += [(case, k) for case in range(requests, split) for k in range(requests) if owners[case] == owners[k]]
    outputs: ScopesAndAnswers = model([ids for ids, _ in entries], cases, pairs)
    rows = (cases.labels != IGNORED).nonzero()[:, 0]
    terms = {
        "loss_scope": scope_loss(outputs.scopes, owners[rows], owners[:requests], rows < split),
        "loss_counterfactual": answer_loss(outputs.answers, cases.labels[[case for case, _ in pairs]]),
    }
    nothing = torch.zeros(0)
    if model.training:
        return SERACBatch((), (), 0, nothing, nothing, cases.labels, terms)
    groups = inputs["groups"]
    memories = [[entries[k] for k in range(requests) if groups[k] == group] for group in range(int(groups.max()) + 1)]
    edit: Any = SERACEdit(memory_of(memories), editor=editor)
    logits = bucketed_logits(backbone, cases, edit, groups)
    original = bucketed_logits(backbone, cases[split:])
    return SERACBatch((), (), 0, logits, original, cases.labels.to(logits.device), terms)


def entries_of(requests: TokenBatch) -> list[Entry]:
    """Return the tokens of tokenised requests, the last target token included, and where their targets start."""
    entries = []
    for ids, mask, labels in zip(requests.input_ids, requests.attention_mask.bool(), requests.labels, strict=True):
        targets = labels[labels != IGNORED].tolist()
        tokens = [*ids[mask].tolist(), targets[-1]]
        entries.append((tokens, len(tokens) - len(targets)))
    return entries


def scope_loss(scopes: Tensor, owners: Tensor, requests: Tensor, in_scope: Tensor) -> Tensor:
    """Binary cross-entropy of the scope classifier: mean of the means over positives, hard negatives, foreign pairs.

    Args:
        scopes: (p, m) logits.
        owners: (p,) record of each judged position.
        requests: (m,) record of each request.
        in_scope: (p,) whether the position is one of a request or generality case.
    """
    same_record = (owners.unsqueeze(1) == requests.unsqueeze(0)).to(scopes.device)
    positive = same_record & in_scope.unsqueeze(1).to(scopes.device)
    losses = functional.binary_cross_entropy_with_logits(scopes.float(), positive.float(), reduction="none")
    parts = [losses[part].mean() for part in (positive, same_record & ~positive, ~same_record) if part.any()]
    return torch.stack(parts).mean()


def answer_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """Mean over pairs of the mean cross-entropy over each one's target tokens: (q, vocabulary), (pairs, k) -> ()."""
    judged = (labels != IGNORED).to(answers.device)
    losses = functional.cross_entropy(answers.float(), labels.to(answers.device)[judged], reduction="none")
    return mean_per_row(losses, judged.nonzero()[:, 0], len(labels)).mean()
