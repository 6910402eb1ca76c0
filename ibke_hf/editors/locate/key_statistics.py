"""Second moments of a layer's keys over a corpus: what ROME weighs a key by, and what AlphaEdit finds a null space in.

The key of a token is what enters the FFN output projection there. Moments are summed batch by batch in fp32 on the
device that the layer is on, so that memory does not grow with the corpus, and cached under what they depend on:
corpus, weights, layers and sizes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ...core.capture import evaluating, read_layers
from ...core.files import parse_json, written_together
from ...core.fingerprints import fingerprint, quick_digest, same_backbone
from ...core.layers import BackboneError, device_of, dimensions, layers_to_edit, modules_to_edit, number_of_layers
from ...core.tokens import context_length, pad_and_label

CHUNK = 512  # texts that are tokenised at once
OPENING = 200  # characters kept of a text whose beginning may become a random prefix
OPENINGS = 256
FORMAT_VERSION = 1
logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers over a corpus.

    Attributes:
        moments: C = E[k kᵀ] (d_in, d_in) by module name, fp32 (Meng et al. 2022, Eq. 2, over the number of tokens).
        tokens: Number of tokens that the mean is over.
        corpus: SHA-256 of the texts, in their order.
        openings: Beginnings of some texts, drawn uniformly, for random prefixes.
        fingerprint: A few weights of each layer, to tell backbones apart.
    """

    moments: Mapping[str, Tensor]
    tokens: int
    corpus: str
    openings: tuple[str, ...] = ()
    fingerprint: Mapping[str, Sequence[float]] | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[str],
        layers: Sequence[int] | None = None,
        *,
        edited_modules: str | None = None,
        cache: str | Path | None = None,
        batch_tokens: int = 8192,
        max_length: int = 1024,
        progress: bool = True,
    ) -> KeyStatistics:
        """Measure the keys of a model on a corpus, or read them from the cache.

        Args:
            model: The backbone; it runs in its own dtype and on its own devices, and is not changed.
            tokenizer: Its tokenizer.
            texts: The corpus, gone through twice: a list or a data set's column, not a generator.
            layers: Indices of the layers; by default those that ROME and AlphaEdit edit by default.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            cache: Folder of the cache; None keeps nothing.
            batch_tokens: Tokens of a forward pass, padding included: what bounds memory.
            max_length: Tokens that a longer text is cut to.
            progress: Show a progress bar.

        Raises:
            BackboneError: If the layers don't exist or the projection is ambiguous.
            ValueError: If a size is below 1, or `texts` is a one-shot iterator, has no text, or holds something else.
        """
        if batch_tokens < 1 or max_length < 1:
            raise ValueError(f"batch_tokens and max_length must be at least 1, found {batch_tokens} and {max_length}")
        template, chosen = layers_to_edit(model, layers, edited_modules, default=default_layers(model))
        modules = modules_to_edit(model, [template.format(i=i) for i in sorted(chosen)])
        max_length = min(max_length, batch_tokens, context_length(model) or max_length)
        corpus, number, openings = _survey(texts)
        file = (
            None
            if cache is None
            else Path(cache) / f"keys-{_cache_name(model, modules, corpus, max_length)}.safetensors"
        )
        if file is not None and file.exists() and (cached := cls._cached(file)) is not None:
            return cached
        moments, tokens = _measure(model, tokenizer, texts, modules, number, batch_tokens, max_length, progress)
        measured = cls(moments, tokens, corpus, openings, fingerprint(modules))
        if file is not None:
            measured.save(file)
        return measured

    def save(self, file: str | Path) -> None:
        """Write the statistics as one safetensors file, to a temporary name that is then renamed."""
        content = {
            "format_version": FORMAT_VERSION,
            "tokens": self.tokens,
            "corpus": self.corpus,
            "openings": self.openings,
            "fingerprint": dict(self.fingerprint or {}),
        }
        target = Path(file)
        with written_together(target.parent) as scratch:
            tensors = {name: moment.cpu().contiguous() for name, moment in self.moments.items()}
            save_file(tensors, scratch / target.name, metadata={"format": "pt", "keys": json.dumps(content)})

    @classmethod
    def load(cls, file: str | Path) -> KeyStatistics:
        """Read saved statistics.

        Raises:
            ValueError: If the file is incomplete or holds something else.
        """
        try:
            with safe_open(file, "pt") as opened:
                content = parse_json((opened.metadata() or {})["keys"], name="its keys", cure="measure again")
                moments = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            return cls(
                moments, content["tokens"], content["corpus"], tuple(content["openings"]), content["fingerprint"]
            )
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: not a file of key statistics ({error}); delete it and measure the keys again"
            ) from error

    @classmethod
    def _cached(cls, file: Path) -> KeyStatistics | None:
        try:
            return cls.load(file)
        except ValueError as error:
            logger.warning(f"{error}; they are measured again now")
            return None

    def to(self, *args: Any, **kwargs: Any) -> KeyStatistics:
        """Return the statistics on another device, as `torch.Tensor.to` would."""
        return replace(self, moments={name: moment.to(*args, **kwargs) for name, moment in self.moments.items()})

    def require(self, modules: Mapping[str, nn.Module]) -> None:
        """Check that the statistics are of these layers.

        Raises:
            ValueError: If a layer was not measured.
            BackboneError: If they are those of another backbone.
        """
        missing = [name for name in modules if name not in self.moments]
        if missing:
            raise ValueError(
                f"the key statistics lack {', '.join(missing)} (they have {', '.join(self.moments)}); "
                "measure those layers: KeyStatistics.of(model, tokenizer, texts, layers)"
            )
        wrong = [name for name, module in modules.items() if len(self.moments[name]) != dimensions(module)[0]]
        if wrong or not same_backbone(self.fingerprint or {}, fingerprint(modules)):
            raise BackboneError(
                "the key statistics were measured on another backbone; measure them on this one: "
                "KeyStatistics.of(model, tokenizer, texts, layers)"
            )


def default_layers(model: Any, number: int = 5) -> list[int]:
    """Return `number` layers, or fewer, that end at the relative depth of ROME's in GPT-2 XL, 17 of 48."""
    last = number_of_layers(model) * 17 // 48
    return list(range(max(last - number + 1, 0), last + 1))


def _survey(texts: Iterable[str]) -> tuple[str, int, tuple[str, ...]]:
    """Return the fingerprint, number and a uniform draw of beginnings of the texts."""
    if isinstance(texts, (str, Iterator)):
        raise ValueError(
            f"texts must be a list or a data set's column, which can be gone through twice, found "
            f"{type(texts).__name__}"
        )
    digest, rng, number = hashlib.sha256(), random.Random(0), 0
    openings: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, found {type(text).__name__}; of a data set pass its text column")
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
        number += 1
        place = rng.randrange(number)
        if len(openings) < OPENINGS:
            openings.append(text[:OPENING])
        elif place < OPENINGS:
            openings[place] = text[:OPENING]
    if not number:
        raise ValueError("texts is empty; pass the corpus that the keys are measured on")
    return digest.hexdigest(), number, tuple(openings)


def _cache_name(model: Any, modules: Mapping[str, nn.Module], corpus: str, max_length: int) -> str:
    """Name what the keys depend on: the corpus, the layers and a few values of every parameter."""
    return quick_digest(model, str(FORMAT_VERSION), corpus, str(max_length), str(sorted(modules)))


def _measure(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    number: int,
    batch_tokens: int,
    max_length: int,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """Return E[k kᵀ] of each layer and the number of tokens that it is over."""
    sums, tokens = {name: torch.zeros(2 * dimensions(m)[:1], device=device_of(m)) for name, m in modules.items()}, 0
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(model),
        tqdm(total=number, desc="measuring keys", unit="text", disable=not progress) as bar,
    ):
        for rows in _batches(tokenizer, texts, batch_tokens, max_length):
            batch = pad_and_label(
                [([*ids, 0], len(ids)) for ids in rows]
            )  # the last token of a padded text is not fed
            real = batch.attention_mask.bool()
            for name, (keys, _) in read_layers(model, modules, batch).items():
                real_keys = keys[real.to(keys.device)].float()
                sums[name].addmm_(real_keys.T, real_keys)
            tokens += int(real.sum())
            bar.update(len(rows))
    if not tokens:
        raise ValueError("the texts have no token; pass the corpus that the keys are measured on")
    moments = {name: total / tokens for name, total in sums.items()}
    bad = [name for name, moment in moments.items() if not torch.isfinite(moment).all()]
    if bad:
        raise BackboneError(
            f"the keys of {bad[0]} are not finite; check the backbone's weights for NaN, or load it in bf16 or fp32"
        )
    return moments, tokens


def _batches(tokenizer: Any, texts: Iterable[str], batch_tokens: int, max_length: int) -> Iterator[list[list[int]]]:
    """Cut the corpus into batches of texts of like lengths, `batch_tokens` tokens at most with their padding."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, CHUNK)):
        rows = [ids for ids in tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"] if ids]
        batch: list[list[int]] = []
        for ids in sorted(rows, key=len):
            if batch and (len(batch) + 1) * len(ids) > batch_tokens:
                yield batch
                batch = []
            batch.append(ids)
        if batch:
            yield batch
