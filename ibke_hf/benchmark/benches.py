"""What cells are made with: a backbone, the records, and editors that are built, given or trained."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.records import EditRecord
from ..data.sources import select
from ..editors.catalogue import ARRANGEMENTS, build_editor, editor_class, kind_of, set_composition
from ..evaluation.results import require_same
from ..io import read_json, write_json
from ..lifelong.context import ContextEditor
from ..lifelong.routed import RoutedEditor
from ..lifelong.router import Router
from .cells import ALL, BenchmarkError, Cell

SETTINGS, DONE = "settings.json", "trained.json"  # in the folder of a trained editor


class Bench(ABC):
    """A backbone, the records and the editors that are compared on it.

    Attributes:
        settings: What decides the cells, as JSON values; ``"free": True`` where models answer freely as well.
    """

    settings: dict[str, Any]

    @property
    def free(self) -> bool:
        """Whether the models also answer freely, without the target's length."""
        return bool(self.settings.get("free"))

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded once no editor is left to be trained."""
        return self.load()

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """Load the model and its tokenizer."""

    @abstractmethod
    def pool(self, split: str) -> Iterable[EditRecord]:
        """Return the records that those of a cell are drawn from."""

    @abstractmethod
    def prepare(self, name: str, seed: int, folder: Path) -> None:
        """Train an editor that is not trained yet; nothing to do for the others.

        Args:
            name: Its id.
            seed: Of its training.
            folder: Where it is or will be.
        """

    @abstractmethod
    def editor(self, name: str, folder: Path, edits: int = 1) -> Any:
        """Return an editor that fits the model, its edits summed as the paper's; None for the unedited model.

        Args:
            name: Its id.
            folder: Where it is, if it is trained.
            edits: Number of edits that the model will carry at once.
        """

    def arranged(self, name: str, folder: Path, edits: int = 1) -> Any:
        """Return what makes the edits of a row of a table: an editor, or its edits as the row arranges them.

        Args:
            name: Id of the row, one of :data:`~ibke_hf.editors.catalogue.COMPARED`.
            folder: Where the editor is, if it is trained.
            edits: Number of edits that the model will carry at once.

        Raises:
            BenchmarkError: If the row needs a router and there is none.
        """
        arrangement = ARRANGEMENTS.get(name)
        if arrangement is None:
            return self.editor(name, folder, edits)
        if arrangement.solved:
            editor = self.editor(arrangement.editor, folder, 1)  # whose step sizes are those of single edits
            set_composition(editor, "solve")
            return editor
        router = self.router(folder) if arrangement.routed else None
        if arrangement.editor == "none":
            return ContextEditor(router)
        assert router is not None
        return RoutedEditor(self.editor(arrangement.editor, folder, 1), router)  # a row carries few edits at once

    def router(self, folder: Path) -> Router:
        """Return the router that finds the edits of a prompt.

        Args:
            folder: Of the editor.

        Raises:
            BenchmarkError: If there is none.
        """
        raise BenchmarkError("this table has no router; leave out the rows that are routed")

    def tuned_at(self, name: str, edits: int) -> int | None:
        """Return the number of edits at once that an editor's settings for `edits` were chosen at; None: unknown."""
        return None

    def source(self, name: str) -> str | None:
        """Return where an editor that is given comes from, so that a table never mixes two of one id."""
        return None

    def records(self, cell: Cell, number: int) -> list[EditRecord]:
        """Draw the records of a cell; drawn once for all editors."""
        key = (cell.split, cell.edits, cell.seed, number)
        if key not in self._drawn:
            self._drawn[key] = self._draw(cell, number)
        return self._drawn[key]

    @cached_property
    def _drawn(self) -> dict[tuple[Any, ...], list[EditRecord]]:
        return {}

    def _draw(self, cell: Cell, number: int) -> list[EditRecord]:
        kept = (record for record in self.pool(cell.split) if cell.edits in (ALL, record.kind))
        drawn = list(select(kept, limit=number, seed=cell.seed))
        if not drawn:
            raise BenchmarkError(
                f"{cell.split}: has no record of {cell.edits} edits; choose other --edits or another dataset"
            )
        return drawn


class ModelBench(Bench):
    """Any backbone: editors with weights are given, or trained on the given records.

    Args:
        load: Loads the model and its tokenizer.
        read: Reads the records of a dataset by its name.
        saved: Folders or Hub ids of editors that are trained already, by id.
        load_saved: Loads one of these, called with it and ``backbone=``.
        training: Returns the settings of a training, called with id, seed and folder. None: there is nothing to train
            on.
        train: Trains an editor by such settings; goes on from a checkpoint if there is one.
        statistics: Measures the model's keys: called with model and tokenizer. None: there is no corpus.
        layers: Edited layers of the editors that edit several; by default each editor's own choice.
        hyper_parameters: Fields of the editors' configs, by id.
        settings: See :class:`Bench`.
        router: Folder or Hub id of the router; by default the one in the folder ``router`` of an editor.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        read: Callable[[str], Iterable[EditRecord]],
        *,
        saved: Mapping[str, str],
        load_saved: Callable[..., Any],
        training: Callable[[str, int, Path], Mapping[str, Any]] | None = None,
        train: Callable[[Mapping[str, Any]], Any] | None = None,
        statistics: Callable[[Any, Any], Any] | None = None,
        layers: Sequence[int] | None = None,
        hyper_parameters: Mapping[str, Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
        router: str | None = None,
    ) -> None:
        self._router = router
        self._load, self._read, self._saved, self._load_saved = load, read, dict(saved), load_saved
        self._training, self._train = training, train
        self._statistics, self._layers = statistics, layers
        self._hyper_parameters = {name: dict(fields) for name, fields in (hyper_parameters or {}).items()}
        self.settings = dict(settings or {})

    def load(self) -> tuple[Any, Any]:
        """Load the model and its tokenizer."""
        return self._load()

    def pool(self, split: str) -> Iterable[EditRecord]:
        """Read the records of a dataset."""
        return self._read(split)

    def prepare(self, name: str, seed: int, folder: Path) -> None:
        """Train an editor that is neither given nor trained yet."""
        if not kind_of(name).trained or name in self._saved:
            return
        if self._training is None or self._train is None:
            raise BenchmarkError(
                f"{name} must be trained: give the training records (--records), or a trained editor ({name}=PATH)"
            )
        settings = dict(self._training(name, seed, folder))
        deciding = json.loads(json.dumps({field: value for field, value in settings.items() if field != "out"}))
        if (folder / SETTINGS).exists():
            require_same(folder, read_json(folder / SETTINGS), deciding)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, deciding)
        if not (folder / DONE).exists():
            write_json(folder / DONE, {"editor": name, "seed": seed, "report": self._train(settings)})

    def editor(self, name: str, folder: Path, edits: int = 1) -> Any:
        """Load or build an editor, with the same hyper-parameters whatever the number of edits."""
        if kind_of(name).trained:
            editor = self._load_saved(self._saved.get(name, str(folder)), backbone=self.loaded[0])
            if not isinstance(editor, editor_class(name)):
                raise BenchmarkError(
                    f"{name}={self._saved[name]}: holds a {type(editor).__name__}; give it under its own id"
                )
            for field, value in kind_of(name).settings.items():
                if getattr(editor.config, field) != value:
                    raise BenchmarkError(
                        f"{name}={self._saved.get(name, folder)}: has {field} = {getattr(editor.config, field)!r}, "
                        f"where {kind_of(name).title} has {value!r}; give it as {kind_of(name).variant_of}"
                    )
            set_composition(editor, "sum")
            return editor
        model, _ = self.loaded
        statistics = self._keys if kind_of(name).needs_statistics else None
        fields = dict(self._hyper_parameters.get(name, {}))
        layers = fields.pop("layers", self._layers if kind_of(name).several_layers else None)
        return build_editor(name, model, layers, statistics=statistics, **fields)

    def router(self, folder: Path) -> Router:
        """Return the router that is given, else the one that lies beside an editor."""
        beside = [Path(str(path)) / "router" for path in (folder, *self._saved.values())]
        place = self._router or next((str(path) for path in beside if (path / "config.json").exists()), None)
        if place is None:
            raise BenchmarkError(
                "routed rows need a router: give one (--router; `ibke train-router` trains it), or leave them out"
            )
        router: Router = Router.from_pretrained(place).eval()
        router.require_backbone(self.loaded[0])
        return router

    def source(self, name: str) -> str | None:
        """Return the folder or Hub id of an editor that is given."""
        return self._saved.get(name)

    @cached_property
    def _keys(self) -> Any:
        if self._statistics is None:
            raise BenchmarkError(
                "ROME and AlphaEdit need the model's keys over a corpus; name one: --corpus FILE or dataset"
            )
        return self._statistics(*self.loaded)
