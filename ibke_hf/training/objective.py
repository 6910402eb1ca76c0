"""The training objective (Eq. 29, 34-36): terms as pure functions, and a batch that is edited and judged by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import GradientFactors, evaluating, mean_per_row, target_logits
from ..core.composition import solve_groups, weighted_keys
from ..core.edits import LowRankEdit
from ..core.hypernetworks import AdaptedFactors
from ..core.layers import input_device
from ..core.modeling_ibke import GradientEditor
from ..core.shards import is_sharded
from ..core.tokens import IGNORED, TokenBatch
from ..evaluation.scores import token_ranks
from .activations import ActivationCache
from .batches import rows_by_length


def sufficiency_for_generality(logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_SG (Eq. 34): cross-entropy, mean over a case's target positions, then over the cases; 0 without cases.

    Args:
        logits: (p, vocabulary) of the edited model at the p judged positions, case after case.
        labels: (cases, k), -100 where nothing is judged.
    """
    if not len(labels):
        return logits.sum()
    judged = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[judged], reduction="none")
    return mean_per_row(losses, judged.nonzero()[:, 0], len(labels)).mean()


def independence_for_locality(logits: Tensor, original_logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_IL (Eq. 35): KL[edited ‖ original] over the full vocabulary in fp32, averaged as ℓ_SG; 0 without cases.

    Args:
        logits: (p, vocabulary) of the edited model at the p judged positions, case after case.
        original_logits: The same of the unedited model, without gradient.
        labels: (cases, k), -100 where nothing is judged.
    """
    if not len(labels):
        return logits.sum()
    edited, original = logits.float().log_softmax(-1), original_logits.detach().float().log_softmax(-1)
    divergences = (edited.exp() * (edited - original)).sum(-1)
    return mean_per_row(divergences, (labels != IGNORED).nonzero()[:, 0], len(labels)).mean()


def itm(mean: Tensor, log_variance: Tensor) -> Tensor:
    """ℓ_ITM (Eq. 29) of one layer, summed over the requests and unnormalised: KL[N(μ, v²) ‖ N(0, I)].

    Args:
        mean: μ, (b, l_m, d_m).
        log_variance: log v², (b, l_m, d_m).
    """
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (-log_variance + log_variance.exp() + mean.square() - 1).sum()


def information_transfer(latents: Sequence[tuple[Tensor, Tensor]], requests: int) -> Tensor:
    """The ITM term of Eq. 36 before β: Σ over all that is edited and layers, divided once by |E| n l_m d_m.

    Supporting hops that are edited in count in the sum and not in |E|: how many they are shows only when a batch is
    run, and a step has to be the same however its requests are split over micro-batches and ranks.

    Args:
        latents: μ and log v² of each layer, (b, l_m, d_m).
        requests: |E|, how many of the b are requests.
    """
    total = torch.stack([itm(mean, log_variance) for mean, log_variance in latents]).sum()
    return total / (requests * sum(mean[0].numel() for mean, _ in latents))


def mean_scale_factor(adapted: Sequence[AdaptedFactors]) -> Tensor:
    """Mean of σ (Eq. 32) over the tokens of all requests and layers [ours]."""
    factors = []
    for layer in adapted:
        if layer.gates is not None:
            tokens = (layer.layer_inputs != 0).any(-1)  # adapted factors are zero on padding
            factors.append(torch.sigmoid(layer.gates.float())[tokens])
    return torch.cat(factors).mean()


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
    judge_gates: bool = False,
    cache: ActivationCache | None = None,
) -> JudgedBatch:
    """Capture, edit, and run every judged case in one edited forward, the locality cases once more unedited.

    Args:
        model: The editor, wrapped or not. It draws z in training mode only, and evaluation judges the requests too.
        editor: The editor itself.
        backbone: The language model, its weights frozen.
        inputs: What :class:`EditCollator` returns.
        hops: Which supporting hops are edited in too: none, unknown or all.
        sg_includes_edit: Count the requests as generality cases.
        judge_gates: Make a term of the scale factors.
        cache: Holds what the unedited backbone makes of the texts; without it all is computed.

    Raises:
        NonFiniteError: If a loss or factor of a request is not finite; names layer and record.
    """
    if cache is not None:
        cache.new_batch()
    edit, rows, adapted, names = _edit(model, editor, backbone, inputs, hops, cache)
    requests, split = inputs["counts"][0], sum(inputs["counts"][:2])
    first = requests if model.training and not sg_includes_edit else 0
    start = (0 if sg_includes_edit else requests) - first
    cases = inputs["cases"][first:]
    logits = bucketed_logits(backbone, cases, edit, rows[first:], cache=cache)
    with torch.no_grad():
        original = bucketed_logits(backbone, inputs["cases"][split:], cache=cache)
    labels = cases.labels.to(logits.device)
    before, local = (int((part != IGNORED).sum()) for part in (labels[:start], labels[split - first :]))
    general = slice(before, len(logits) - local)
    terms = {
        "loss_sg": sufficiency_for_generality(logits[general], labels[start : split - first]),
        "loss_il": independence_for_locality(logits[general.stop :], original, labels[split - first :]),
    }
    latents = [(a.mean, a.log_variance) for a in adapted if a.mean is not None and a.log_variance is not None]
    if latents:
        terms["loss_itm"] = information_transfer(latents, requests)
    if judge_gates and any(a.gates is not None for a in adapted):
        terms["loss_gate"] = mean_scale_factor(adapted)
    return JudgedBatch(adapted, names, first, logits, original, labels, terms)


def _edit(
    model: nn.Module,
    editor: GradientEditor,
    backbone: Any,
    inputs: Mapping[str, Any],
    hops: str,
    cache: ActivationCache | None,
) -> tuple[LowRankEdit, Tensor, Sequence[AdaptedFactors], list[str]]:
    """Return the batch's edits, which of them (n,) each case carries, the adapted factors, their requests' names.

    Whatever has parameters runs in the `forward` of `model`, as DDP needs it.
    """
    number, groups, names = inputs["counts"][0], inputs["groups"], list(inputs["names"])
    requests, kept = (
        inputs["cases"][:number].trimmed(_width_multiple(backbone)),
        _hops_to_edit(backbone, inputs, hops, cache),
    )
    hop_cases = inputs["hop_cases"][kept]
    if len(hop_cases):
        requests = TokenBatch.cat([requests, inputs["hops"][kept]])
    names = names[:number] + [f"a supporting hop of {names[i]}" for i in hop_cases.tolist()]
    factors = (
        editor.capture(backbone, requests, names=names)
        if cache is None
        else cache.factors(editor, backbone, requests, names)
    )
    adapted = model(factors, sample=model.training)
    if not len(hop_cases):
        return _joined(editor, adapted, groups[:number], factors, requests), groups, adapted, names
    members, edits, rows = edits_with_hops(groups, number, hop_cases)
    chosen = [
        replace(a, layer_inputs=a.layer_inputs[members], output_gradients=a.output_gradients[members]) for a in adapted
    ]
    captured = [replace(f, layer_inputs=f.layer_inputs[members]) for f in factors]
    return _joined(editor, chosen, edits, captured, requests[members]), rows, adapted, names


def _joined(
    editor: GradientEditor,
    adapted: Sequence[AdaptedFactors],
    groups: Tensor,
    captured: Sequence[GradientFactors],
    requests: TokenBatch,
) -> LowRankEdit:
    """Make one edit of each group of requests: a sum of their side paths, or solved where the editor's edits are."""
    if editor.config.composition != "solve":
        return editor.as_edit(adapted, groups)
    if int(torch.bincount(groups).max()) == 1:  # one edit alone is left as it is
        return editor.as_edit(adapted, groups)
    captured = [replace(f, layer_inputs=weighted_keys(f.layer_inputs.float(), requests)) for f in captured]
    each = editor.as_edit(adapted, torch.arange(len(groups), device=groups.device), captured=captured)
    return solve_groups(each, groups, editor.config.ridge)


@torch.no_grad()
def _hops_to_edit(backbone: Any, inputs: Mapping[str, Any], which: str, cache: ActivationCache | None) -> Tensor:
    """Return the indices of the supporting hops that are edited in too."""
    hops, number = inputs["hops"], len(inputs["hop_cases"])
    if hops is None or which != "unknown":
        if which == "unknown" and is_sharded(backbone):  # other processes may have some
            bucketed_logits(backbone, inputs["cases"][:0])
        return torch.arange(number if which == "all" else 0)
    scores = hit_rates(bucketed_logits(backbone, hops, cache=cache), hops.labels, torch.full((number,), 5))
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
    backbone: Any,
    cases: TokenBatch,
    edit: LowRankEdit | None = None,
    rows: Tensor | None = None,
    cache: ActivationCache | None = None,
) -> Tensor:
    """Logits (p, vocabulary) at the judged positions of left-padded cases, case after case, each under its edit.

    Cases of like lengths go in a forward together: one long question would otherwise pad every short one, which
    doubles the tokens of a step. With a cache only the upper blocks are run, and the vocabulary projection once. A
    backbone that is sharded over processes runs one forward in each, even where there are no cases.
    """
    if is_sharded(backbone):
        with evaluating(backbone):
            return _judged_together(backbone, cases, edit, rows)
    if not len(cases):  # an empty sum, which still reaches every factor: all ranks have to reduce the same gradients
        factors = [] if edit is None else [factor.sum() for factor in edit.outputs.values()]
        return torch.stack(factors or [torch.zeros(())]).sum().expand(0, 1)
    chunks, parts, multiple = _forwards(backbone, cases), [], _width_multiple(backbone)
    with evaluating(backbone):
        for chunk in chunks:
            batch, carried = cases[chunk].trimmed(multiple), None if rows is None else rows[chunk]
            parts.append(
                _judged(backbone, batch, edit, carried) if cache is None else cache.states(batch, edit, carried)
            )
        order = torch.cat(chunks)
        owners = order.repeat_interleave((cases.labels[order] != IGNORED).sum(-1))
        joined = torch.cat(parts)[owners.argsort(stable=True).to(parts[0].device)]
        return joined if cache is None else cache.logits(joined)


def _judged_together(backbone: Any, cases: TokenBatch, edit: LowRankEdit | None, rows: Tensor | None) -> Tensor:
    """Logits at the judged positions by one forward of all cases; of a token that is not judged where there are none.

    All processes gather the weights together, forward and backward: one that left a pass out would halt the others.
    """
    if len(cases):
        return _judged(backbone, cases.trimmed(_width_multiple(backbone)), edit, rows)
    token = torch.zeros(1, 2, dtype=torch.long)
    return _judged(backbone, TokenBatch(token, torch.ones_like(token), token), edit, token[:, 0])[:0]


def _forwards(backbone: Any, cases: TokenBatch) -> list[Tensor]:
    """Return the rows of each forward: on a CPU as few tokens as can be, else few forwards of few widths."""
    lengths = cases.attention_mask.sum(-1)
    if _width_multiple(backbone) > 1:
        return list(lengths.argsort(stable=True).chunk(2))
    return [torch.tensor(rows, device=lengths.device) for rows in rows_by_length(lengths.tolist())]


def _width_multiple(backbone: Any) -> int:
    """Return what widths are multiples of: an accelerator may compile anew for each; a CPU pays for every token."""
    return 1 if input_device(backbone).type == "cpu" else 8


def _judged(backbone: Any, cases: TokenBatch, edit: LowRankEdit | None, rows: Tensor | None) -> Tensor:
    """Logits (p, vocabulary) at the judged positions of one forward."""
    with nullcontext() if edit is None or rows is None else edit.attached(backbone, rows=rows):
        logits, labels = target_logits(backbone, cases)
    return logits[labels != IGNORED]


def hit_rates(logits: Tensor, labels: Tensor, top_k: Tensor) -> Tensor:
    """Share of each case's target tokens that are among the first `top_k` predictions.

    Ranks are :func:`~ibke_hf.evaluation.scores.token_ranks`', as in evaluation.

    Args:
        logits: (p, vocabulary) at the judged positions, case after case.
        labels: (cases, k), -100 where nothing is judged.
        top_k: (cases,).

    Returns:
        (cases,) from 0 to 1.
    """
    labels, top_k = labels.to(logits.device), top_k.to(logits.device)
    judged = labels != IGNORED
    rows = judged.nonzero()[:, 0]
    return mean_per_row((token_ranks(logits, labels[judged]) < top_k[rows]).float(), rows, len(labels))


def _first_bad(rows: Tensor) -> int | None:
    bad = (~torch.isfinite(rows)).any(-1).nonzero()
    return int(bad[0]) if len(bad) else None
