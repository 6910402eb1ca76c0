"""Hyper-parameters of the search for a value, which ROME's and AlphaEdit's configs extend."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.configuration_ibke import require_range


@dataclass(frozen=True)
class LocateConfig:
    """Hyper-parameters of the search for a value.

    What depends on a model's scale is relative to ‖h‖, the hidden states after the edited layer's block at the
    subject: the change δ has to be seen beside them. Adam's step of 0.2 of their root mean square is the papers' 0.5
    where that is 2.5.

    Args:
        edited_modules: Name template of the edited projections, ``{i}`` standing for the layer.
        edited_layers: Indices of the edited layers.
        steps: Adam steps at most.
        learning_rate: Adam's step, relative to the root mean square of h.
        weight_decay: Weight of (‖δ‖ / ‖h‖)² in the objective.
        clamp: Largest ‖δ‖ / ‖h‖.
        kl_factor: Weight of the divergence on the essence prompt; 0 leaves it out.
        essence: The essence prompt, ``{}`` standing for the subject.
        stop_below: A request whose objective is below this is done.
        prefixes: Number of random texts that are put in front of the prompt, beside the bare prompt; 0 for none.
        prefix_tokens: Least and largest number of tokens of a prefix.
        prefix_source: ``"model"``: sampled from the model; ``"corpus"``: beginnings of texts of the key statistics'
            corpus.
        seed: Seeds the prefixes.
        texts_at_once: Texts of a forward pass: what bounds memory.
        loss_scale: Multiplies the loss before backward and divides the gradient in fp32 after it, for fp16 backbones.
    """

    edited_modules: str
    edited_layers: tuple[int, ...]
    steps: int = 20
    learning_rate: float = 0.2
    weight_decay: float = 1.5e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    essence: str = "{} is a"
    stop_below: float = 0.05
    prefixes: int = 20
    prefix_tokens: tuple[int, int] = (2, 10)
    prefix_source: str = "model"
    seed: int = 0
    texts_at_once: int = 256
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        if (
            not self.edited_layers
            or "{i}" not in self.edited_modules
            or len(set(self.edited_layers)) < len(self.edited_layers)
        ):
            fields = f"{self.edited_layers} and {self.edited_modules!r}"
            raise ValueError(
                f"edited_layers must be different layers, edited_modules must have {{i}} for their index, found "
                f"{fields}"
            )
        for name, low, high in (
            ("steps", 1, 100_000),
            ("learning_rate", 0.0, 100.0),
            ("weight_decay", 0.0, 1e6),
            ("clamp", 0.0, 1e6),
            ("kl_factor", 0.0, 1e6),
            ("stop_below", 0.0, 100.0),
            ("prefixes", 0, 10_000),
            ("texts_at_once", 1, 1_000_000),
            ("loss_scale", 1e-8, 1e8),
        ):
            require_range(self, name, low, high)
        low, high = self.prefix_tokens
        if not 1 <= low <= high <= 1000:
            raise ValueError(
                f"prefix_tokens must be (least, largest) with 1 <= least <= largest <= 1000, found "
                f"{self.prefix_tokens}"
            )
        if self.prefix_source not in ("model", "corpus"):
            raise ValueError(f"prefix_source must be model or corpus, found {self.prefix_source!r}")
        if "{}" not in self.essence:
            raise ValueError(f"essence must have {{}} in place of the subject, found {self.essence!r}")

    def module_names(self) -> list[str]:
        """Return the full names of the edited projections, the lowest layer first."""
        return [self.edited_modules.format(i=i) for i in sorted(self.edited_layers)]
