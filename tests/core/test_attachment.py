"""Whose edit a thread sees: its block's, by opting in every thread's; a model run unedited beside a block is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from ibke_hf.core.attachment import OUTSIDE, detached, hooked
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.library_internals import on_autograd_thread

LAYER = "model.layers.1.mlp.down_proj"
IDS = torch.randint(2, 320, (1, 7), generator=torch.Generator().manual_seed(1))


def make_edit(seed: int = 0) -> LowRankEdit:
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(1, 2, width, generator=generator) for width in (48, 32))
    return LowRankEdit(*({LAYER: factor} for factor in factors))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def in_thread(model: Any) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(logits, model).result()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    return lambda: sum(record.getMessage() == OUTSIDE for record in caplog.records)


def streamed(model: Any, tokenizer: Any) -> str:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "streamer": streamer}
    thread = Thread(target=model.generate, args=(IDS,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def test_streaming_from_a_thread_answers_with_the_edit(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, warnings: Callable[[], int]
) -> None:
    model, edit = tiny_model("qwen3", eos_token_id=None), make_edit()
    before = streamed(model, tiny_tokenizer)
    with edit.attached(model, all_threads=True):
        after = streamed(model, tiny_tokenizer)
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert after == tiny_tokenizer.decode(tokens[0, IDS.shape[1] :]) != before
    assert streamed(model, tiny_tokenizer) == before
    assert warnings() == 0


def test_a_thread_that_answers_unedited_is_told_once_for_each_block(
    tiny_model: Callable[..., Any], warnings: Callable[[], int]
) -> None:
    model, original = tiny_model("qwen3"), None
    original = logits(model)
    for number in (1, 2):
        with make_edit().attached(model):
            assert torch.equal(in_thread(model), original)
            assert torch.equal(in_thread(model), original)
        assert warnings() == number
    assert "all_threads=True" in OUTSIDE
    assert "copy_context().run" in OUTSIDE


def test_nobody_is_told_without_need(tiny_model: Callable[..., Any], warnings: Callable[[], int]) -> None:
    model, original = tiny_model("qwen3"), logits(tiny_model("qwen3"))
    start = threading.Barrier(2)

    def user(seed: int) -> Tensor:
        with make_edit(seed).attached(model):
            start.wait()
            answer = logits(model)
            start.wait()
        return answer

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(user, (0, 1)))
    assert not torch.equal(*answers)
    with make_edit().attached(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(copy_context().run, logits, model).result(), answers[0])

        def on_purpose() -> Tensor:
            with detached():
                return logits(model)

        assert torch.equal(pool.submit(on_purpose).result(), original)
        assert torch.equal(on_purpose(), original)
        assert torch.equal(logits(model), answers[0])
    module = {LAYER: model.get_submodule(LAYER)}
    with hooked(module, {LAYER: lambda x, y: y}):  # a recorder is no edit
        in_thread(model)
    assert warnings() == 0


def test_an_edit_for_all_threads_leaves_those_with_an_edit_of_their_own(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3")
    with make_edit(1).attached(model):
        alone = logits(model)

    def user() -> Tensor:
        with make_edit(1).attached(model):
            return logits(model)

    with make_edit(0).attached(model, all_threads=True), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(user).result(), alone)
        assert torch.equal(in_thread(model), logits(model))

        def second() -> None:
            with make_edit(1).attached(model, all_threads=True):
                pass

        with pytest.raises(RuntimeError, match="another thread has attached an edit to this model for all threads"):
            pool.submit(second).result()
        second()  # nested in the same thread, edits add up
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_taken_from_inside_torch_and_python_still_tells_autograds_threads() -> None:
    """Fails once a library changes what :mod:`ibke_hf.core.library_internals` uses."""
    import _thread
    from threading import _DummyThread, current_thread

    ids: list[tuple[int, bool]] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ids.append((torch._C._current_graph_task_id(), isinstance(current_thread(), _DummyThread)))
            return gradient

    def backward() -> None:
        Watch.apply(torch.ones(1, requires_grad=True)).sum().backward()
        assert on_autograd_thread() is False  # no backward pass is running any more

    assert torch._C._current_graph_task_id() == -1
    backward()
    done = threading.Event()

    def foreign() -> None:  # a thread that Python's `threading` did not start, like autograd's
        try:
            backward()
        finally:
            done.set()

    _thread.start_new_thread(foreign, ())
    assert done.wait(10)
    assert [stand_in for _, stand_in in ids] == [False, True]
    assert all(task != -1 for task, _ in ids)
