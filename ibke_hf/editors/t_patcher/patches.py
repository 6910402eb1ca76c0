"""What T-Patcher's edits are: patches of one FFN, which is a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional

from ...core.attachment import LayerHook
from ...core.layers import (
    BackboneError,
    device_of,
    dimensions,
    is_projection,
    modules_to_edit,
    plain_name,
)
from ..memory import MemoryEdit

Activation = Literal["relu", "gelu", "silu"]


@dataclass(frozen=True, eq=False)
class TPatcherEdit(MemoryEdit):
    """n independent sets of up to p patches of one FFN.

    `memory` holds ``keys`` (n, p, d), ``biases`` (n, p) and ``values`` (n, p, d_out) of the patches, and the
    ``queries`` (n, p, d) that they were trained to fire on, which later patches stay silent on; all are zero where a
    set has fewer patches. `settings` names the ``module`` (the FFN's output projection) and the ``activation``.
    """

    kind = "t_patcher"

    def __post_init__(self) -> None:
        """Refuse patches that lack a part."""
        super().__post_init__()
        shapes = {name: tuple(self.memory[name].shape) for name in ("keys", "biases", "values", "queries")}
        number = shapes["biases"]
        expected = {"keys": (*number, shapes["keys"][-1]), "biases": number, "values": (*number, shapes["values"][-1])}
        if len(number) != 2 or shapes != expected | {"queries": expected["keys"]}:
            raise ValueError(
                f"patches have keys and queries (n, p, d), biases (n, p) and values (n, p, d_out), found {shapes}"
            )
        if self.settings["activation"] not in get_args(Activation) or not isinstance(self.settings["module"], str):
            raise ValueError(f"the settings must name the module and the activation, found {dict(self.settings)}")

    @property
    def patches(self) -> list[int]:
        """Number of patches of each set."""
        counts: list[int] = (self.memory["queries"] != 0).any(-1).sum(-1).tolist()
        return counts

    def hooks(self, model: Any) -> Mapping[str, tuple[nn.Module, LayerHook]]:
        """Return the FFN and its patches."""
        name, module = patched_ffn(model, self.settings["module"])
        expected = (self.memory["keys"].shape[-1], self.memory["values"].shape[-1])
        widths = widths_of(model, self.settings["module"])
        if expected != widths:
            raise BackboneError(
                f"the patches expect {name} to map {expected[0]} to {expected[1]}, the model's maps {widths[0]} to "
                f"{widths[1]}; "
                "they were made for another backbone"
            )
        keys, biases, values = (
            self.memory[part].to(device_of(module)).float() for part in ("keys", "biases", "values")
        )
        return {name: (module, _patched(keys, biases, values, getattr(functional, self.settings["activation"])))}


def _patched(keys: Tensor, biases: Tensor, values: Tensor, activation: Any) -> LayerHook:
    """Return x (b, l, d), y (b, l, d_out) -> y + Σ_p Act(x·k_p + b_p) v_p, summed in fp32."""
    number = len(keys)

    def patch(x: Tensor, y: Tensor) -> Tensor:
        queries = x.float().reshape(number, -1, x.shape[-1])  # one set of patches serves all rows as one
        added = activation(queries @ keys.mT + biases.unsqueeze(1)) @ values
        return (y + added.reshape(y.shape)).to(y.dtype)

    return patch


def patched_ffn(model: Any, projection: str) -> tuple[str, nn.Module]:
    """Return, by name, the FFN module that an output projection is part of.

    Raises:
        BackboneError: If the model lacks the projection, or it lies in the decoder block itself, without an FFN module
            around it.
    """
    modules_to_edit(model, [projection])
    name = projection.rpartition(".")[0]
    if name.rpartition(".")[2].isdigit() or not name:
        raise BackboneError(
            f"{projection} lies in the decoder block {name!r} itself; T-Patcher needs an FFN that is a module of "
            f"its own"
        )
    ffn = next(module for full, module in model.named_modules() if plain_name(full) == name)
    return name, ffn


def widths_of(model: Any, projection: str) -> tuple[int, int]:
    """Return (d, d_out): the width of an FFN's input, which its first projection reads, and of its output."""
    _, ffn = patched_ffn(model, projection)
    first = next(module for module in ffn.modules() if is_projection(module))
    return dimensions(first)[0], dimensions(modules_to_edit(model, [projection])[projection])[1]
