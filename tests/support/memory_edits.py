"""What the tests of GRACE, T-Patcher, LEMoE and SERAC share: requests, an edited model, what every edit must do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ibke_hf.core.capture import target_logits
from ibke_hf.core.edits import Edit
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import IGNORED, RequestError, encode_requests

FAMILIES = ("gpt2", "gptj", "qwen3", "llama", "gemma")
REQUESTS = (
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditRequest("An oak is", "metal"),
)


def hits(model: Any, tokenizer: Any, edit: Any, requests: Any = REQUESTS) -> list[bool]:
    """Tell for each request whether every token of its target is the top-1 prediction."""
    batch = encode_requests(tokenizer, requests)
    with torch.no_grad(), edit.attached(model):
        logits, labels = target_logits(model, batch)
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1).tolist()


def edited(model: Any, tokenizer: Any, make: Callable[[], Edit], asked: Any = REQUESTS) -> SimpleNamespace:
    """A model, what it was and said before, and an edit of it that `make` makes."""
    batch = encode_requests(tokenizer, asked)
    with torch.no_grad():
        logits = target_logits(model, batch)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return SimpleNamespace(model=model, batch=batch, logits=logits, weights=weights, edit=make())


def require_answers_and_no_trace(setting: SimpleNamespace, tokenizer: Any) -> None:
    """The edit answers all of `REQUESTS`; the model is bit for bit what it was."""
    assert isinstance(setting.edit, Edit)
    assert len(setting.edit) == 1
    assert hits(setting.model, tokenizer, setting.edit) == [True] * len(REQUESTS)
    assert setting.edit.info.requests == REQUESTS
    assert all(torch.equal(setting.weights[name], tensor) for name, tensor in setting.model.state_dict().items())
    assert all(parameter.grad is None for parameter in setting.model.parameters())
    assert not any(module._forward_hooks for module in setting.model.modules())
    with torch.no_grad():
        assert torch.equal(target_logits(setting.model, setting.batch)[0], setting.logits)


def require_generation(model: Any, tokenizer: Any, edit: Any) -> Any:
    """Independent edits of `REQUESTS` answer in cached generation and in beam search; returns tokenised prompts."""
    prompts = tokenizer(
        [request.prompt for request in REQUESTS], return_tensors="pt", padding=True, padding_side="left"
    )
    prompts.pop("token_type_ids", None)
    targets = [tokenizer(f" {request.target}")["input_ids"] for request in REQUESTS]
    with edit.attached(model):
        tokens = model.generate(**prompts, max_new_tokens=max(map(len, targets)), do_sample=False, pad_token_id=1)
    for row, target in enumerate(targets):
        assert tokens[row, prompts["input_ids"].shape[1] :].tolist()[: len(target)] == target
    with edit.attached(model, rows=torch.arange(len(REQUESTS)).repeat_interleave(2)):
        tokens = model.generate(**prompts, max_new_tokens=1, do_sample=False, num_beams=2, pad_token_id=1)
    assert [row[-1] for row in tokens.tolist()] == [target[0] for target in targets]
    return prompts


def require_a_row_for_each(model: Any, tokenizer: Any, edit: Any) -> None:
    """Independent edits, or one that `rows` chose of them, refuse a batch of another size; one alone serves any."""
    batch = encode_requests(tokenizer, REQUESTS[:2])
    for rows, rows_text in ((None, "3 independent edits were"), (torch.tensor([1]), "1 independent edit was")):
        with (
            torch.no_grad(),
            edit.attached(model, rows=rows),
            pytest.raises(ValueError, match=f"{rows_text} attached to a batch of 2 rows"),
        ):
            target_logits(model, batch)
    with torch.no_grad(), edit.attached(model, rows=torch.tensor([1, 1])):
        chosen = target_logits(model, batch)[0]
    with torch.no_grad(), edit[1].attached(model):
        torch.testing.assert_close(target_logits(model, batch)[0], chosen, rtol=1e-4, atol=1e-4)


def require_the_same_from_either_side(model: Any, tokenizer: Any, edit: Any) -> None:
    """Independent edits of `REQUESTS` predict the same of left-padded and of right-padded batches."""
    batches = [encode_requests(tokenizer, REQUESTS, side=side) for side in ("left", "right")]
    with torch.no_grad(), edit.attached(model):
        left, right = (logits[labels != IGNORED] for logits, labels in (target_logits(model, b) for b in batches))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def require_common_refusals(editor: Any, model: Any, tokenizer: Any) -> Any:
    """A bad request, mode or number of earlier edits is refused by name; returns an edit for each request."""
    with pytest.raises(RequestError, match="request 1: the target is empty"):
        editor.edit(model, tokenizer, [REQUESTS[0], EditRequest("a", " ")])
    with pytest.raises(ValueError, match="mode must be one of"):
        editor.edit(model, tokenizer, REQUESTS, mode="all")
    rows = editor.edit(model, tokenizer, REQUESTS, mode="independent")
    with pytest.raises(ValueError, match=r"previous holds 3 independent edits, here it must hold 1; .*previous\[0\]"):
        editor.edit(model, tokenizer, REQUESTS, previous=rows)
    return rows


def require_it_comes_back(edit: Any, folder: Path, model: Any, tokenizer: Any) -> None:
    """Saved independent edits of `REQUESTS` are loaded bit for bit, and still answer."""
    edit.save_pretrained(folder)
    loaded = type(edit).from_pretrained(folder)
    assert loaded == edit
    assert (loaded.settings, loaded.info) == (edit.settings, edit.info)
    assert hits(model, tokenizer, loaded) == [True] * len(REQUESTS)
    assert edit.select([2, 0])[1] == edit[0]


def in_two_threads(run: Callable[[int, threading.Barrier], Any]) -> list[Any]:
    """Return what two threads return, who meet at a barrier: each waits there for the other."""
    together = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1), (together, together)))
