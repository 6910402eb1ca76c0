"""What the tests of editors on the Hub share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_editors import REQUESTS, make_editor

from ibke_hf import IBKEEditor, LowRankEdit


@pytest.fixture
def world(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> tuple[Any, Any, IBKEEditor, LowRankEdit]:
    """Backbone, tokenizer, editor and the edit that every copy of the editor must give."""
    model = tiny_model("gpt2")
    editor = make_editor(model, tiny_tokenizer)
    return model, tiny_tokenizer, editor, editor.edit(model, tiny_tokenizer, REQUESTS)
