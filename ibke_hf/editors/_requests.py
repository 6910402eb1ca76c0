"""How ROME and AlphaEdit go through requests: all at once, or each on the model that carries the edits before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..capture import evaluating
from ..configuration_ibke import Mode
from ..edit_values import Edit, describe
from ..edits import LowRankEdit
from ..layers import modules_to_edit
from ..records import EditRequest
from ._locate import check_call, question_requests


def edit_requests(
    editor: Any, make: Callable[..., LowRankEdit], model: Any, tokenizer: Any, requests: Sequence[EditRequest], mode: Mode,
    previous: Edit | None,
) -> LowRankEdit:  # fmt: skip
    """Return the edit of all requests, which `previous` is part of.

    Args:
        editor: Has a config and statistics.
        make: Called with model, modules, questions, previous edit, names of the requests and `joint`; edits them into one update, or
            into one each.
        model: The backbone.
        tokenizer: Its tokenizer.
        requests: One or more edit requests.
        mode: See the editors' `edit`.
        previous: An edit that the model carries already.
    """
    check_call(mode, len(requests), previous)
    modules = modules_to_edit(model, editor.config.module_names())
    editor.statistics.require(modules)
    info = describe(model, modules, requests, editor=type(editor).__name__)
    with torch.inference_mode(False), evaluating(model):
        questions = question_requests(model, tokenizer, requests, editor.config, editor.statistics.openings)
        names = [f"request {k}" for k in range(len(requests))]
        if mode != "sequential":
            return replace(make(model, modules, questions, previous, names, joint=mode == "joint"), info=info)
        edit: Any = previous
        for k, name in enumerate(names):
            edit = make(model, modules, questions.only(k), edit, [name], joint=True)
    return replace(edit, info=info)
