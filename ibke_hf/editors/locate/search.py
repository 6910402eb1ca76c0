"""What ROME and AlphaEdit share: a subject's last token, its key there, and the value that makes the model say the target."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import LayerHook, hooked
from ...core.capture import case_losses, graph_starting_at, require_finite, target_logits
from ...core.configuration_ibke import require_range
from ...core.edit_values import Edit
from ...core.layers import plain_name
from ...core.records import EditRequest
from ...core.tokens import RequestError, TokenBatch, encode, encode_prompt, pad_and_label, with_leading_space
from .key_statistics import hidden_of, read_layers

HIDDEN = "hidden states"  # names the last edited block among modules that are read


@dataclass(frozen=True)
class LocateConfig:
    """Hyper-parameters of the search for a value.

    What depends on a model's scale is relative to ‖h‖, the hidden states after the edited layer's block at the
    subject: the change δ has to be seen beside them. Adam's step of 0.2 of their root mean square is the papers' 0.5
    where that is 2.5.

    Args:
        edited_modules: Name template of the edited projections, ``{i}`` standing for the layer.
        edited_layers: Indices of the edited layers.
        steps: Adam steps at most.
        learning_rate: Adam's step, relative to the root mean square of h.
        weight_decay: Weight of (‖δ‖ / ‖h‖)² in the objective.
        clamp: Largest ‖δ‖ / ‖h‖.
        kl_factor: Weight of the divergence on the essence prompt; 0 leaves it out.
        essence: The essence prompt, ``{}`` standing for the subject.
        stop_below: A request whose objective is below this is done.
        prefixes: Number of random texts that are put in front of the prompt, beside the bare prompt; 0 for none.
        prefix_tokens: Least and largest number of tokens of a prefix.
        prefix_source: ``"model"``: sampled from the model; ``"corpus"``: beginnings of texts of the key statistics'
            corpus.
        seed: Seeds the prefixes.
        texts_at_once: Texts of a forward pass: what bounds memory.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_modules: str
    edited_layers: tuple[int, ...]
    steps: int = 20
    learning_rate: float = 0.2
    weight_decay: float = 1.5e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    essence: str = "{} is a"
    stop_below: float = 0.05
    prefixes: int = 20
    prefix_tokens: tuple[int, int] = (2, 10)
    prefix_source: str = "model"
    seed: int = 0
    texts_at_once: int = 256
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        if (
            not self.edited_layers
            or "{i}" not in self.edited_modules
            or len(set(self.edited_layers)) < len(self.edited_layers)
        ):
            found = f"{self.edited_layers} and {self.edited_modules!r}"
            raise ValueError(
                f"edited_layers must be different layers, edited_modules must have {{i}} for their index, found "
                f"{found}"
            )
        for name, low, high in (
            ("steps", 1, 100_000),
            ("learning_rate", 0.0, 100.0),
            ("weight_decay", 0.0, 1e6),
            ("clamp", 0.0, 1e6),
            ("kl_factor", 0.0, 1e6),
            ("stop_below", 0.0, 100.0),
            ("prefixes", 0, 10_000),
            ("texts_at_once", 1, 1_000_000),
            ("loss_scale", 1e-8, 1e8),
        ):
            require_range(self, name, low, high)
        low, high = self.prefix_tokens
        if not 1 <= low <= high <= 1000:
            raise ValueError(
                f"prefix_tokens must be (least, largest) with 1 <= least <= largest <= 1000, found "
                f"{self.prefix_tokens}"
            )
        if self.prefix_source not in ("model", "corpus"):
            raise ValueError(f"prefix_source must be model or corpus, found {self.prefix_source!r}")
        if "{}" not in self.essence:
            raise ValueError(f"essence must have {{}} in place of the subject, found {self.essence!r}")

    def module_names(self) -> list[str]:
        """Return the full names of the edited projections, the lowest layer first."""
        return [self.edited_modules.format(i=i) for i in sorted(self.edited_layers)]


# --- texts with a subject ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubjectTexts:
    """Texts of some requests, each with the place of its subject.

    Attributes:
        batch: t texts, left-padded.
        subjects: (t,) column of the subject's last token, counted from the right edge: -1 is the last column.
        owners: (t,) index of the request that each text belongs to, ascending.
        number: n, how many requests there are.
    """

    batch: TokenBatch
    subjects: Tensor
    owners: Tensor
    number: int

    def only(self, request: int) -> SubjectTexts:
        """Return the texts of one request."""
        rows = self.owners == request
        return SubjectTexts(self.batch[rows].trimmed(), self.subjects[rows], torch.zeros_like(self.owners[rows]), 1)

    def where(self, wanted: Tensor) -> SubjectTexts:
        """Return the texts of the requests that `wanted` (n,) is True for; the requests keep their numbers."""
        rows = wanted[self.owners]
        return (
            self
            if bool(rows.all())
            else SubjectTexts(self.batch[rows], self.subjects[rows], self.owners[rows], self.number)
        )

    def parts(self, size: int) -> Iterator[SubjectTexts]:
        """Cut into lots of at most `size` texts, in order."""
        for start in range(0, len(self.owners), size):
            rows = slice(start, start + size)
            yield SubjectTexts(self.batch[rows].trimmed(), self.subjects[rows], self.owners[rows], self.number)

    def columns(self) -> Tensor:
        """Mark each text's subject: (t, l) bool."""
        width = self.batch.input_ids.shape[1]
        return torch.arange(width) == (width + self.subjects).unsqueeze(1)

    def mean(self, values: Tensor) -> Tensor:
        """Average values (t, …) over the texts of each request -> (n, …)."""
        owners = self.owners.to(values.device)
        total = torch.zeros(self.number, *values.shape[1:], dtype=values.dtype, device=values.device).index_add(
            0, owners, values
        )
        counts = torch.bincount(owners, minlength=self.number).clamp(min=1)
        return total / counts.reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True)
class SearchTexts:
    """The requests behind every prefix, and the essence prompts of their subjects."""

    requests: SubjectTexts
    essences: SubjectTexts

    def only(self, request: int) -> SearchTexts:
        """Return those of one request."""
        return SearchTexts(self.requests.only(request), self.essences.only(request))


def ask(
    tokenizer: Any, requests: Sequence[EditRequest], prefixes: Sequence[str], essence: str, max_length: int | None
) -> SearchTexts:
    """Tokenise requests, bare and behind each prefix that leaves room for them, and their essence prompts.

    Raises:
        RequestError: If a request is unusable or its subject is missing; names it by its index.
    """
    if not requests:
        raise RequestError("no edit request was given; pass at least one EditRequest(prompt, target, subject)")
    texts: list[tuple[list[int], int]] = []
    places: list[tuple[int, int]] = []  # request, subject from the right
    essences, essence_places = [], []
    for k, request in enumerate(requests):
        name = f"request {k}"
        end = subject_end(request, name)
        for prefix in ("", *prefixes):
            ids, start = encode(
                tokenizer,
                prefix + request.prompt,
                request.target,
                name=name,
                max_length=None if prefix else max_length,
            )
            if prefix and max_length is not None and len(ids) - 1 > max_length:
                continue
            text = prefix + request.prompt + with_leading_space(request.target)
            texts.append((ids, start))
            places.append((k, min(_token_at(tokenizer, text, len(prefix) + end), start - 1) - (len(ids) - 1)))
        subject = str(request.subject).strip()
        text = essence.format(subject)
        ids = encode_prompt(tokenizer, text)
        essences.append(([*ids, 0], len(ids)))  # the last token of a padded text is not fed
        essence_places.append((k, _token_at(tokenizer, text, text.index(subject) + len(subject)) - len(ids)))
    return SearchTexts(
        _subject_texts(texts, places, len(requests)), _subject_texts(essences, essence_places, len(requests))
    )


def _subject_texts(
    texts: Sequence[tuple[list[int], int]], places: Sequence[tuple[int, int]], number: int
) -> SubjectTexts:
    owners, subjects = torch.tensor(places).unbind(1)
    return SubjectTexts(pad_and_label(texts), subjects, owners, number)


def subject_end(request: EditRequest, name: str) -> int:
    """Return where the subject ends in the prompt, in characters: its last mention, as whole words if there is one.

    Raises:
        RequestError: If the request has no subject or the prompt does not mention it.
    """
    subject = (request.subject or "").strip()
    if not subject:
        raise RequestError(
            f"{name}: it has no subject; pass EditRequest(prompt, target, subject) with the entity that the "
            f"prompt is about"
        )
    plain = re.escape(subject)
    for pattern, flags in ((rf"(?<!\w){plain}(?!\w)", 0), (plain, 0), (plain, re.IGNORECASE)):
        found = list(re.finditer(pattern, request.prompt, flags))
        if found:
            return found[-1].end()
    raise RequestError(
        f"{name}: the subject {subject!r} is not in the prompt {request.prompt!r}; give it as the prompt spells it"
    )


def _token_at(tokenizer: Any, text: str, end: int) -> int:
    """Index of the token that holds the character before `end`."""
    if not tokenizer.is_fast:
        return len(encode_prompt(tokenizer, text[:end])) - 1
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max((i for i, (first, last) in enumerate(offsets) if first < end and first < last), default=0)


# --- reading and optimising -------------------------------------------------------------------------------------------


@contextmanager
def carrying(model: Any, edits: Sequence[Edit], rows: Tensor) -> Iterator[None]:
    """Attach edits, those of several rows by the given rows."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.attached(model, rows))
        yield


@dataclass(frozen=True)
class State:
    """A module at the subjects' last tokens, averaged over the texts of each request (Meng et al. 2022, Eq. 3), fp32.

    Attributes:
        inputs: (n, d_in); of an FFN output projection the keys.
        outputs: (n, d_out).
        norms: Mean ‖output‖ (n,).
    """

    inputs: Tensor
    outputs: Tensor
    norms: Tensor


def read_states(
    model: Any, modules: Mapping[str, nn.Module], asked: SubjectTexts, edits: Sequence[Edit], texts_at_once: int
) -> dict[str, State]:
    """Read modules at the subjects' last tokens, on the model that carries the edits."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    for part in asked.parts(texts_at_once):
        with carrying(model, edits, part.owners):
            read = read_layers(model, modules, part.batch)
        columns = part.columns()
        for name, tensors in read.items():
            inputs, outputs = (tensor[columns.to(tensor.device)].float() for tensor in tensors)
            found[name].append((inputs, outputs))
    states = {}
    for name, pairs in found.items():
        inputs, outputs = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        states[name] = State(asked.mean(inputs), asked.mean(outputs), asked.mean(outputs.norm(dim=-1)))
    return states


class ValueSearch:
    """Optimises a change δ (n, d) of a module's output at the subjects' last tokens, one for each request.

    It minimises, over the texts x_j + p of a request, the mean of -log P[target | x_j + p], plus the divergence of the
    next token after the essence prompt from the unedited model's (Meng et al. 2022, Eq. 4), plus weight decay.
    Requests do not influence each other.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        texts: SearchTexts,
        config: LocateConfig,
        edits: Sequence[Edit],
        names: Sequence[str],
    ) -> None:
        self.model, self.module, self.texts, self.config, self.edits, self.names = (
            model,
            module,
            texts,
            config,
            edits,
            names,
        )
        self.essence_logs: dict[
            int, Tensor
        ] = {}  # log-probabilities after the essence prompt of each request, before the edit

    def run(self, norms: Tensor, width: int) -> Tensor:
        """Return δ (n, d) in fp32.

        Args:
            norms: ‖h‖ of each request (n,), which steps and limits are relative to.
            width: d, of the module's output.

        Raises:
            NonFiniteError: If the objective is not finite for a request; names it.
        """
        config = self.config
        unit = (norms / math.sqrt(width)).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        change = torch.zeros(len(norms), width, device=norms.device, requires_grad=True)  # in units of h's RMS
        best, lowest = change.detach().clone(), torch.full_like(norms, torch.inf)
        optimizer = torch.optim.Adam([change], lr=config.learning_rate)
        for _ in range(config.steps + 1):
            now = change.detach()
            losses, gradient = self.objective(now * unit, searched=lowest >= config.stop_below)
            losses = losses + config.weight_decay * now.square().mean(-1)
            require_finite(losses, "the objective of the value", self.names)
            better = (losses < lowest) & (lowest >= config.stop_below)  # a request that is done stays as it is
            best[better], lowest[better] = now[better], losses[better]
            if (lowest < config.stop_below).all():
                break
            change.grad = gradient * unit + config.weight_decay * 2 / width * now
            optimizer.step()
            with torch.no_grad():
                limit = config.clamp * math.sqrt(width)
                change.mul_(limit / change.norm(dim=-1, keepdim=True).clamp(min=limit or 1.0))
        return best * unit

    def objective(self, change: Tensor, searched: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the objective without weight decay of each request (n,), and its gradient (n, d), both in fp32.

        Where `searched` (n,) is given, requests that it is False for cost nothing, and get zeros.
        """
        wanted = torch.ones(len(change), dtype=torch.bool) if searched is None else searched.cpu()
        asked, essences = (texts.where(wanted) for texts in (self.texts.requests, self.texts.essences))
        losses, gradient = torch.zeros(len(change), device=change.device), torch.zeros_like(change)
        shares = 1 / torch.bincount(asked.owners, minlength=len(change))
        for part in asked.parts(self.config.texts_at_once):
            weights = shares[part.owners].to(change.device)
            self._add(
                change,
                part,
                lambda logits, labels, w=weights: case_losses(logits, labels) * w.to(logits.device),
                losses,
                gradient,
            )
        if self.config.kl_factor:
            for part in essences.parts(self.config.texts_at_once):
                owners = part.owners.tolist()
                self._add(
                    change, part, lambda logits, _, own=owners: self._divergence(own, logits[:, -1]), losses, gradient
                )
        return losses, gradient

    def _divergence(self, owners: Sequence[int], logits: Tensor) -> Tensor:
        """KL of the next token with the edit from that without it, (b, vocabulary) -> (b,), times its factor."""
        logs = logits.float().log_softmax(-1)
        before = torch.stack(
            [self.essence_logs.setdefault(k, row) for k, row in zip(owners, logs.detach(), strict=True)]
        )  # at δ = 0
        return self.config.kl_factor * (logs.exp() * (logs - before)).sum(-1)

    def _add(self, change: Tensor, part: SubjectTexts, loss: Any, losses: Tensor, gradient: Tensor) -> None:
        """Add the losses of some texts to those of their requests, and the gradient likewise; the graph starts at the module."""
        leaf = change[part.owners.to(change.device)].requires_grad_(True)
        modules = {"value": self.module}
        with (
            torch.no_grad(),
            carrying(self.model, self.edits, part.owners),
            graph_starting_at(modules),
            hooked(modules, {"value": _adding(leaf, part.columns())}),
        ):
            found = loss(*target_logits(self.model, part.batch))
            (slope,) = torch.autograd.grad(found.sum() * self.config.loss_scale, [leaf])
        owners = part.owners.to(change.device)
        losses.index_add_(0, owners, found.detach().to(losses.device))
        gradient.index_add_(0, owners, slope / self.config.loss_scale)


def _adding(change: Tensor, columns: Tensor) -> LayerHook:
    """Add a change (b, d) to the output at the marked columns (b, l), in fp32."""

    def add(_: Tensor, output: Any) -> Any:
        hidden = hidden_of(output)
        extra = columns.to(hidden.device).unsqueeze(-1) * change.to(hidden.device).unsqueeze(1)
        hidden = (hidden + extra.reshape(hidden.shape)).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add


# --- small things --------------------------------------------------------------------------------------------------------


def last_block(model: Any, config: LocateConfig) -> nn.Module:
    """Return the decoder block of the last edited layer."""
    template = config.edited_modules
    name = template[: template.index("{i}") + 3].format(i=max(config.edited_layers))
    return next(module for path, module in model.named_modules() if plain_name(path) == name)


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in fp64, on the CPU where its device has none."""
    return tensor.to(device="cpu" if tensor.device.type == "mps" else tensor.device, dtype=torch.float64)
