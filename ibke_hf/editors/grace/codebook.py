"""What GRACE's edits are: codebooks of keys, values and radii, and the rules by which they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.attachment import LayerHook
from ...core.layers import (
    BackboneError,
    device_of,
    dimensions,
    modules_to_edit,
)
from ...core.tokens import (
    IGNORED,
)
from ..memory import MemoryEdit

FREE = -1.0  # radius of a place of the codebook that holds no entry
# keys nearer than this fraction of their norm are one key: 16-bit models read the same prompt no more exactly
SAME = 0.01
INSIDE = 1.01  # a grown ball reaches a little past the key that it is grown to contain


@dataclass(frozen=True, eq=False)
class GRACEEdit(MemoryEdit):
    """n independent codebooks of up to m entries beside one layer.

    `memory` holds ``keys`` (n, m, d_in), ``values`` (n, m, d_out) and ``radii`` (n, m), -1 where a place is free, all
    fp32, and ``targets`` (n, m, t): the token ids that each entry answers with, filled up with -100. `settings` names
    the ``module``.
    """

    kind = "grace"

    def __post_init__(self) -> None:
        """Refuse a codebook that lacks a part."""
        super().__post_init__()
        shapes = {name: tuple(self.memory[name].shape) for name in ("keys", "values", "radii", "targets")}
        if not isinstance(self.settings["module"], str) or [len(shape) for shape in shapes.values()] != [3, 3, 2, 3]:
            raise ValueError(
                f"a codebook has keys and values (n, m, d), radii (n, m) and targets (n, m, t), found {shapes}"
            )
        if len({shape[:2] for shape in shapes.values()}) > 1:
            raise ValueError(f"keys, values, radii and targets must be of the same (n, m) entries, found {shapes}")

    @property
    def entries(self) -> list[int]:
        """Number of entries of each codebook."""
        counts: list[int] = (self.memory["radii"] > 0).sum(-1).tolist()
        return counts

    def to(self, *args: Any, **kwargs: Any) -> GRACEEdit:
        """Return the edit on another device or in another dtype; token ids stay whole numbers."""
        moved = super().to(*args, **kwargs)
        targets = self.memory["targets"].to(moved.memory["keys"].device)
        return GRACEEdit({**moved.memory, "targets": targets}, moved.settings, moved.info)

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return the layer and the lookup in its codebook."""
        name = self.settings["module"]
        module = modules_to_edit(model, [name])[name]
        widths = (self.memory["keys"].shape[-1], self.memory["values"].shape[-1])
        if dimensions(module) != widths:
            raise BackboneError(
                f"the codebook expects {name} to map {widths[0]} to {widths[1]}, the model's maps "
                f"{dimensions(module)[0]} to {dimensions(module)[1]}; it was made for another backbone"
            )
        device = device_of(module)
        keys, values, radii = (self.memory[part].to(device) for part in ("keys", "values", "radii"))
        return {name: (module, _lookup(keys.float(), values, radii.float()))}


def _lookup(keys: Tensor, values: Tensor, radii: Tensor) -> LayerHook:
    """Return x (b, l, d_in), y (b, l, d_out) -> y with the values of the tokens whose query lies in a ball."""
    number = len(keys)

    def look_up(x: Tensor, y: Tensor) -> Tensor:
        queries = x.detach().float().reshape(number, -1, x.shape[-1])  # one codebook serves all rows as one
        distances = torch.cdist(
            queries, keys, compute_mode="donot_use_mm_for_euclid_dist"
        )  # (n, tokens, m), exact near 0
        distances = distances.masked_fill(radii.unsqueeze(1) <= 0, torch.inf)
        nearest = distances.argmin(-1)
        within = distances.amin(-1) < radii.gather(1, nearest)
        retrieved = values[torch.arange(number, device=values.device).unsqueeze(1), nearest]
        inside = within.reshape(*x.shape[:-1], 1)
        return torch.where(inside, retrieved.to(y.dtype).reshape(y.shape), y)

    return look_up


class Codebooks:
    """n codebooks that are being written: the paper's rules of adding, expanding and splitting, without the training.

    Attributes:
        memory: Like that of :class:`GRACEEdit`.
    """

    def __init__(self, module: str, memory: dict[str, Tensor]) -> None:
        self.module, self.memory = module, memory

    @classmethod
    def blank(cls, module: str, number: int, widths: tuple[int, int], device: torch.device) -> Codebooks:
        """Return codebooks of one free place each."""
        keys, values = (torch.zeros(number, 1, width, device=device) for width in widths)
        targets = torch.full((number, 1, 1), IGNORED, device=device)
        return cls(
            module,
            {
                "keys": keys,
                "values": values,
                "radii": torch.full((number, 1), FREE, device=device),
                "targets": targets,
            },
        )

    def __len__(self) -> int:
        return len(self.memory["keys"])

    def edit(self, values: Mapping[tuple[Tensor, Tensor], Tensor] | None = None) -> GRACEEdit:
        """Return the codebooks as an edit, with other values (e, d_out) at the given rows and places."""
        memory = dict(self.memory)
        for places, others in (values or {}).items():
            memory["values"] = memory["values"].index_put(places, others)
        return GRACEEdit(memory, {"module": self.module})

    def reserve(self, places: int) -> None:
        """Add free places to each codebook."""
        pads = {
            "keys": (0, 0, 0, places),
            "values": (0, 0, 0, places),
            "radii": (0, places),
            "targets": (0, 0, 0, places),
        }
        fill = {"radii": FREE, "targets": IGNORED}
        self.memory = {
            name: functional.pad(self.memory[name], pad, value=fill.get(name, 0)) for name, pad in pads.items()
        }

    def trim(self) -> None:
        """Remove places that are free in every codebook."""
        used = max(int((self.memory["radii"] > 0).any(0).sum()), 1)
        self.memory = {name: tensor[:, :used].clone() for name, tensor in self.memory.items()}

    def file(self, row: int, key: Tensor, target: Tensor, initial_radius: float) -> tuple[int, bool]:
        """Add, expand or split for a key (d_in,) whose answer is `target` (t,); return its place, and if it is new.

        Far from all balls, the key is a new entry with a ball of its own. Near a key of the same target, that one's
        ball grows to contain it. Near a key of another target, both balls end half-way; if the two keys are one, the
        later edit wins.
        """
        keys, radii = self.memory["keys"][row], self.memory["radii"][row]
        norm = float(key.norm())
        radius = max(initial_radius * norm, 1e-6)
        distances = (keys - key).norm(dim=-1).masked_fill(radii <= 0, torch.inf)
        nearest, distance = int(distances.argmin()), float(distances.min())
        place = int((radii <= 0).int().argmax())
        if distance <= float(radii[nearest]) + radius:
            if self._answers(row, nearest, target):
                radii[nearest] = max(float(radii[nearest]), INSIDE * distance)
                return nearest, False
            if distance <= SAME * norm:
                place, radius = nearest, float(radii[nearest])
            else:
                radii[nearest] = min(float(radii[nearest]), distance / 2)
                radius = min(radius, distance / 2)
        keys[place], radii[place] = key, radius
        self._write_target(row, place, target)
        return place, True

    def _answers(self, row: int, place: int, target: Tensor) -> bool:
        held = self.memory["targets"][row, place]
        return torch.equal(held[held != IGNORED], target)

    def _write_target(self, row: int, place: int, target: Tensor) -> None:
        missing = max(len(target) - self.memory["targets"].shape[-1], 0)
        self.memory["targets"] = functional.pad(self.memory["targets"], (0, missing), value=IGNORED)
        held = self.memory["targets"][row, place]
        held[: len(target)], held[len(target) :] = target, IGNORED
