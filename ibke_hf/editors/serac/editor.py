"""How SERAC edits: a scope classifier and a counterfactual model read the requests of a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ...core.adapter_files import publisher
from ...core.configuration_ibke import Mode, require_mode
from ...core.edit_values import describe, described, require_length
from ...core.editor_model import EditorModel
from ...core.forward import evaluating, last_states, target_logits
from ...core.layers import BackboneError
from ...core.records import EditRequest
from ...core.tokens import IGNORED, RequestError, TokenBatch, context_length, encode
from .config import SERACConfig, body, plain_config, small_config, vocabulary
from .memory import Entry, SERACEdit, memory_of


@dataclass(frozen=True)
class ScopesAndAnswers:
    """What :meth:`SERACEditor.forward` returns.

    Attributes:
        scopes: (p, m) logit of being in scope of each of m requests, at the p judged positions, case after case.
        answers: (q, vocabulary) logits of the counterfactual model at the judged positions of the pairs, pair after
            pair.
    """

    scopes: Tensor
    answers: Tensor


class SERACEditor(EditorModel):
    """Semi-parametric editing with a retrieval-augmented counterfactual model."""

    config_class = SERACConfig
    config: SERACConfig
    main_input_name = "cases"
    supports_independent = True
    is_calibrated = True  # nothing is measured before training
    card_summary = (
        "a memory of edit requests, a classifier of what they bear on, and a small model that answers it in its place."
    )

    def __init__(self, config: SERACConfig) -> None:
        super().__init__(config)
        if not config.scope_model or not config.counterfactual_model:
            raise ValueError(
                "the config names no scope_model and counterfactual_model; use SERACEditor.for_backbone(model)"
            )
        scope = AutoConfig.for_model(**config.scope_model)
        width = int(scope.get_text_config().hidden_size)
        self.scope = AutoModel.from_config(scope)
        self.project = nn.Linear(2 * width, config.embedding_dim if config.scope_form == "embedding" else 1)
        if config.scope_form == "embedding":
            self.bias, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.counterfactual = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.counterfactual_model))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.project:
            nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
            nn.init.zeros_(self.project.bias)
        elif module is self and self.config.scope_form == "embedding":
            nn.init.constant_(self.bias, 2.0)
            nn.init.constant_(self.log_scale, 1.0)

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def for_backbone(
        cls,
        model: Any,
        layers: Sequence[int] | None = None,
        *,
        scope: Any = None,
        counterfactual: Any = None,
        **config: Any,
    ) -> SERACEditor:
        """Build an untrained editor for a model.

        Args:
            model: Any decoder of the transformers library.
            layers: None, SERAC edits no layer.
            scope: A causal decoder with the backbone's tokens whose body the scope classifier starts from (it is
                copied); by default a small one with random weights.
            counterfactual: A causal decoder with the backbone's tokens that the counterfactual model starts from,
                likewise. A small backbone may serve for both.
            config: Further fields of :class:`SERACConfig`.

        Raises:
            ValueError: If layers are given.
            BackboneError: If a given decoder has another vocabulary.
        """
        if layers is not None:
            raise ValueError(f"SERAC edits no layer, found layers={list(layers)}; leave layers out")
        starts = {"scope_model": scope, "counterfactual_model": counterfactual}
        for name, start in starts.items():
            if start is not None and vocabulary(start) != vocabulary(model):
                raise BackboneError(
                    f"{name} predicts {vocabulary(start)} tokens, the backbone {vocabulary(model)}; they must "
                    f"share one "
                    "tokenizer"
                )
        models = {
            name: small_config(model) if start is None else plain_config(start) for name, start in starts.items()
        }
        end = model.config.get_text_config().eos_token_id
        fields = {
            "base_model_name_or_path": model.config.name_or_path,
            "separator": int((end[0] if isinstance(end, list) else end) or 0),
            **models,
        }
        editor = cls(SERACConfig(**{**fields, **config}))
        if scope is not None:
            editor.scope.load_state_dict(body(scope).state_dict())
        if counterfactual is not None:
            editor.counterfactual.load_state_dict(counterfactual.state_dict())
        return editor

    def modules_of(self, model: Any) -> dict[str, nn.Module]:
        """Return the edited layers of a backbone, of which there are none.

        Raises:
            BackboneError: If the backbone has another vocabulary than the counterfactual model.
        """
        if vocabulary(model) != vocabulary(self.counterfactual):
            raise BackboneError(
                f"this editor was built for {self.config.base_model_name_or_path or 'a backbone'} with "
                f"{vocabulary(self.counterfactual)} tokens; the given model has {vocabulary(model)}"
            )
        self.warn_of_other_backbone(model)
        return {}

    # --- pure ---------------------------------------------------------------------------------------------------

    def forward(
        self, requests: Sequence[Sequence[int]], cases: TokenBatch, pairs: Sequence[tuple[int, int]]
    ) -> ScopesAndAnswers:
        """Score every case against every request, and answer some cases by a request each.

        Args:
            requests: Token ids of m requests, prompt and target.
            cases: Left-padded cases; their labels say which positions are judged.
            pairs: Case and request, by index, of what the counterfactual model answers.
        """
        answers = self.answers([requests[request] for _, request in pairs], cases[[case for case, _ in pairs]])
        return ScopesAndAnswers(self.scopes(self.embed_requests(requests), requests, cases), answers)

    def embed_requests(self, requests: Sequence[Sequence[int]]) -> Tensor | None:
        """Return φ of the requests (m, embedding_dim), None where the classifier reads pairs."""
        if self.config.scope_form != "embedding":
            return None
        return self._features(_left_padded(requests))[:, -1]

    def scopes(self, embedded: Tensor | None, requests: Sequence[Sequence[int]], cases: TokenBatch) -> Tensor:
        """Logit of being in scope of each request at each judged position, case after case: (p, m).

        The position sees what is before it and itself, nothing after.
        """
        if embedded is not None:
            embedded_cases = self._features(cases)[(cases.labels != IGNORED).to(embedded.device)]
            distances = (
                torch.cdist(embedded_cases, embedded, compute_mode="donot_use_mm_for_euclid_dist").square()
                / embedded_cases.shape[-1]
            )
            return self.bias - self.log_scale.exp() * distances
        every = [(case, request) for case in range(len(cases)) for request in range(len(requests))]
        read = self._reading([requests[request] for _, request in every], cases[[case for case, _ in every]])
        scores = (
            self._features(read).squeeze(-1)[:, -cases.labels.shape[1] :].unflatten(0, (len(cases), len(requests)))
        )
        return scores.transpose(1, 2)[(cases.labels != IGNORED).to(scores.device)]

    def answers(self, requests: Sequence[Sequence[int]], cases: TokenBatch) -> Tensor:
        """Logits (q, vocabulary) at the judged positions of cases, each read after a request of its own."""
        if not requests:
            return torch.zeros(0, vocabulary(self.counterfactual), device=self.device)
        logits, labels = target_logits(self.counterfactual, self._reading(requests, cases))
        return logits[labels != IGNORED]

    def _reading(self, requests: Sequence[Sequence[int]], cases: TokenBatch) -> TokenBatch:
        """Put request and separator before each left-padded case, which stays in the last columns.

        What is longer than the readers' context loses the beginning of the request, never of the case.
        """
        separator = self.config.separator
        width, limits = (
            cases.input_ids.shape[1],
            [context_length(model) for model in (self.scope, self.counterfactual)],
        )
        limit = min((limit for limit in limits if limit is not None), default=None)
        rows, marks = [], []
        for request, ids, mask, labels in zip(
            requests, cases.input_ids, cases.attention_mask.bool(), cases.labels, strict=True
        ):
            case_ids = ids[mask].tolist()
            room = len(request) + 1 if limit is None else max(limit - len(case_ids), 0)
            rows.append([*request, separator][-room:] * (room > 0) + case_ids)
            marks.append(labels)
        read = _left_padded(rows, at_least=width)
        read.labels[:, -width:] = torch.stack(marks).to(read.labels.device)
        return read

    def _features(self, batch: TokenBatch) -> Tensor:
        """Project each token's state beside the mean state so far: (b, l) -> (b, l, embedding_dim or 1), fp32."""
        batch = batch.to(self.device)
        mask = batch.attention_mask.unsqueeze(-1)
        states = last_states(self.scope, batch)
        means = (states * mask).float().cumsum(1) / mask.cumsum(1).clamp(min=1)
        return self.project(torch.cat((states, means.to(states.dtype)), -1)).float()

    # --- with a backbone ----------------------------------------------------------------------------------------

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: SERACEdit | None = None,
    ) -> SERACEdit:
        """Return the memory that makes the model answer the requests, see :class:`~ibke_hf.core.edit_values.Editor`.

        The model is not run. In joint and in sequential mode there is one memory, of all requests, of which the newest
        of one prompt counts.
        """
        require_mode(mode)
        if not requests:
            raise RequestError("no edit request was given; pass at least one EditRequest(prompt, target)")
        limit = context_length(model)
        entries: list[Entry] = [
            encode(tokenizer, r.prompt, r.target, name=f"request {i}", max_length=limit, prompt_format=r.format)
            for i, r in enumerate(requests)
        ]
        rows = [[entry] for entry in entries] if mode == "independent" else [entries]
        if previous is not None and not isinstance(previous, SERACEdit):
            raise ValueError(
                f"previous must be a memory of SERAC, found a {type(previous).__name__}; attach the other edit "
                f"outside of it"
            )
        if previous is not None:
            require_length(previous, len(rows))
        carried = [[]] * len(rows) if previous is None else previous.entries()
        carried = carried * len(rows) if len(carried) == 1 else carried
        info = describe(
            model,
            self.modules_of(model),
            requests,
            editor=self.config.name_or_path or type(self).__name__,
            backbone=self.config.base_model_name_or_path,
        )
        edit = SERACEdit(memory_of([old + new for old, new in zip(carried, rows, strict=True)]), {}, info, self)
        return described(edit, info, previous)

    @torch.no_grad()
    def remember(self, entries: Sequence[Entry]) -> Tensor | None:
        """Return the embedded requests of memories, for :meth:`decide`."""
        with evaluating(self):
            return self.embed_requests([ids for ids, _ in entries])

    @torch.no_grad()
    def decide(
        self, embedded: Tensor | None, entries: Sequence[Entry], owners: Tensor, cases: TokenBatch, rows: Tensor
    ) -> Tensor:
        """Return the entry that each judged position is in scope of, -1 for none: (p,).

        The entry of the highest probability counts, if this reaches the threshold; the newer of two equal ones.

        Args:
            embedded: What :meth:`remember` returns.
            entries: Entries of all memories.
            owners: (entries,) memory that each belongs to.
            cases: Left-padded cases.
            rows: (b,) memory that each case looks into.
        """
        requests = [ids for ids, _ in entries]
        judged = (cases.labels != IGNORED).nonzero()[:, 0]
        foreign = owners.unsqueeze(0) != rows[judged].unsqueeze(1)
        with evaluating(self):
            if embedded is not None or not foreign.any():
                scores = self.scopes(embedded, requests, cases)
            else:  # pairs are dear: read no case with what is not in its memory
                scores = torch.zeros(len(judged), len(entries), device=self.device)
                for case, memory in enumerate(rows.tolist()):
                    entries_of_case = (owners == memory).nonzero().flatten()
                    here = (judged == case).nonzero()
                    scores[here, entries_of_case] = self.scopes(
                        None, [requests[k] for k in entries_of_case.tolist()], cases[case : case + 1]
                    )
        scores = scores.sigmoid().masked_fill(foreign.to(scores.device), -1.0)
        entry = scores.shape[-1] - 1 - scores.flip(-1).argmax(-1)
        reached = scores.gather(-1, entry.unsqueeze(-1)).squeeze(-1) >= self.config.threshold
        return torch.where(reached, entry, -1)

    @torch.no_grad()
    def answer(self, entries: Sequence[Entry], cases: TokenBatch) -> Tensor:
        """Return the counterfactual model's logits at the judged positions of cases, each read after its own entry."""
        with evaluating(self):
            return self.answers([ids for ids, _ in entries], cases)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Publish weights, config, card and results in one commit; options: :func:`ibke_hf.hub.push.push_editor`."""
        return publisher().push_editor(self, repo_id, **options)


def _left_padded(rows: Sequence[Sequence[int]], at_least: int = 0) -> TokenBatch:
    """Pad token ids on the left; nothing is judged."""
    width = max(at_least, *map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return TokenBatch(ids, mask, torch.full_like(ids, IGNORED))


AutoConfig.register("serac", SERACConfig, exist_ok=True)
AutoModel.register(SERACConfig, SERACEditor, exist_ok=True)
