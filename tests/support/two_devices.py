"""Two devices where there is only a CPU: tensors that say they are elsewhere, and refuse to be mixed.

Their values lie on the CPU. They call themselves tensors of the ``lazy`` device, a name that torch reserves and whose
backward passes it runs on the thread of the CPU. What computes with two of them, or with one and a tensor of the CPU,
raises the error that it raises on accelerators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
COPIES = {"copy_", "_to_copy"}  # the operations that take a tensor to another device
INDEXED = {"index", "index_put_", "index_put"}  # whose indices may lie on the CPU


class Elsewhere(Tensor):
    """A tensor with a value on the CPU that says it is on another device."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> Any:
        options = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return Tensor._make_wrapper_subclass(cls, value.shape, device=device, **options)

    def __init__(self, value: Tensor, device: torch.device) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Elsewhere({self.value}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket.__name__
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    device = asked or _common_device(name, args, kwargs)
    if asked is not None and asked.type == "lazy":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func.overloadpacket is torch.ops.aten._local_scalar_dense:
        return func(*tree_map(_value, args))
    results = func(*tree_map(_value, args), **tree_map(_value, kwargs))
    same = {id(_value(tensor)): tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}

    def placed(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if id(result) in same:  # computed in place
            return same[id(result)]
        return Elsewhere(result, device) if device.type == "lazy" else result

    return tree_map(placed, results)


def _value(tensor: Any) -> Any:
    return tensor.value if isinstance(tensor, Elsewhere) else tensor


def _common_device(name: str, args: Any, kwargs: Any) -> torch.device:
    if name in COPIES:
        return args[0].device
    judged = args[0] if name in INDEXED else (args, kwargs)
    tensors = [tensor for tensor in tree_leaves(judged) if isinstance(tensor, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device.type == "lazy"}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two, {devices} ({name})"
        )
    return next(iter(devices), torch.device("cpu"))


class _Made(TorchDispatchMode):
    """Makes what is asked for on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Turns numbers to tensors and back on the CPU, which passes the dispatcher by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist:
            return _value(args[0].detach()).tolist()
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])


@contextmanager
def two_devices() -> Iterator[tuple[torch.device, torch.device]]:
    """Give two devices to the code inside the block."""
    with _Numbers(), _Made():
        yield FIRST, SECOND
