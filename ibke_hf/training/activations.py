"""What a frozen backbone computes anew at every step of training, kept on disk: it never changes.

Of each text the states that enter the lowest edited block, of each request its gradient factors, and of each locality
case (and supporting hop) the states behind the last block that the unedited model predicts its target from. With these
a step runs the backbone from the lowest edited block to the last one only, forward and backward, for its generality
and locality cases.

Everything is kept by token, without padding, under a digest of the text's token ids: of any batch, tokenizer or kind
of editor. What is not there is computed and stored; it goes through 16 bit in any case, so that a step does not depend
on what the cache holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from ..core.capture import GradientFactors
from ..core.edits import LowRankEdit
from ..core.fingerprints import weights_digest
from ..core.modeling_ibke import GradientEditor
from ..core.tokens import IGNORED, TokenBatch
from ..io import FileError, read_json, write_json
from .activation_store import ActivationStore, from_half, to_half
from .batches import rows_by_length
from .partial_forward import PartialForward, PartialForwardError

logger = logging.get_logger(__name__)
FORMAT = 1  # of the stored arrays; another one is another fingerprint
ABOUT = "backbone.json"
GIGABYTE = 10**9
Stored = tuple[Tensor, tuple[float, ...]]  # an array (rows, columns) of fp16 and a few numbers


class ActivationCache:
    """The activations of one backbone at given layers.

    Args:
        parts: Runs the backbone in parts.
        names: Names of the edited layers.
        store: Where the activations are kept.
    """

    def __init__(self, parts: PartialForward, names: Sequence[str], store: ActivationStore) -> None:
        self.parts, self.names, self.store = parts, tuple(names), store
        self._recent: dict[str, Stored] = {}  # of the batch at hand, so that what has no room is computed but once

    @classmethod
    def open(
        cls, folder: str | Path, backbone: Any, editor: GradientEditor, gigabytes: float
    ) -> ActivationCache | None:
        """Open the part of a folder that belongs to a backbone and an editor's layers.

        Args:
            folder: Holds a folder for each backbone, layers and precision.
            backbone: The language model, frozen.
            editor: The editor that is trained.
            gigabytes: Room for all that the folder holds.

        Returns:
            The cache; None, with a warning, where the backbone cannot be run in parts.

        Raises:
            FileError: If what is stored there was computed by a backbone of these weights that answers otherwise,
                as with an adapter that is switched on or off.
        """
        names = editor.config.module_names()
        try:
            parts = PartialForward(backbone, names)
        except PartialForwardError as error:
            logger.warning(f"{type(backbone).__name__}: trained without activation cache, since {error}")
            return None
        about = _about(backbone, names, editor.config.capture_loss_scale)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        place = Path(folder) / digest
        store = ActivationStore(place, int(gigabytes * GIGABYTE))
        _require_answers(place / ABOUT, about, parts.answers, torch.finfo(backbone.dtype).eps ** 0.5)
        return cls(parts, names, store)

    def new_batch(self) -> None:
        """Forget what was computed for the batch before."""
        self._recent.clear()

    # --- what a step needs --------------------------------------------------------------------------------------

    def factors(
        self, editor: GradientEditor, backbone: Any, requests: TokenBatch, names: Sequence[str]
    ) -> list[GradientFactors]:
        """Return the gradient factors of requests on the unedited model, as :meth:`GradientEditor.capture` does."""
        keys = _keys("factors", requests, with_target=True)

        def compute(rows: list[int]) -> list[Stored]:
            lengths = requests.attention_mask[rows].sum(1).tolist()
            groups = [[rows[place] for place in group] for group in rows_by_length(lengths)]
            arrays: dict[int, Stored] = {}
            for group in groups:
                batch, called = requests[group].trimmed(), [names[row] for row in group]
                with self.parts.beginning_with(self._lower(batch)):
                    captured = editor.capture(backbone, batch, names=called)
                arrays |= dict(zip(group, _stored_factors(captured), strict=True))
            return [arrays[row] for row in rows]

        stored = self._obtain(keys, compute)
        mask = requests.attention_mask.bool().cpu()
        tokens = torch.cat([array for array, _ in stored])
        norms = torch.tensor([numbers for _, numbers in stored])
        result, first = [], 0
        for layer, (d_in, d_out) in enumerate(zip(editor.config.input_dims, editor.config.output_dims, strict=True)):
            middle, end = first + d_in + 1, first + d_in + d_out + 2
            layer_inputs = _padded(from_half(tokens[:, first:middle]), mask)
            output_gradients = _padded(from_half(tokens[:, middle:end]), mask)
            result.append(GradientFactors(layer_inputs, output_gradients, mask, norms[:, layer]))
            first = end
        return result

    def states(self, cases: TokenBatch, edit: LowRankEdit | None = None, rows: Tensor | None = None) -> Tensor:
        """Return the states (p, d) behind the last block at the judged positions of cases, each under its edit."""
        if edit is None or rows is None:
            return self._unedited(cases)
        entering = self._entering(cases)
        with edit.attached(self.parts.model, rows=rows):
            return self.parts.upper(cases, entering)

    @torch.no_grad()
    def _unedited(self, cases: TokenBatch) -> Tensor:
        def compute(rows: list[int]) -> list[Stored]:
            batch = cases[rows].trimmed()
            states = to_half(self.parts.upper(batch, self._entering(batch)).cpu())
            return [(part, ()) for part in states.split((batch.labels != IGNORED).sum(1).tolist())]

        stored = self._obtain(_keys("targets", cases, with_target=True), compute)
        return from_half(torch.cat([array for array, _ in stored]))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (p, vocabulary) of states (p, d) behind the last block."""
        return self.parts.head(states)

    @torch.no_grad()
    def _entering(self, cases: TokenBatch) -> Tensor | None:
        """Return the states (b, l, d) that enter the lowest edited block, None where that is the first block."""
        if not self.parts.start:
            return None

        keys = _keys("entering", cases, with_target=False)

        def compute(rows: list[int]) -> list[Stored]:
            self._lower(cases[rows].trimmed())
            return [self._recent[keys[row]] for row in rows]

        stored = self._obtain(keys, compute)
        return _padded(from_half(torch.cat([array for array, _ in stored])), cases.attention_mask.bool().cpu())

    def _lower(self, batch: TokenBatch) -> Tensor | None:
        """Compute and store the states that enter the lowest edited block; return them before they are rounded."""
        if not self.parts.start:
            return None
        states, mask = self.parts.lower(batch), batch.attention_mask.bool()
        tokens = to_half(states[mask.to(states.device)].cpu()).split(mask.sum(1).tolist())
        self._keep(
            {key: (part, ()) for key, part in zip(_keys("entering", batch, with_target=False), tokens, strict=True)}
        )
        return states

    def _obtain(self, keys: Sequence[str], compute: Callable[[list[int]], list[Stored]]) -> list[Stored]:
        """Return the arrays of keys; those that are not stored are computed, by their rows, and stored."""
        held = {key: self._recent.get(key) or self.store.get(key) for key in keys}
        missing = list({key: row for row, key in enumerate(keys) if held[key] is None}.values())
        if missing:
            computed = {keys[row]: array for row, array in zip(missing, compute(missing), strict=True)}
            held |= computed
            self._keep(computed)
        return [entry for key in keys if (entry := held[key]) is not None]

    def _keep(self, computed: Mapping[str, Stored]) -> None:
        self._recent |= computed
        self.store.put({key: entry for key, entry in computed.items() if torch.isfinite(entry[0]).all()})


def _stored_factors(captured: Sequence[GradientFactors]) -> list[Stored]:
    """Encode the factors of b requests: of each, h and u of every layer side by side, and ‖hW‖ of every layer."""
    mask = captured[0].mask.cpu()
    columns = [
        to_half(part[mask.to(part.device)].cpu())
        for layer in captured
        for part in (layer.layer_inputs, layer.output_gradients)
    ]
    norms = torch.stack([layer.output_norms.cpu() for layer in captured], 1).tolist()
    arrays = torch.cat(columns, 1).split(mask.sum(1).tolist())
    return [(array, tuple(norm)) for array, norm in zip(arrays, norms, strict=True)]


def _padded(tokens: Tensor, mask: Tensor) -> Tensor:
    """Put the real tokens (t, d) of a batch, text after text, into (b, l, d); zero on padding."""
    padded = tokens.new_zeros(*mask.shape, tokens.shape[1])
    padded[mask] = tokens
    return padded


def _keys(kind: str, batch: TokenBatch, *, with_target: bool) -> list[str]:
    """Return a digest of each row's token ids, and of the positions that are judged."""
    keys = []
    for ids, mask, labels in zip(
        batch.input_ids.cpu(), batch.attention_mask.bool().cpu(), batch.labels.cpu(), strict=True
    ):
        text = [ids[mask]] + ([labels[mask]] if with_target else [])
        digest = hashlib.blake2b(kind.encode(), digest_size=16)
        for part in text:
            digest.update(part.to(torch.int64).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def _require_answers(file: Path, about: Mapping[str, Any], answers: Tensor, tolerance: float) -> None:
    """Check that the backbone answers as it did when a store was begun; a new one keeps the answers in its file."""
    stored = read_json(file).get("answers") if file.exists() else None
    if stored is None:
        write_json(file, {**about, "answers": answers.tolist()})
    elif len(stored) != len(answers) or not (torch.tensor(stored) - answers).norm() <= tolerance * answers.norm():
        raise FileError(
            f"{file.parent}: holds the activations of a backbone of these weights that answered otherwise (another "
            "adapter in use?); remove it, or name another activation_cache"
        )


def _about(backbone: Any, names: Sequence[str], loss_scale: float) -> Mapping[str, Any]:
    """Return what decides the activations, as JSON values."""
    config = backbone.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache", "torch_dtype", "dtype"):
        config.pop(name, None)
    return {
        "format": FORMAT,
        "backbone": type(backbone).__name__,
        "weights": weights_digest(backbone),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "dtype": str(backbone.dtype),
        "layers": list(names),
        "loss_scale": loss_scale,
        "transformers": transformers.__version__,
    }
