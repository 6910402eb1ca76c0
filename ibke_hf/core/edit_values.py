"""What every edit is as a value: the Edit protocol, provenance, and rows of independent edits held as tensors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .layers import is_transposed
from .records import EditRequest

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Edit(Protocol):
    """What every editor returns: a value that can be attached to a model and leaves no trace when it is gone."""

    def __len__(self) -> int:
        """Return the number of independent edits held."""

    def attached(self, model: Any, rows: Tensor | None = None) -> AbstractContextManager[Any]:
        """Edit the model for the length of a `with` block."""

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""


@dataclass(frozen=True)
class EditInfo:
    """Where an edit comes from: saved beside it as ``edit.json``."""

    requests: tuple[EditRequest, ...] = ()
    editor: str = ""
    backbone: str = ""
    fingerprint: Mapping[str, list[float]] = field(default_factory=dict)
    transposed: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


class EditValue(ABC):
    """n independent edits as rows of tensors, whatever they do to a model.

    Subclasses are frozen dataclasses that hold the tensors; every one of them has n rows.
    """

    info: EditInfo

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the edit holds, each (n, …), by a name of its own."""

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the edit with every stored tensor changed."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, index: int) -> Self:
        number = len(self)
        if not -number <= index < number:
            raise IndexError(f"edit {index} of {number}")
        index %= number
        return self._with_requests_of([index], self._map(lambda t: t[index : index + 1]))

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, EditValue):
            return False
        mine, others = self.tensors(), other.tensors()
        return mine.keys() == others.keys() and all(torch.equal(mine[name].cpu(), others[name].cpu()) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """Return the independent edits `rows`, in that order; repeats are allowed, as beam search needs them.

        Raises:
            IndexError: If a row does not exist.
        """
        index = torch.as_tensor(rows, dtype=torch.long).flatten()
        chosen, number = index.tolist(), len(self)
        missing = [row for row in chosen if not 0 <= row < number]
        if missing or not chosen:
            raise IndexError(
                f"rows must name at least one of the {number} independent edits, 0 to {number - 1}, found "
                f"{missing or 'none'}"
            )
        return self._with_requests_of(chosen, self._map(lambda t: t.index_select(0, index.to(t.device))))

    def _with_requests_of(self, rows: Sequence[int], edit: Self) -> Self:
        """Give `edit` the requests of the rows that it was made of, where each row has one request."""
        requests = self.info.requests
        if len(requests) == len(self):
            requests = tuple(requests[row] for row in rows)
        return replace(edit, info=replace(self.info, requests=requests))  # type: ignore[type-var]

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the edit on another device or in another dtype, as `torch.Tensor.to` would."""
        return self._map(lambda t: t.to(*args, **kwargs))


def common_length(edits: Sequence[EditValue]) -> int:
    """Return the length that edits compose to.

    Raises:
        ValueError: Unless all lengths are equal or 1.
    """
    number = max(len(edit) for edit in edits)
    if any(len(edit) not in (1, number) for edit in edits):
        raise ValueError(
            f"cannot compose edits of lengths {[len(edit) for edit in edits]}; lengths must be equal or 1"
        )
    return number


def describe(
    model: Any, modules: Mapping[str, nn.Module], requests: Sequence[EditRequest], *, editor: str, backbone: str = ""
) -> EditInfo:
    """Return where an edit of these modules comes from; `backbone` names it where the model's config does not."""
    return EditInfo(
        requests=tuple(requests),
        editor=editor,
        backbone=getattr(model.config, "name_or_path", "") or backbone,
        fingerprint=fingerprint(modules),
        transposed=any(is_transposed(module) for module in modules.values()),
    )


def fingerprint(modules: Mapping[str, nn.Module], values: int = 16) -> dict[str, list[float]]:
    """Sample a few weights of each layer: tells backbones apart in any precision (compare with a 2 % tolerance)."""
    sampled = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
            sampled[name] = [round(float(v), 6) for v in weight.detach().flatten()[:values].float()]
    return sampled


def same_backbone(mine: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Compare two fingerprints on the layers that both have."""
    return all(
        torch.allclose(torch.tensor(mine[name]), torch.tensor(other[name]), rtol=0.02, atol=1e-4)
        for name in set(mine) & set(other)
    )


def info_json(info: EditInfo, **more: Any) -> str:
    """Serialise what ``edit.json`` holds."""
    requests = [request.to_json() for request in info.requests]
    return json.dumps(
        {"format_version": 1, **asdict(info), "requests": requests, **more}, indent=2, ensure_ascii=False
    )


def require_length(previous: Edit, number: int) -> None:
    """Check that an edit which the model carries already has a row for each of `number` edits that are made on top of it, or one for all.

    Raises:
        ValueError: If it has another number of rows.
    """
    if len(previous) not in (1, number):
        wanted = "1" if number == 1 else f"1 or {number}"
        raise ValueError(
            f"previous holds {len(previous)} independent edits, here it must hold {wanted}; choose one, such as "
            f"previous[0]"
        )
