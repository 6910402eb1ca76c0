"""Edits that add modules or memories beside a model's own weights: those of T-Patcher, GRACE, LEMoE and SERAC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..core.adapter_files import AdapterError, read_info, read_weights, save_tensors
from ..core.attachment import LayerHook, hooked, require_row_per_edit
from ..core.capture import evaluating
from ..core.configuration_ibke import Mode, require_mode
from ..core.edit_values import (
    EditInfo,
    EditValue,
    describe,
    described,
    name_of,
    require_length,
    warn_of_other_backbone,
)
from ..core.fingerprints import fingerprint
from ..core.layers import modules_to_edit
from ..core.records import EditRequest
from ..core.tokens import TokenBatch, context_length, encode_requests

WEIGHTS = "memory_edit.safetensors"
Memory = TypeVar("Memory", bound="MemoryEdit")


@dataclass(frozen=True, eq=False)
class MemoryEdit(EditValue):
    """n independent edits, each a memory that hooks read while the edit is attached.

    A subclass says in `kind` what it is and in :meth:`hooks` what it does to which modules.

    Attributes:
        memory: Tensors by name, each (n, …).
        settings: Plain values that the hooks need, such as the name of the hooked layer; saved with the edit.
        info: Requests, editor and backbone.
    """

    kind: ClassVar[str]

    memory: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    info: EditInfo = field(default_factory=EditInfo)

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together."""
        lengths = {name: len(tensor) for name, tensor in self.memory.items()}
        if not lengths or len(set(lengths.values())) > 1:
            raise ValueError(
                f"every tensor of an edit must hold the same number of independent edits, found {lengths}"
            )

    @abstractmethod
    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return, by name, the modules to hook and what replaces their output y given their input x.

        A batch of several rows carries edit i in row i if n > 1, and the one edit in every row if n = 1.

        Raises:
            BackboneError: If the model does not fit; says what was expected and found.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the memory."""
        return dict(self.memory)

    def copied(self, number: int, device: Any) -> dict[str, Tensor]:
        """Return the memory of so many edits, for an editor to go on from; one edit serves all of them.

        Raises:
            ValueError: If this holds another number of edits.
        """
        require_length(self, number)
        return {
            name: tensor.to(device).expand(number, *tensor.shape[1:]).clone() for name, tensor in self.memory.items()
        }

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryEdit:
        return replace(self, memory={name: change(tensor) for name, tensor in self.memory.items()})

    @contextmanager
    def attached(
        self, model: nn.Module, rows: Tensor | None = None, *, all_threads: bool = False
    ) -> Iterator[nn.Module]:
        """Edit the model for the code inside the block; nothing of the model is touched, so undo is exact.

        Args:
            model: The backbone.
            rows: (batch,) which edit each row of the batch carries; see
                :meth:`ibke_hf.core.edits.WeightEdit.attached`.
            all_threads: Edit the model for every thread that has no edit of its own, as streaming needs it; see there.

        Raises:
            BackboneError: If the model does not fit.
            IndexError: If `rows` names an edit that does not exist.
            RuntimeError: If another thread has attached an edit to this model for all threads.
            ValueError: On a forward pass with another number of rows than edits.
        """
        edit = self if rows is None or len(self) == 1 else self.select(rows)
        pairs = edit.hooks(model)
        modules = {name: module for name, (module, _) in pairs.items()}
        if self.info.fingerprint:
            warn_of_other_backbone(self.info, fingerprint(modules), name_of(model))
        hooks = {name: _for_its_rows(hook, len(edit), shared=len(self) == 1) for name, (_, hook) in pairs.items()}
        with hooked(modules, hooks, is_edit=True, all_threads=all_threads):
            yield model

    def merge_into(self, model: nn.Module, **_: Any) -> NoReturn:
        """Refuse: a memory is no change of weights.

        Raises:
            ValueError: Always; says what to do instead.
        """
        raise ValueError(
            f"a {self.kind} edit is a memory beside the model, which no weight can hold: it cannot be merged; attach "
            f"it instead, with {type(self).__name__}.from_pretrained(...) and `with edit.attached(model):`"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save all n edits as one safetensors file and ``edit.json``, each written to a temporary name and renamed."""
        save_tensors(self.memory, folder, WEIGHTS, self.info, kind=self.kind, settings=dict(self.settings))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments: Any) -> MemoryEdit:
        """Load a saved edit of this kind from a folder or the Hub.

        Args:
            name_or_path: Folder or Hub id.
            hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

        Raises:
            AdapterError: If a file is missing or damaged, or the edit is of another kind.
        """
        info, content = read_info(name_or_path, hub_arguments)
        if content.get("kind") != cls.kind:
            raise AdapterError(
                f"{name_or_path}: holds an edit of kind {content.get('kind')!r}, {cls.__name__} reads {cls.kind!r}"
            )
        weights = read_weights(name_or_path, WEIGHTS, hub_arguments)
        try:
            return cls(weights, content["settings"], info)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                f"{name_or_path}/{WEIGHTS}: not a {cls.kind} edit ({error}); save the edit again"
            ) from error


class MemoryEditor(ABC, Generic[Memory]):
    """An editor that adds a memory beside one layer: GRACE, T-Patcher and LEMoE.

    A subclass says in `edited_module` where, and in :meth:`_remember` what it adds to what is remembered already.
    """

    supports_independent = True

    @property
    @abstractmethod
    def edited_module(self) -> str:
        """Full name of the projection that the memory lies beside."""

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: Any = None,
    ) -> Memory:
        """Return the memory that makes the model answer the requests, see :class:`~ibke_hf.core.edit_values.Editor`.

        `previous` is a memory of the same kind beside the same layer; the result goes on from it.
        """
        require_mode(mode)
        batch = encode_requests(tokenizer, requests, max_length=context_length(model))
        modules = self._modules(model)
        with torch.inference_mode(False), evaluating(model):
            edit = self._remember(model, tokenizer, modules, batch, mode, previous)
        return described(edit, describe(model, modules, requests, editor=type(self).__name__), previous)

    def _modules(self, model: Any) -> Mapping[str, nn.Module]:
        return modules_to_edit(model, [self.edited_module])

    @abstractmethod
    def _remember(
        self,
        model: Any,
        tokenizer: Any,
        modules: Mapping[str, nn.Module],
        batch: TokenBatch,
        mode: Mode,
        previous: Any,
    ) -> Memory:
        """Return the memory of `previous` and of the requests; it need not say where it comes from."""


def _for_its_rows(hook: LayerHook, number: int, *, shared: bool) -> LayerHook:
    """Have a hook refuse a batch that has not one row for each of n edits; one that is `shared` serves any batch."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        require_row_per_edit(number, x, shared=shared)
        return hook(x, y)

    return run
