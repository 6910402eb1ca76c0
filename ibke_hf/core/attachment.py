"""Hooks layers for the length of a `with` block, and only for the code inside of it: side paths and recorders.

A hook fires for every caller of a shared model, so each hook asks a ContextVar whether *its* block is the one that is
running: two threads (or asyncio tasks) with two edits on one model never see each other's. A thread that the block
starts is outside of it; start it with ``contextvars.copy_context().run``. The recomputation of a gradient checkpoint
may run on autograd's own thread, which has no such context; there the one attached block is used, and several at once
are refused rather than guessed.

Code that torch.compile made before the block knows nothing of the hooks (and code made inside of it would keep them),
so compiled models run eagerly as long as any block is open; merge an edit to run it compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock, _DummyThread, current_thread
from typing import Any

import torch
from torch import Tensor, nn

SidePath = Callable[[Tensor], Tensor]
LayerHook = Callable[[Tensor, Tensor], Tensor]
CallHook = Callable[[Mapping[str, Any], Any], Any]
_running: ContextVar[tuple[object, ...]] = ContextVar("ibke_hf_attached", default=())
_columns: ContextVar[MovedColumns | None] = ContextVar("ibke_hf_columns", default=None)
_attached: dict[int, list[object]] = {}
_registry = Lock()  # torch hands out hook ids without one
_eager: list[Any] = []  # the compiler's stance, set by the first open block and put back by the last one


def hooked(modules: Mapping[str, nn.Module], hooks: Mapping[str, LayerHook]) -> AbstractContextManager[None]:
    """Replace the output y of ``modules[name]`` by ``hooks[name](x, y)``, x its input, while the block runs.

    Of a layer that returns a tuple, y is the first entry. Blocks nest: the inner hook gets what the outer one
    returned. Hooks are removed when the block ends, also by an exception; no weight is touched, and other threads that
    run the same model are left alone.
    """
    return _open(modules, {name: _on_first(hook) for name, hook in hooks.items()}, with_kwargs=True)


def _on_first(hook: LayerHook) -> Callable[..., Any]:
    """Call a hook with a layer's first argument and first output, their columns as in the caller's batch."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y, *rest = output if isinstance(output, tuple) else (output,)
        columns = _columns.get()
        if columns is None:
            changed = hook(x, y)
        else:
            changed = _gathered(
                hook(_gathered(x, columns.of_caller), _gathered(y, columns.of_caller)), columns.of_model
            )
        if changed is y or (changed.is_leaf and changed.requires_grad):
            changed = changed.clone()  # some models add to a layer's output in place; what a hook has kept stays
        return (changed, *rest) if isinstance(output, tuple) else changed

    return run


@dataclass(frozen=True)
class MovedColumns:
    """Where the columns of a batch are, if the model reads its rows otherwise than its caller has padded them.

    Attributes:
        of_caller: (b, l) the model's column that holds each of the caller's.
        of_model: (b, l) the caller's column that holds each of the model's.
    """

    of_caller: Tensor
    of_model: Tensor


@contextmanager
def columns_moved(columns: MovedColumns | None) -> Iterator[None]:
    """Show the hooks of layers their batch as the caller padded it, while the model reads it otherwise."""
    token = _columns.set(columns)
    try:
        yield
    finally:
        _columns.reset(token)


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """Rearrange the columns of (b, l, d) or of (b·l, d); what has other columns, such as the last ones only, stays."""
    flat = x.ndim == 2 and len(x) == columns.numel()
    if not flat and x.shape[:2] != columns.shape:
        return x
    rows = x.view(*columns.shape, -1)
    moved = rows.gather(1, columns.to(x.device).unsqueeze(-1).expand_as(rows))
    return moved.view(x.shape[0], -1) if flat else moved


@contextmanager
def detached() -> Iterator[None]:
    """Run a model as if no block were open around this one."""
    token = _running.set(())
    try:
        yield
    finally:
        _running.reset(token)


def call_hooked(model: nn.Module, hook: CallHook) -> AbstractContextManager[None]:
    """Replace what a whole model returns by ``hook(arguments, output)`` while the block runs, arguments by name.

    See :func:`hooked`.
    """
    called = getattr(model, "_orig_mod", model)  # what torch.compile wraps, and calls while a block is open
    signature = inspect.signature(called.forward)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        return hook({**arguments, **arguments.get("kwargs", {})}, output)

    return _open({"": called}, {"": run}, with_kwargs=True)


@contextmanager
def _open(
    modules: Mapping[str, nn.Module], hooks: Mapping[str, Callable[..., Any]], *, with_kwargs: bool = False
) -> Iterator[None]:
    block = object()
    handles = []
    with _registry:
        if not _attached:
            _eager.append(torch.compiler.set_stance("force_eager"))
        for name, hook in hooks.items():
            handles.append(modules[name].register_forward_hook(_hook(block, hook), with_kwargs=with_kwargs))
            _attached.setdefault(id(modules[name]), []).append(block)
    token = _running.set((*_running.get(), block))
    try:
        yield
    finally:
        _running.reset(token)
        with _registry:
            for handle, name in zip(handles, hooks, strict=True):
                handle.remove()
                _detach(id(modules[name]), block)
            if not _attached:
                _eager.pop().__exit__(None, None, None)


def attached_side_paths(
    modules: Mapping[str, nn.Module], side_paths: Mapping[str, SidePath]
) -> AbstractContextManager[None]:
    """Add ``side_paths[name](x)`` to the output of ``modules[name]`` while the block runs; nested blocks add up."""
    return hooked(modules, {name: _adding(path) for name, path in side_paths.items()})


def _adding(side_path: SidePath) -> LayerHook:
    def add(layer_inputs: Tensor, output: Tensor) -> Tensor:
        return (output + side_path(layer_inputs)).to(output.dtype)  # the sum is in fp32 also on 16-bit models

    return add


def _hook(block: object, hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        module: nn.Module, *call: Any
    ) -> Any:  # a thread in the midst of its registration may call it without the keywords
        return hook(*call) if _applies(block, module) else None

    return run


def _detach(module: int, block: object) -> None:
    _attached[module].remove(block)
    if not _attached[module]:
        del _attached[module]


def _on_autograd_thread() -> bool:
    """Tell whether this is a thread of autograd's own, which Python did not start and knows by a stand-in only."""
    return torch._C._current_graph_task_id() != -1 and isinstance(current_thread(), _DummyThread)


def _applies(block: object, module: nn.Module) -> bool:
    running = _running.get()
    if running or not _on_autograd_thread():
        return block in running
    if len(_attached.get(id(module), ())) > 1:
        raise RuntimeError(
            "gradient checkpointing recomputes a layer while several edits are attached to it from different threads; "
            "run the backward passes one at a time or turn gradient checkpointing off"
        )
    return True


def require_row_per_edit(number: int, x: Tensor) -> None:
    """Check that a batch has a row for each of several independent edits; one edit serves any batch.

    Args:
        number: n, how many edits are attached.
        x: Input of a hook: (n, l, d).

    Raises:
        ValueError: If the batch has another number of rows.
    """
    if number > 1 and (x.ndim != 3 or len(x) != number):
        raise ValueError(
            f"{number} independent edits were attached to a batch of {len(x)} rows (input {tuple(x.shape)}); "
            f"pass one row "
            "per edit, or rows= to say which edit each row carries (beam search repeats rows)"
        )
