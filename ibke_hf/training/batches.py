"""Batches of records: collated to tokens, edited and judged, with the terms of Eq. 36 and the scores of their cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..core.capture import evaluating, mean_per_row, target_logits
from ..core.edits import LowRankEdit
from ..core.hypernetworks import AdaptedFactors
from ..core.modeling_ibke import GradientEditor
from ..core.records import EditRecord, collides
from ..core.tokens import IGNORED, TokenBatch, encode, pad_and_label
from .objective import independence_for_locality, information_transfer, sufficiency_for_generality

WIDTH_MULTIPLE = 8
KINDS = ("request", "generality case", "locality case")


class RecordDataset(Dataset[EditRecord]):
    """A list of records as a dataset for the Trainer."""

    def __init__(self, records: Sequence[EditRecord]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        return self.records[index]


@dataclass
class EditCollator:
    """Records -> one batch of tokens: the requests, then the generality cases, then the locality cases.

    A locality case that collides with an edit of its own group is left out (SPEC §4).
    """

    tokenizer: PreTrainedTokenizerBase
    edits_per_group: int = 0
    supporting_hops: bool = False
    max_length: int | None = None

    def __call__(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Return the batch.

        Returns:
            ``cases`` with, per row, ``groups`` (edited jointly), ``owners`` (index of the record), ``top_k`` and
            ``names`` for errors; ``counts`` of requests, generality and locality cases; ``hops`` with ``hop_cases``
            (h,), the row that each of them supports; ``records``, their ids.

        Raises:
            RequestError: If a text is unusable, naming the record.
        """
        size = self.edits_per_group or len(records)
        edits = [
            [edit for record in records[i : i + size] for edit in record.edits] for i in range(0, len(records), size)
        ]
        rows: tuple[list[Any], ...] = ([], [], [])
        for owner, record in enumerate(records):
            local = [case for case in record.locality if not collides(case, edits[owner // size])]
            for kind, part, cases in zip(KINDS, rows, (record.requests, record.generality, local), strict=True):
                part += [(owner, case, f"{kind} {i} of record {record.id}") for i, case in enumerate(cases)]
        requests, generality, locality = rows
        owners, cases, names = zip(*requests, *generality, *locality, strict=True)
        hops = [
            (i, hop)
            for i, (_, case, _) in enumerate(generality, len(requests))
            for hop in case.supporting
            if self.supporting_hops
        ]
        hop_names = [f"a supporting hop of {names[i]}" for i, _ in hops]
        return {
            "records": [record.id for record in records],
            "cases": self._tokens(cases, names),
            "names": names,
            "owners": torch.tensor(owners),
            "groups": torch.tensor(owners) // size,
            "counts": [len(part) for part in rows],
            "top_k": torch.tensor([getattr(case, "top_k", 1) for case in cases]),
            "hops": self._tokens([hop for _, hop in hops], hop_names) if hops else None,
            "hop_cases": torch.tensor([i for i, _ in hops], dtype=torch.long),
        }

    def _tokens(self, cases: Sequence[Any], names: Sequence[str]) -> TokenBatch:
        limit = self.max_length
        encoded = [
            encode(self.tokenizer, c.prompt, c.target, name=n, max_length=limit)
            for c, n in zip(cases, names, strict=True)
        ]
        return pad_and_label(encoded)


@dataclass(frozen=True)
class JudgedBatch:
    """One batch, edited and judged.

    Attributes:
        adapted: Per layer, the adapted factors of the requests and of the supporting hops edited with them.
        requests: What errors call these.
        first: Row of the batch that the judged cases begin with: training judges the requests only where ℓ_SG counts
            them.
        logits: (p, vocabulary) of the edited model at the p judged positions, case after case.
        original: The same of the unedited model, of the locality cases.
        labels: (cases, k), -100 where nothing is judged.
        terms: ``loss_sg``, ``loss_il`` and, of an editor with a latent, ``loss_itm``.
    """

    adapted: Sequence[AdaptedFactors]
    requests: Sequence[str]
    first: int
    logits: Tensor
    original: Tensor
    labels: Tensor
    terms: Mapping[str, Tensor]

    def culprit(self, layers: Sequence[str], inputs: Mapping[str, Any]) -> str:
        """Name the layer and the request, or the case, that made a term non-finite."""
        for layer, a in zip(layers, self.adapted, strict=True):
            factors = [f.flatten(1) for f in (a.layer_inputs, a.output_gradients, a.log_variance) if f is not None]
            row = _first_bad(torch.cat(factors, 1))
            if row is not None:
                return f"the adapted factors of {layer} for {self.requests[row]}"
        cases = (self.labels != IGNORED).nonzero()[:, 0].tolist()
        for what, logits in (("edited", self.logits), ("unedited", self.original)):
            position = _first_bad(logits)
            if position is not None:
                name = inputs["names"][
                    self.first + cases[len(cases) - len(logits) + position]
                ]  # the locality cases come last
                return f"the predictions of the {what} model for {name} (edited layers {', '.join(layers)})"
        return f"records {', '.join(inputs['records'])}, edited layers {', '.join(layers)}"


def run_batch(
    model: nn.Module,
    editor: GradientEditor,
    backbone: Any,
    inputs: Mapping[str, Any],
    *,
    hops: str = "unknown",
    sg_includes_edit: bool = False,
) -> JudgedBatch:
    """Capture, edit, and run every judged case in one edited forward, the locality cases once more unedited.

    Args:
        model: The editor, wrapped or not. It draws z in training mode only, and evaluation judges the requests too.
        editor: The editor itself.
        backbone: The language model, its weights frozen.
        inputs: What :class:`EditCollator` returns.
        hops: Which supporting hops are edited in too: none, unknown or all.
        sg_includes_edit: Count the requests as generality cases.

    Raises:
        NonFiniteError: If a loss or factor of a request is not finite; names layer and record.
    """
    edit, rows, adapted, names = _edit(model, editor, backbone, inputs, hops)
    requests, split = inputs["counts"][0], sum(inputs["counts"][:2])
    first = requests if model.training and not sg_includes_edit else 0
    start = (0 if sg_includes_edit else requests) - first
    cases = inputs["cases"][first:]
    logits = bucketed_logits(backbone, cases, edit, rows[first:])
    with torch.no_grad():
        original = bucketed_logits(backbone, inputs["cases"][split:])
    labels = cases.labels.to(logits.device)
    before, local = (int((part != IGNORED).sum()) for part in (labels[:start], labels[split - first :]))
    general = slice(before, len(logits) - local)
    terms = {
        "loss_sg": sufficiency_for_generality(logits[general], labels[start : split - first]),
        "loss_il": independence_for_locality(logits[general.stop :], original, labels[split - first :]),
    }
    latents = [(a.mean, a.log_variance) for a in adapted if a.mean is not None and a.log_variance is not None]
    if latents:
        terms["loss_itm"] = information_transfer(latents)
    return JudgedBatch(adapted, names, first, logits, original, labels, terms)


def _edit(
    model: nn.Module, editor: GradientEditor, backbone: Any, inputs: Mapping[str, Any], hops: str
) -> tuple[LowRankEdit, Tensor, Sequence[AdaptedFactors], list[str]]:
    """Return the edits of the batch, the edit (n,) that each case carries, the adapted factors and the names of their requests.

    Whatever has parameters runs in the `forward` of `model`, as DDP needs it.
    """
    number, groups, names = inputs["counts"][0], inputs["groups"], list(inputs["names"])
    requests, kept = inputs["cases"][:number].trimmed(WIDTH_MULTIPLE), _hops_to_edit(backbone, inputs, hops)
    hop_cases = inputs["hop_cases"][kept]
    if len(hop_cases):
        requests = TokenBatch.cat([requests, inputs["hops"][kept]])
    names = names[:number] + [f"a supporting hop of {names[i]}" for i in hop_cases.tolist()]
    adapted = model(editor.capture(backbone, requests, names=names), sample=model.training)
    if not len(hop_cases):
        return editor.as_edit(adapted, groups[:number]), groups, adapted, names
    members, edits, rows = edits_with_hops(groups, number, hop_cases)
    chosen = [
        replace(a, layer_inputs=a.layer_inputs[members], output_gradients=a.output_gradients[members]) for a in adapted
    ]
    return editor.as_edit(chosen, edits), rows, adapted, names


@torch.no_grad()
def _hops_to_edit(backbone: Any, inputs: Mapping[str, Any], which: str) -> Tensor:
    """Return the indices of the supporting hops that are edited in too."""
    hops, number = inputs["hops"], len(inputs["hop_cases"])
    if hops is None or which != "unknown":
        return torch.arange(number if which == "all" else 0)
    scores = case_scores(bucketed_logits(backbone, hops), hops.labels, torch.full((number,), 5))
    return (scores < 1).nonzero().flatten().to(hops.labels.device)


def edits_with_hops(groups: Tensor, requests: int, hop_cases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each case with edited hops an edit of its own: its group's requests, then its hops (PROTOCOL, Procedure 4).

    Args:
        groups: (n,) group of each case; the first `requests` cases are the requests themselves.
        requests: Number of requests b.
        hop_cases: (h,) the case that each hop supports.

    Returns:
        Members (m,) among the b requests and h hops, the edit (m,) that each belongs to, the edit (n,) that each case
        carries.
    """
    supported, hop_edits = hop_cases.unique(return_inverse=True)
    number, device = int(groups.max()) + 1, groups.device
    copies, copied = (groups[supported].unsqueeze(1) == groups[:requests]).nonzero(as_tuple=True)
    rows = groups.clone()
    rows[supported] = number + torch.arange(len(supported), device=device)
    members = torch.cat(
        (torch.arange(requests, device=device), copied, requests + torch.arange(len(hop_cases), device=device))
    )
    return members, torch.cat((groups[:requests], number + copies, number + hop_edits)), rows


def bucketed_logits(
    backbone: Any, cases: TokenBatch, edit: LowRankEdit | None = None, rows: Tensor | None = None, buckets: int = 2
) -> Tensor:
    """Logits (p, vocabulary) at the judged positions of left-padded cases, case after case, each under its edit.

    The short and the long cases go in a forward each: one long question would otherwise pad every short one, which on
    Atlas doubles the tokens of a step.
    """
    if not len(cases):  # an empty sum, which still reaches every factor: all ranks have to reduce the same gradients
        factors = [] if edit is None else [factor.sum() for factor in edit.outputs.values()]
        return torch.stack(factors or [torch.zeros(())]).sum().expand(0, 1)
    order = cases.attention_mask.sum(-1).argsort(stable=True)
    parts = []
    with evaluating(backbone):
        for chunk in order.chunk(buckets):
            with nullcontext() if edit is None or rows is None else edit.attached(backbone, rows=rows[chunk]):
                logits, labels = target_logits(backbone, cases[chunk].trimmed(WIDTH_MULTIPLE))
            parts.append(logits[labels != IGNORED])
    owners = order.repeat_interleave((cases.labels[order] != IGNORED).sum(-1))
    return torch.cat(parts)[owners.argsort(stable=True).to(parts[0].device)]


def case_scores(logits: Tensor, labels: Tensor, top_k: Tensor) -> Tensor:
    """Share of each case's target tokens that are among the first `top_k` predictions, ties to the lowest id.

    Args:
        logits: (p, vocabulary) at the judged positions, case after case.
        labels: (cases, k), -100 where nothing is judged.
        top_k: (cases,).

    Returns:
        (cases,) from 0 to 1.
    """
    labels, top_k = labels.to(logits.device), top_k.to(logits.device)
    judged = labels != IGNORED
    rows, values, targets = judged.nonzero()[:, 0], logits.float(), labels[judged].unsqueeze(-1)
    wanted = values.gather(-1, targets)
    ahead = (values > wanted) | ((values == wanted) & (torch.arange(values.shape[-1], device=values.device) < targets))
    return mean_per_row((ahead.sum(-1) < top_k[rows]).float(), rows, len(labels))


def _first_bad(rows: Tensor) -> int | None:
    bad = (~torch.isfinite(rows)).any(-1).nonzero()
    return int(bad[0]) if len(bad) else None
