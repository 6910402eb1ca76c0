"""Latents of edits at each layer: how well they cluster by relation, and their map in a plane (Fig. 6).

The map and the clusters' score need scikit-learn, the extra "figures"; it is imported when they are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.forward import evaluating
from ..core.records import EditRecord, EditRequest
from ..core.tokens import context_length, encode_requests
from .readings import chunks, read_targets

PERPLEXITY = 30.0  # of t-SNE; less where there are few points


@dataclass(frozen=True)
class Latents:
    """What an editor makes of n requests.

    Attributes:
        layers: By module name the latent z = μ of each request, (n, l_m · d_m).
        confidence: (n,) mean probability that the edited model gives the target tokens of each request.
    """

    layers: dict[str, Tensor]
    confidence: Tensor


@torch.no_grad()
def edit_latents(
    editor: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    batch_size: int = 32,
) -> Latents:
    """Read the latents of requests, each edited alone, and how sure the edited model is of them.

    Args:
        editor: An editor with a latent, IBKE.
        model: The backbone, unchanged by the call.
        tokenizer: Its tokenizer.
        requests: n requests.
        batch_size: Requests that are edited at once.

    Raises:
        ValueError: If the editor has no latent.
    """
    parts: list[list[Tensor]] = []
    confidence: list[Tensor] = []
    with evaluating(model), evaluating(editor):
        for members in chunks(len(requests), batch_size):
            some = [requests[i] for i in members]
            captured = editor.capture(model, encode_requests(tokenizer, some, max_length=context_length(model)))
            adapted = editor(captured)
            if any(factors.mean is None for factors in adapted):
                raise ValueError(f"a {type(editor).__name__} has no latent; give an IBKE editor")
            parts.append([factors.mean.float().flatten(1).cpu() for factors in adapted])
            edit = editor.as_edit(adapted, torch.arange(len(some)))
            confidence.append(read_targets(model, tokenizer, some, edit, range(len(some))).confidence)
    names = editor.config.module_names()
    layers = {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(names)}
    return Latents(layers, torch.cat(confidence))


def silhouette(points: Tensor, labels: Sequence[str]) -> float | None:
    """Return how clear the clusters of labelled points are: the mean silhouette coefficient, -1 … 1.

    Args:
        points: (n, d).
        labels: n names; None is returned unless there are at least two of them, and fewer than points.

    Raises:
        ImportError: If the extra "figures" is missing.
    """
    require_clusters()
    from sklearn.metrics import silhouette_score

    if not 2 <= len(set(labels)) < len(labels):
        return None
    return float(silhouette_score(points.numpy(), list(labels)))


def plane(points: Tensor, seed: int = 0) -> Tensor:
    """Map points (n, d) to a plane by t-SNE (n, 2); the same points and seed give the same map.

    Raises:
        ImportError: If the extra "figures" is missing.
        ValueError: For fewer than four points.
    """
    require_clusters()
    from sklearn.manifold import TSNE

    if len(points) < 4:
        raise ValueError(f"t-SNE needs at least four points, found {len(points)}")
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    mapped = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())
    return torch.tensor(mapped)


def require_clusters() -> None:
    """Check that scikit-learn is there.

    Raises:
        ImportError: If the extra "figures" is missing.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError('maps of latents need the extra "figures": pip install "ibke-hf[figures]"') from error


def frequent_relations(records: Sequence[EditRecord], number: int = 8) -> list[EditRecord]:
    """Return the records of the relations that most of them edit; ties go to the first name.

    Args:
        records: Any; those without a relation are left out.
        number: Of relations.
    """
    counts = Counter(record.relation for record in records if record.relation)
    chosen = {name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]}
    return [record for record in records if record.relation in chosen]
