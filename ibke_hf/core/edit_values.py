"""What every edit is as a value: the Edit protocol, provenance, and rows of independent edits held as tensors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_ibke import Mode
from .fingerprints import fingerprint, same_backbone
from .layers import is_transposed
from .records import EditRequest

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)
Described = TypeVar("Described", bound="EditValue")


@runtime_checkable
class Edit(Protocol):
    """What every editor returns: a value that can be attached to a model and leaves no trace when it is gone."""

    def __len__(self) -> int:
        """Return the number of independent edits held."""

    def attached(
        self, model: Any, rows: Tensor | None = None, *, all_threads: bool = False
    ) -> AbstractContextManager[Any]:
        """Edit the model for the length of a `with` block."""

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""


class Editor(Protocol):
    """What all editors are: they make edits of a model by one call. Each says what is special about its own."""

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        mode: Mode = "joint",
        previous: Any = None,
    ) -> Edit:
        """Return the edit that makes the model answer the requests; the model is not changed.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer.
            requests: One or more edit requests.
            mode: ``"joint"``: one edit of all requests at once; ``"sequential"``: one edit, request after request,
                each on the model that carries those before it; ``"independent"``: request k is row k of the result,
                for a batch in which every row carries its own edit.
            previous: An edit that the model carries already; one for each request, or one for all, in independent
                mode. The result contains it.

        Raises:
            RequestError: If a request is unusable, naming it by its index; nothing is done then.
            BackboneError: If the model does not fit the editor, such as one that lacks an edited layer.
            NonFiniteError: If a loss, or what the edit is made of, is not finite.
            ValueError: If there is no such mode, or `previous` is not of the editor's kind or number.
        """


@dataclass(frozen=True)
class EditInfo:
    """Where an edit comes from: saved beside it as ``edit.json``.

    Attributes:
        requests: Everything that the model was asked to answer, earlier edits that this one contains first.
        editor: What made it; several, joined by `` + ``, where it contains edits of others.
        backbone: What it was made for.
        fingerprint: A few weights of each edited layer, see :mod:`ibke_hf.core.fingerprints`.
        transposed: Whether weights are stored (d_in, d_out), which PEFT calls fan_in_fan_out.
        scores: Scores by name.
        rows: For each of n independent edits the places of its requests in `requests`; empty where they need not be
            told: a single edit has all of them, n edits of n requests one each.
        model_type: Architecture of the backbone, as its config names it.
    """

    requests: tuple[EditRequest, ...] = ()
    editor: str = ""
    backbone: str = ""
    fingerprint: Mapping[str, list[float]] = field(default_factory=dict)
    transposed: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[tuple[int, ...], ...] = ()
    model_type: str = ""

    def requests_of(self, row: int, number: int) -> tuple[EditRequest, ...]:
        """Return the requests of one of `number` independent edits; all of them where nothing tells them apart."""
        if len(self.rows) == number:
            return tuple(self.requests[place] for place in self.rows[row])
        return self.requests[row : row + 1] if len(self.requests) == number > 1 else self.requests


def with_rows(info: EditInfo, rows: Sequence[Sequence[EditRequest]]) -> EditInfo:
    """Return an info of len(rows) independent edits, each of which was made for the requests of its row."""
    requests = tuple(request for row in rows for request in row)
    if len(rows) == 1 or not requests or all(len(row) == 1 for row in rows):
        return replace(info, requests=requests, rows=())
    if len(set(map(tuple, rows))) == 1:  # nothing tells the rows apart
        return replace(info, requests=tuple(rows[0]), rows=(tuple(range(len(rows[0]))),) * len(rows))
    ends = list(accumulate(map(len, rows)))
    places = tuple(tuple(range(end - len(row), end)) for end, row in zip(ends, rows, strict=True))
    return replace(info, requests=requests, rows=places)


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
        """Give `edit` the requests of the rows that it was made of."""
        chosen = [self.info.requests_of(row, len(self)) for row in rows]
        return replace(edit, info=with_rows(self.info, chosen))  # type: ignore[type-var]

    @property
    def nbytes(self) -> int:
        """Memory that the edit takes, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def export(self, to: str, out: str | Path, **options: Any) -> Any:
        """Write the edit as what a serving engine takes; see :func:`ibke_hf.delivery.export.export_edit`."""
        return whole_package("delivery.export", "exporting").export_edit(self, to, out, **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the edit on another device or in another dtype, as `torch.Tensor.to` would."""
        return self._map(lambda t: t.to(*args, **kwargs))


def whole_package(module: str, what: str) -> Any:
    """Return a module of `ibke_hf` that does not travel with this code.

    Args:
        module: Its name within the package.
        what: What it is needed for, as errors call it.

    Raises:
        ImportError: Where `ibke_hf` is not installed.
    """
    try:
        return import_module(f"ibke_hf.{module}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "ibke_hf":
            raise ImportError(
                f"{what} needs the package ibke_hf itself; install it, or save the edit, whose folder "
                f"PEFT and `hf upload` take"
            ) from error
        raise


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
        backbone=name_of(model) or backbone,
        fingerprint=fingerprint(modules),
        transposed=any(is_transposed(module) for module in modules.values()),
        model_type=getattr(model.config, "model_type", "") or "",
    )


def name_of(model: Any) -> str:
    """Return what a model's config calls it, empty where it has no name."""
    return getattr(getattr(model, "config", None), "name_or_path", "") or ""


def joined_info(parts: Sequence[tuple[EditInfo, int]], number: int) -> EditInfo:
    """Return where the edit comes from that does all of several; each of its rows has the requests of its own parts.

    Args:
        parts: Infos, the earliest first, each with the number of independent edits that it describes: 1 or `number`.
        number: Independent edits of the result.
    """
    infos = [info for info, _ in parts]
    rows = [
        [request for info, length in parts for request in info.requests_of(row if length > 1 else 0, length)]
        for row in range(number)
    ]
    editors = dict.fromkeys(name for info in infos for name in info.editor.split(" + ") if name)
    joined = EditInfo(
        editor=" + ".join(editors),
        backbone=next((info.backbone for info in infos if info.backbone), ""),
        fingerprint={name: values for info in reversed(infos) for name, values in info.fingerprint.items()},
        transposed=any(info.transposed for info in infos),
        model_type=next((info.model_type for info in infos if info.model_type), ""),
    )
    return with_rows(joined, rows)


def described(edit: Described, info: EditInfo, previous: Any = None) -> Described:
    """Return an edit with where it comes from, which is also where `previous` does that it contains.

    Args:
        edit: What an editor made.
        info: Of the requests at hand, one for each row where there are several rows.
        previous: What the model carried already.
    """
    number = len(edit)
    parts = [(info, number if len(info.requests) == number else 1)]
    if previous is not None:
        warn_of_other_backbone(previous.info, info.fingerprint, info.backbone, "the previous edit")
        parts.insert(0, (previous.info, len(previous)))
    return replace(edit, info=joined_info(parts, number))  # type: ignore[type-var]


def warn_of_other_backbone(
    info: EditInfo, layers_fingerprint: Mapping[str, Sequence[float]], model_name: str, what: str = "the edit"
) -> None:
    """Say so where the layers of a model have other weights than those that an edit was made on.

    Args:
        info: Of the edit.
        layers_fingerprint: Fingerprint of the model's layers.
        model_name: What the model is called.
        what: What the edit is called.
    """
    if not same_backbone(info.fingerprint, layers_fingerprint):
        logger.warning_once(
            f"{what} ({info.editor or 'of an unknown editor'}) was made on {info.backbone or 'another backbone'}, and "
            f"the weights of {model_name or 'this model'} differ from those: it may say anything there. Make the edit "
            f"on the model that is to carry it"
        )


def info_json(info: EditInfo, **more: Any) -> str:
    """Serialise what ``edit.json`` holds."""
    fields = {**asdict(info), "requests": [request.to_json() for request in info.requests]}
    if not info.rows:
        del fields["rows"]  # as earlier versions wrote it
    if not info.model_type:
        del fields["model_type"]
    return json.dumps({"format_version": 1, **fields, **more}, indent=2, ensure_ascii=False, allow_nan=False)


def require_length(previous: Edit, number: int) -> None:
    """Check that an edit carried already has a row for each of `number` edits made on top of it, or one for all.

    Raises:
        ValueError: If it has another number of rows.
    """
    if len(previous) not in (1, number):
        lengths = "1" if number == 1 else f"1 or {number}"
        raise ValueError(
            f"previous holds {len(previous)} independent edits, here it must hold {lengths}; choose one, such as "
            f"previous[0]"
        )
