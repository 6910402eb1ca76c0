"""Which trainings a sweep has: sets, each the product of lists, read from a YAML file and checked before any runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from ..io import FileError, read_yaml

GRID = Path(__file__).with_name("grid.yaml")
ALL = "all"
EDITORS = ("ibke_paper", "ibke")
EDITS = (ALL, "unknown")
NUMBERS = {"latent_length": 1, "beta": 0, "few_shot": 0, "edit_rank": 0}  # the least of each


@dataclass(frozen=True)
class Training:
    """One training of the Atlas editor and what it differs in from the others.

    Attributes:
        editor: ``"ibke_paper"``, the paper's own network, or ``"ibke"``, with the second stage that is ours.
        latent_length: l_m.
        beta: β.
        use_information_bottleneck: Off: z = μ and no ITM term.
        use_scale_factor: Off: σ(·) = 1.
        domain: The one whose facts are edited in training, or ``"all"``.
        edits: ``"all"``: unknown and counterfactual ones as the recipe mixes them; ``"unknown"``: true facts alone.
        few_shot: Counterfactual records among those of unknown edits.
        edit_rank: Rank that every edit is cut to, 0 for none.
        seed: Of records, initialisation, order and noise.
    """

    editor: str = EDITORS[0]
    latent_length: int = 10
    beta: float = 0.1
    use_information_bottleneck: bool = True
    use_scale_factor: bool = True
    domain: str = ALL
    edits: str = ALL
    few_shot: int = 0
    edit_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a value that no training has; the ValueError names the field and what is allowed."""
        for name, allowed in (("editor", EDITORS), ("edits", EDITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("use_information_bottleneck", "use_scale_factor"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, found {getattr(self, name)!r}")
        for name, least in NUMBERS.items():
            value = getattr(self, name)
            kinds = (int, float) if name == "beta" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
                whole = "a number" if name == "beta" else "a whole number"
                raise ValueError(f"{name} must be {whole} of at least {least}, found {value!r}")
        if not isinstance(self.domain, str):
            raise ValueError(f"domain must be a name, found {self.domain!r}")
        if self.few_shot and self.edits == ALL:
            raise ValueError("few_shot adds counterfactual records to unknown ones; it needs edits: unknown")

    @property
    def name(self) -> str:
        """Name of its folder, which no other training has."""
        parts = [
            self.editor,
            f"l{self.latent_length}",
            f"b{self.beta:g}",
            "" if self.use_information_bottleneck else "no-ib",
            "" if self.use_scale_factor else "no-sf",
            "" if self.domain == ALL else f"on-{self.domain}",
            "" if self.edits == ALL else f"{self.edits}-{self.few_shot}",
            f"r{self.edit_rank}" if self.edit_rank else "",
            str(self.seed),
        ]
        return ".".join(filter(None, parts))


@dataclass(frozen=True)
class Grid:
    """All trainings of a sweep.

    Attributes:
        steps: Of each training.
        seeds: Number of seeds, 0, 1, ….
        sets: By name lists of values by field of :class:`Training`.
        keep: Names of the sets whose editors stay on disk.
    """

    steps: int
    seeds: int
    sets: Mapping[str, Mapping[str, Sequence[Any]]]
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check all fields; the ValueError names what is wrong and what is allowed."""
        for name in ("steps", "seeds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {value!r}")
        if not self.sets:
            raise ValueError("sets must name at least one set of trainings")
        if unknown := [name for name in self.keep if name not in self.sets]:
            raise ValueError(f"keep names {', '.join(map(str, unknown))}; the sets are {', '.join(self.sets)}")
        self.trainings()

    def trainings(self) -> list[Training]:
        """Return all trainings once, those of a seed together, so that the first third is a sweep of one seed."""
        found = dict.fromkeys(training for name in self.sets for training in self._set(name))
        return sorted(found, key=lambda training: training.seed)

    def kept(self) -> set[Training]:
        """Return the trainings whose editors stay on disk."""
        return {training for name in self.keep for training in self._set(name)}

    def _set(self, name: str) -> list[Training]:
        lists = self.sets[name]
        known = [field.name for field in fields(Training) if field.name != "seed"]
        if not isinstance(lists, Mapping):
            raise ValueError(f"sets: {name}: must hold lists by field, found {lists!r}")
        for field, values in lists.items():
            if field not in known:
                raise ValueError(f"sets: {name}: there is no field {field!r}; fields are {', '.join(known)}")
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"sets: {name}: {field} must be a list of values, found {values!r}")
        try:
            return [
                Training(**dict(zip(lists, values, strict=True)), seed=seed)
                for seed in range(self.seeds)
                for values in product(*lists.values())
            ]
        except ValueError as error:
            raise ValueError(f"sets: {name}: {error}") from error


def read_grid(file: str | Path = GRID, **changes: Any) -> Grid:
    """Read a grid.

    Args:
        file: YAML of the fields of :class:`Grid`; by default the one that the paper's figures need.
        changes: Fields in place of the file's; None leaves them.

    Raises:
        FileError: If the file holds no grid; names the field and what is allowed.
    """
    values = read_yaml(file)
    known = [field.name for field in fields(Grid)]
    if wrong := [name for name in values if name not in known]:
        raise FileError(f"{file}: there is no field {wrong[0]!r}; fields are {', '.join(known)}")
    if missing := [name for name in ("steps", "seeds", "sets") if name not in values]:
        raise FileError(f"{file}: {missing[0]} is missing")
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return Grid(**{**values, **given})
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{file}: {error}") from error


def as_json(training: Training) -> dict[str, Any]:
    """Return the fields of a training, as the line of its cell has them."""
    return asdict(training)
