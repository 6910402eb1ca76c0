"""What ROME and AlphaEdit do alike: they are built with key statistics, and go through requests by mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.capture import evaluating
from ...core.configuration_ibke import Mode, require_mode
from ...core.edit_values import Edit, describe, described
from ...core.edits import LowRankEdit
from ...core.layers import layers_to_edit, modules_to_edit
from ...core.records import EditRequest
from ...core.tokens import context_length
from .config import LocateConfig
from .key_statistics import KeyStatistics, default_layers
from .prefixes import draw_prefixes
from .texts import SearchTexts, ask, subject_end


class LocatingEditor(ABC):
    """Finds a value that says the target at the subject's last token, and a low-rank edit that puts it there.

    A subclass says in `config_class` and `layers_by_default` what it is built with, and in :meth:`_edit` how it edits.
    """

    supports_independent = True
    config_class: ClassVar[type[LocateConfig]]
    layers_by_default: ClassVar[int]  # how many; the last is at the relative depth of ROME's in GPT-2 XL, 17 of 48

    def __init__(self, config: Any, statistics: KeyStatistics) -> None:
        self.config, self.statistics = config, statistics

    @classmethod
    def for_backbone(
        cls,
        model: Any,
        layers: Sequence[int] | None = None,
        edited_modules: str | None = None,
        *,
        statistics: KeyStatistics,
        **config: Any,
    ) -> Any:
        """Build an editor that fits a model.

        Args:
            model: Any decoder of the transformers library.
            layers: Edited layers; by default `layers_by_default` that end at the relative depth of the paper's, 17 of
                48.
            edited_modules: Name template with ``{i}``; by default the FFN output projection found by structure.
            statistics: Those of the model's keys, see :meth:`KeyStatistics.of`.
            config: Further fields of the config.

        Raises:
            BackboneError: If the layers don't exist, the projection is ambiguous, or the statistics are another
                backbone's.
            ValueError: If a field is out of range, or the statistics lack a layer.
        """
        template, chosen = layers_to_edit(
            model, layers, edited_modules, default=default_layers(model, cls.layers_by_default)
        )
        editor = cls(cls.config_class(template, tuple(chosen), **config), statistics)
        statistics.require(modules_to_edit(model, editor.config.module_names()))
        return editor

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: Edit | None = None,
    ) -> LowRankEdit:
        """Return the edit that makes the model answer the requests, see :class:`~ibke_hf.core.edit_values.Editor`.

        It has one rank for each request. In joint mode it is one update of all requests, whose keys and values are
        found on the model as it is. `previous` is low-rank.

        Raises:
            RequestError: Also if a request has no subject.
            BackboneError: Also if the statistics are another backbone's.
            ValueError: Also if the statistics admit no update.
        """
        check_call(mode, len(requests), previous)
        modules = modules_to_edit(model, self.config.module_names())
        self.statistics.require(modules)
        info = describe(model, modules, requests, editor=type(self).__name__)
        with torch.inference_mode(False), evaluating(model):
            texts = question_requests(model, tokenizer, requests, self.config, self.statistics.openings)
            names = [f"request {k}" for k in range(len(requests))]
            if mode != "sequential":
                joint = mode == "joint"
                return described(self._edit(model, modules, texts, previous, names, joint=joint), info, previous)
            edit: Any = previous
            for k, name in enumerate(names):
                edit = self._edit(model, modules, texts.only(k), edit, [name], joint=True)
        return described(edit, info, previous)

    @staticmethod
    def check_request(request: EditRequest, name: str) -> None:
        """Check a request before any is edited.

        Raises:
            RequestError: If it has no subject, or its prompt does not mention it.
        """
        subject_end(request, name)

    @abstractmethod
    def _edit(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        texts: SearchTexts,
        previous: Any,
        names: Sequence[str],
        *,
        joint: bool,
    ) -> LowRankEdit:
        """Edit all requests on the model with `previous`, which the result contains: one update, or one each."""


def check_call(mode: Mode, number: int, previous: Edit | None) -> None:
    """Check the mode and what the model carries already.

    Raises:
        ValueError: If the mode does not exist, or `previous` is not low-rank or of a length that does not fit.
    """
    require_mode(mode)
    if previous is None:
        return
    if not isinstance(previous, LowRankEdit):
        raise ValueError(
            f"previous must be a LowRankEdit, which the result can contain, found {type(previous).__name__}"
        )
    if len(previous) != 1 and (mode != "independent" or len(previous) != number):
        raise ValueError(
            f'previous holds {len(previous)} independent edits, which needs mode="independent" and as many requests, '
            f"found mode={mode!r} and {number} requests"
        )


def question_requests(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], config: LocateConfig, openings: Sequence[str]
) -> SearchTexts:
    """Tokenise requests behind random prefixes; first without, so that an unusable request costs nothing."""
    limit = context_length(model)
    ask(tokenizer, requests, (), config.essence, limit)
    return ask(tokenizer, requests, draw_prefixes(model, tokenizer, config, openings), config.essence, limit)
