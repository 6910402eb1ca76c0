"""Training of a router (`ibke train-router`): prompts near the requests that they are about, far from the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..core.configuration_ibke import require_range
from ..core.records import EditRecord
from ..core.tokens import TokenBatch, context_length
from ..io import write_json
from ..lifelong.reading import Sources, read_states
from ..lifelong.router import Router
from .checkpoints import last_complete_checkpoint
from .router_batches import NONE, RoutedRecord, RouterBatch, RouterBatches, batch_of, padded, routed_records

logger = logging.get_logger(__name__)
CHECKPOINTS, LOG = "checkpoints", "log.json"
NEVER = -1e4  # logit of a request that is neither right nor wrong
ROOM = 2 << 30  # bytes of states that are kept while a router is trained
READ_AT_ONCE = 32  # texts of a forward pass when nothing is learnt
THRESHOLDS = 81  # tried between -1 and 1


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained.

    Args:
        steps: Steps; a few hundred suffice.
        records: Records of a batch, each with the prompts that are about it and some that are not.
        candidates: Further requests of a batch, to tell apart from.
        learning_rate: At its highest, after a tenth of the steps.
        seed: Of weights and batches.
        save_steps: Steps between checkpoints.
        width: See :class:`~ibke_hf.lifelong.router.RouterConfig`, as of the others.
    """

    steps: int = 600
    records: int = 32
    candidates: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    save_steps: int = 100
    width: int = 256
    dim: int = 256
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what is out of range; names the field."""
        for name, low in (("steps", 1), ("records", 2), ("candidates", 0), ("save_steps", 1), ("seed", 0)):
            require_range(self, name, low, 2**31 - 1)
        require_range(self, "learning_rate", 1e-8, 1.0)


class StateCache:
    """What a backbone computes of texts, kept in 16 bit: the same prompts come again and again.

    Args:
        backbone: The model.
        sources: What is read of it.
        room: Bytes; texts that do not fit are computed every time.
    """

    def __init__(self, backbone: Any, sources: Sources, room: int = ROOM) -> None:
        self.backbone, self.sources, self.room = backbone, sources, room
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def read(self, batch: TokenBatch) -> tuple[list[Tensor], Tensor]:
        """Return the states (b, l, d) at each source and the mask (b, l), as :func:`read_states` does."""
        mask = batch.attention_mask.bool()
        texts = [tuple(ids[real].tolist()) for ids, real in zip(batch.input_ids, mask, strict=True)]
        rows = {text: self._kept[text] for text in texts if text in self._kept}
        missing = sorted((text for text in dict.fromkeys(texts) if text not in rows), key=len)
        for start in range(0, len(missing), READ_AT_ONCE):  # texts of like lengths pad each other less
            some = missing[start : start + READ_AT_ONCE]
            states, real = read_states(self.backbone, self.sources, padded(some))
            for text, row, kept in zip(some, torch.cat(states, -1).half().cpu(), real.cpu(), strict=True):
                rows[text] = row[kept]
                if rows[text].nbytes <= self.room:
                    self.room -= rows[text].nbytes
                    self._kept[text] = rows[text]
        whole = torch.zeros(*mask.shape, sum(self.sources.dims))
        for place, text in enumerate(texts):
            whole[place, mask[place]] = rows[text].float()
        return list(whole.split(list(self.sources.dims), -1)), mask


class RouterTrainer(Trainer):
    """A `transformers.Trainer` whose model is the router; the backbone is held beside it and never changed."""

    def __init__(self, router: Router, backbone: Any, args: TrainingArguments, batches: RouterBatches) -> None:
        super().__init__(router, args, train_dataset=batches, data_collator=lambda batch: {"batch": batch[0]})
        self.cache = StateCache(backbone, router.sources)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        """Return the loss of one batch of prompts and requests."""
        router = self.accelerator.unwrap_model(model)
        batch: RouterBatch = inputs["batch"]
        prompts, requests = (
            router(*self._read(router, texts), requests=is_request)
            for texts, is_request in ((batch.prompts, False), (batch.requests, True))
        )
        loss = routing_loss(router, prompts, requests, batch.owner, batch.ignored)
        return (loss, {}) if return_outputs else loss

    def _read(self, router: Router, batch: TokenBatch) -> tuple[list[Tensor], Tensor]:
        states, mask = self.cache.read(batch)
        device = router.log_scale.device
        return [state.to(device) for state in states], mask.to(device)


def vectors_of(router: Router, backbone: Any, batch: TokenBatch, *, requests: bool = False) -> Tensor:
    """Return the vectors (b, dim) of texts, with a graph of the router where gradients are on."""
    states, mask = read_states(backbone, router.sources, batch)
    device = router.log_scale.device
    vectors: Tensor = router([state.to(device) for state in states], mask.to(device), requests=requests)
    return vectors


def routing_loss(router: Router, prompts: Tensor, requests: Tensor, owner: Tensor, ignored: Tensor) -> Tensor:
    """Return the cross-entropy of the choice between all requests and none.

    Args:
        router: Its scale and the similarity that stands for none.
        prompts: (q, dim).
        requests: (r, dim).
        owner: (q,) the right request, -1 for none.
        ignored: (q, r) of bool: requests that are neither right nor wrong.
    """
    similarities = prompts @ requests.T
    kept = similarities.masked_fill(ignored.to(similarities.device), NEVER)
    logits = torch.cat([kept, router.none.expand(len(prompts), 1)], 1) * router.log_scale.exp()
    right = torch.where(owner == NONE, torch.full_like(owner, len(requests)), owner).to(logits.device)
    return functional.cross_entropy(logits, right)


def train_router(
    backbone: Any,
    tokenizer: Any,
    layers: Sequence[str],
    records: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    out: str | Path,
    settings: RouterTraining | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a router of the editors of some layers, choose its threshold, and save both with a log.

    Args:
        backbone: The model that is edited.
        tokenizer: Its tokenizer.
        layers: Names of the layers that editors of it edit.
        records: A record's requests and generality prompts belong to it, its locality prompts to none.
        validation: Held-out records, on which the threshold is chosen.
        out: Folder of the router; checkpoints lie in a sub-folder until the end.
        settings: See :class:`RouterTraining`.
        resume: Go on from the last checkpoint.
        progress: Show a progress bar.

    Returns:
        The report: what is found of validation prompts, by hops, and the threshold.

    Raises:
        ValueError: If there are too few usable records.
        BackboneError: If the model lacks the layers.
    """
    settings, started, target = settings or RouterTraining(), time.monotonic(), Path(out)
    limit = context_length(backbone)
    usable, held_out = (routed_records(tokenizer, part, limit) for part in (records, validation))
    for name, part in (("training", usable), ("validation", held_out)):
        if len({record.key for record in part}) < 2:
            raise ValueError(f"{len(part)} usable {name} records are too few for a router; give at least two facts")
    torch.manual_seed(settings.seed)
    shape = {name: getattr(settings, name) for name in ("width", "dim", "heads", "dropout")}
    router = Router.for_backbone(backbone, layers, **shape)
    batches = RouterBatches(usable, settings.steps, settings.records, settings.seed, settings.candidates)
    trainer = RouterTrainer(router, backbone, _arguments(target / CHECKPOINTS, settings, progress), batches)
    last = last_complete_checkpoint(target / CHECKPOINTS) if resume else None
    trainer.train(resume_from_checkpoint=last)
    router.eval()
    report = choose_threshold(router, backbone, held_out)
    report |= {"minutes": round((time.monotonic() - started) / 60, 1), "parameters": router.num_parameters()}
    router.save_pretrained(target)
    log = {"records": len(usable), "training": vars(settings), "report": report, "history": trainer.state.log_history}
    write_json(target / LOG, log)
    shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    return report


def _arguments(folder: Path, settings: RouterTraining, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,  # an item is a batch
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(settings.steps // 10, 1),
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=max(min(settings.steps // 10, 50), 1),
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        disable_tqdm=not progress,
        report_to=[],
    )


# --- the threshold --------------------------------------------------------------------------------------------------


@torch.no_grad()
def all_vectors(router: Router, backbone: Any, texts: Sequence[Sequence[int]], *, requests: bool = False) -> Tensor:
    """Return the vectors (n, dim) of any number of texts, read with others of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.zeros(len(texts), router.config.dim)
    for start in range(0, len(order), READ_AT_ONCE):
        chosen = order[start : start + READ_AT_ONCE]
        batch = padded([texts[i] for i in chosen])
        rows[chosen] = vectors_of(router, backbone, batch, requests=requests).cpu()
    return rows


def choose_threshold(
    router: Router, backbone: Any, records: Sequence[RoutedRecord], company: Sequence[RoutedRecord] = ()
) -> dict[str, Any]:
    """Set the threshold that does best on records in one library, by the mean of what the kinds of prompts get right.

    Requests, their rephrasings, prompts of several hops, and prompts that are about none of the edits count alike.

    Args:
        router: Its config gets the threshold.
        backbone: The model.
        records: Validation records.
        company: Further records whose requests lie in the same library.

    Returns:
        The shares in percent of each kind at the threshold, and how many prompts there are of it.
    """
    kinds, right, similarity = judged(router, backbone, records, company)
    best: tuple[float, float] = (-1.0, 0.0)
    for threshold in torch.linspace(-1, 1, THRESHOLDS).tolist():
        shares = shares_found(kinds, right, similarity, threshold)
        score = sum(shares.values()) / max(len(shares), 1)
        best = max(best, (score, threshold))
    router.config.threshold = round(best[1], 4)
    shares = shares_found(kinds, right, similarity, router.config.threshold)
    counts = {kind: kinds.count(kind) for kind in shares}
    return {
        "threshold": router.config.threshold,
        "found": shares,
        "prompts": counts,
        "library": len(records) + len(company),
    }


def judged(
    router: Router, backbone: Any, records: Sequence[RoutedRecord], company: Sequence[RoutedRecord] = ()
) -> tuple[list[str], Tensor, Tensor]:
    """Return the kind of each prompt, whether its nearest request is the right one, and its similarity."""
    library = [*records, *company]
    prompts = [(place, one) for place, record in enumerate(records) for one in record.prompts]
    batch = batch_of(library, prompts)
    requests = all_vectors(router, backbone, [record.request for record in library], requests=True)
    asked = all_vectors(router, backbone, [one.ids for _, one in prompts])
    nearest = (asked @ requests.T).masked_fill(batch.ignored, -2.0).max(-1)
    kinds = [_kind(records[place], one) for place, one in prompts]
    return kinds, nearest.indices == batch.owner, nearest.values


def _kind(record: RoutedRecord, asked: Any) -> str:
    if asked is record.prompts[0]:
        return "request"
    if not asked.about:
        return "none"
    return "rephrase" if asked.hops < 2 else "multi-hop"


def shares_found(kinds: Sequence[str], right: Tensor, similarity: Tensor, threshold: float) -> dict[str, float]:
    """Return by kind the share in percent of prompts that get the right edit, or none where none is right."""
    near = similarity > threshold
    correct = torch.tensor(
        [
            not is_near if kind == "none" else is_right and is_near
            for kind, is_right, is_near in zip(kinds, right.tolist(), near.tolist(), strict=True)
        ]
    )
    names = list(dict.fromkeys(kinds))
    mask = {name: torch.tensor([kind == name for kind in kinds]) for name in names}
    return {name: round(100 * correct[mask[name]].float().mean().item(), 1) for name in names}
