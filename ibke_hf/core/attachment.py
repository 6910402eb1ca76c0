"""Hooks layers for the length of a `with` block, and only for the code inside of it: side paths and recorders.

A hook fires for every caller of a shared model, so each hook asks a ContextVar whether *its* block is the one that is
running: two threads (or asyncio tasks) with two edits on one model never see each other's. A thread that the block
starts is outside of it: start it with ``contextvars.copy_context().run``, or open the block with ``all_threads=True``,
as streaming needs it; a model that is run unedited beside an open block is logged. The recomputation of a gradient
checkpoint may run on autograd's own thread, which has no such context; there the one attached block is used, and
several at once are refused rather than guessed.

Code that torch.compile made before the block knows nothing of the hooks (and code made inside of it would keep them),
so compiled models run eagerly as long as any block is open; merge an edit to run it compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .library_internals import on_autograd_thread

logger = logging.get_logger(__name__)
SidePath = Callable[[Tensor], Tensor]
LayerHook = Callable[[Tensor, Tensor], Tensor]
CallHook = Callable[[Mapping[str, Any], Any], Any]
EntryHook = Callable[[Mapping[str, Any]], None]
OUTSIDE = (
    "a model was run in a thread outside of the block that attached an edit to it, and answered unedited. Streaming "
    "(TextIteratorStreamer with Thread(target=model.generate)) needs edit.attached(model, all_threads=True), or "
    "Thread(target=contextvars.copy_context().run, args=(model.generate,)); if that thread means the unedited model, "
    "run it inside of ibke_hf.core.attachment.detached(). Said once for each block"
)


@dataclass(eq=False)
class Block:
    """One `with` block whose hooks lie on modules.

    Attributes:
        is_edit: Whether its hooks change what a model answers for a user; recorders do not.
        all_threads: Whether it holds for every thread that has no edit of its own.
        has_warned: Whether a run outside of it was logged.
    """

    is_edit: bool = False
    all_threads: bool = False
    has_warned: bool = False


_running: ContextVar[tuple[Block, ...]] = ContextVar("ibke_hf_attached", default=())
_columns: ContextVar[MovedColumns | None] = ContextVar("ibke_hf_columns", default=None)
_prompts: ContextVar[Tensor | None] = ContextVar("ibke_hf_prompts", default=None)
_attached: dict[int, list[Block]] = {}
_registry = Lock()  # torch hands out hook ids without one
_eager: list[Any] = []  # the compiler's stance, set by the first open block and put back by the last one


def hooked(
    modules: Mapping[str, nn.Module],
    hooks: Mapping[str, LayerHook],
    *,
    is_edit: bool = False,
    all_threads: bool = False,
) -> AbstractContextManager[None]:
    """Replace the output y of ``modules[name]`` by ``hooks[name](x, y)``, x its input, while the block runs.

    Of a layer that returns a tuple, y is the first entry. Blocks nest: the inner hook gets what the outer one
    returned. Hooks are removed when the block ends, also by an exception; no weight is touched, and other threads that
    run the same model are left alone.

    Args:
        modules: Modules by name.
        hooks: What replaces their outputs.
        is_edit: Whether they are an edit, about which a thread is to be warned that runs the model without it.
        all_threads: Have the block hold for every thread that has no edit of its own, not for this one alone.

    Raises:
        RuntimeError: If another thread holds a block for all threads on one of the modules.
    """
    return _open(
        modules, {name: _on_first(hook) for name, hook in hooks.items()}, Block(is_edit, all_threads), with_kwargs=True
    )


def _on_first(hook: LayerHook) -> Callable[..., Any]:
    """Call a hook with a layer's first argument and first output, their columns as in the caller's batch."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y, *rest = output if isinstance(output, tuple) else (output,)
        x = x.to(y.device)  # accelerate moves it only inside of the layer's call
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


@contextmanager
def prompts_marked(mask: Tensor | None) -> Iterator[None]:
    """Tell hooks which tokens of a batch are prompts, in the caller's columns; the others are targets that are judged.

    Args:
        mask: (b, l) True on the tokens of prompts.
    """
    token = _prompts.set(mask)
    try:
        yield
    finally:
        _prompts.reset(token)


def marked_prompts() -> Tensor | None:
    """Return the mask (b, l) of :func:`prompts_marked`, None where the caller told nothing."""
    return _prompts.get()


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
    """Run a model as if no block were open around this one, and without a warning that it answers unedited."""
    token = _running.set((Block(is_edit=True),))
    try:
        yield
    finally:
        _running.reset(token)


def call_hooked(model: nn.Module, hook: CallHook, *, all_threads: bool = False) -> AbstractContextManager[None]:
    """Replace what a whole model returns by ``hook(arguments, output)``, arguments by name, while the block runs.

    It is an edit; see :func:`hooked`.
    """
    called = getattr(model, "_orig_mod", model)  # what torch.compile wraps, and calls while a block is open
    named = _named_arguments(called)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return hook(named(args, kwargs), output)

    return _open({"": called}, {"": run}, Block(True, all_threads), with_kwargs=True)


def call_preceded(model: nn.Module, hook: EntryHook, *, all_threads: bool = False) -> AbstractContextManager[None]:
    """Call ``hook(arguments)``, arguments by name, before each run of a module while the block runs."""
    called = getattr(model, "_orig_mod", model)
    named = _named_arguments(called)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook(named(args, kwargs))

    return _open({"": called}, {"": run}, Block(False, all_threads), with_kwargs=True, before=True)


def _named_arguments(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    signature = inspect.signature(module.forward)

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        return {**arguments, **arguments.get("kwargs", {})}

    return named


@contextmanager
def _open(
    modules: Mapping[str, nn.Module],
    hooks: Mapping[str, Callable[..., Any]],
    block: Block,
    *,
    with_kwargs: bool = False,
    before: bool = False,
) -> Iterator[None]:
    handles = []
    with _registry:
        _require_only_one_for_all_threads(modules, block)
        if not _attached:
            _eager.append(torch.compiler.set_stance("force_eager"))
        for name, hook in hooks.items():
            module = modules[name]
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(_hook(block, hook), with_kwargs=with_kwargs))
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


def _require_only_one_for_all_threads(modules: Mapping[str, nn.Module], block: Block) -> None:
    if not block.all_threads:
        return
    for module in modules.values():
        for other in _attached.get(id(module), ()):
            if other.all_threads and other not in _running.get():
                raise RuntimeError(
                    "another thread has attached an edit to this model for all threads; wait until its block ends, or "
                    "attach without all_threads and start threads with contextvars.copy_context().run"
                )


def attached_side_paths(
    modules: Mapping[str, nn.Module], side_paths: Mapping[str, SidePath], *, all_threads: bool = False
) -> AbstractContextManager[None]:
    """Add ``side_paths[name](x)`` to the output of ``modules[name]`` while the block runs; nested blocks add up."""
    hooks = {name: _adding(path) for name, path in side_paths.items()}
    return hooked(modules, hooks, is_edit=True, all_threads=all_threads)


def _adding(side_path: SidePath) -> LayerHook:
    def add(layer_inputs: Tensor, output: Tensor) -> Tensor:
        return (output + side_path(layer_inputs)).to(output.dtype)  # the sum is in fp32 also on 16-bit models

    return add


def _hook(block: Block, hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        module: nn.Module, *call: Any
    ) -> Any:  # a thread in the midst of its registration may call it without the keywords
        return hook(*call) if _applies(block, module) else None

    return run


def _detach(module: int, block: Block) -> None:
    _attached[module].remove(block)
    if not _attached[module]:
        del _attached[module]


def _applies(block: Block, module: nn.Module) -> bool:
    running = _running.get()
    if block in running:
        return True
    if not running and on_autograd_thread():
        return _is_alone(module)
    if any(other.is_edit for other in running):  # a thread with an edit of its own keeps to that
        return False
    if block.is_edit and not block.all_threads and not running and not block.has_warned:
        block.has_warned = True
        logger.warning(OUTSIDE)
    return block.all_threads


def _is_alone(module: nn.Module) -> bool:
    if len(_attached.get(id(module), ())) > 1:
        raise RuntimeError(
            "gradient checkpointing recomputes a layer while several edits are attached to it from different threads; "
            "run the backward passes one at a time or turn gradient checkpointing off"
        )
    return True


def require_row_per_edit(number: int, x: Tensor, *, shared: bool) -> None:
    """Check that a batch has a row for each of several independent edits; one edit serves any batch.

    Args:
        number: n, how many edits are attached.
        x: Input of a hook: (n, l, d).
        shared: Whether one edit serves every row, as where the user attached the only one without choosing rows.

    Raises:
        ValueError: If the batch has another number of rows.
    """
    if not shared and (x.ndim != 3 or len(x) != number):
        raise ValueError(
            f"{number} independent edit{'s were' if number > 1 else ' was'} attached to a batch of {len(x)} rows "
            f"(input {tuple(x.shape)}); "
            "pass one row per edit, or rows= to say which edit each row carries (beam search repeats rows)"
        )
