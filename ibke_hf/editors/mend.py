"""The MEND baseline (Mitchell et al. 2022, "Fast Model Editing at Scale"): token-wise MLPs on the gradient factors."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ..core.capture import GradientFactors
from ..core.configuration_ibke import GradientEditorConfig, require_range
from ..core.hypernetworks import AdaptedFactors
from ..core.modeling_ibke import GradientEditor


@strict
class MENDConfig(GradientEditorConfig):
    """Configuration of :class:`MENDEditor`.

    Args:
        hidden_dim: Width of the hidden layer of each residual block; below d_in + d_out it makes the block low-rank.
        blocks: Number of residual blocks.
        standardise: Standardise the factors as IBKE does; off, an untrained MEND is a plain gradient step.
    """

    model_type = "mend"

    hidden_dim: int = 1024
    blocks: int = 1
    standardise: bool = True

    def validate_sizes(self) -> None:
        """Check the sizes of the hypernetwork."""
        require_range(self, "hidden_dim", 1, 1_000_000)
        require_range(self, "blocks", 1, 64)

    @staticmethod
    def hidden_dim_for(
        parameters: int, input_dims: Sequence[int], output_dims: Sequence[int], *, blocks: int = 1
    ) -> int:
        """Return the hidden_dim whose MEND has about the given number of parameters, to compare editors of equal size.

        A layer of width w = d_in + d_out has blocks · (hidden_dim · (2 w + 1) + w) of them.
        """
        widths = [d_in + d_out for d_in, d_out in zip(input_dims, output_dims, strict=True)]
        return max(1, round((parameters / blocks - sum(widths)) / sum(2 * width + 1 for width in widths)))


class ZeroLinear(nn.Linear):
    """Linear map that starts at zero."""


class MENDBlock(nn.Module):
    """Residual block x + W_2 relu(W_1 x + b_1) + b_2 of one token; the identity at its start (W_2 = 0, b_2 = 0)."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden_dim)
        self.output = ZeroLinear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return x + self.output(torch.relu(self.hidden(x)))


class MENDHypernetwork(nn.Module):
    """g of one edited layer (Mitchell et al. 2022, Eq. 4): every token's h ⊕ u on its own, without a scale factor."""

    def __init__(self, config: MENDConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.blocks = nn.Sequential(*(MENDBlock(d_in + d_out, config.hidden_dim) for _ in range(config.blocks)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        sample: bool = False,
        gates: Tensor | None = None,
        with_variance: bool = True,
    ) -> AdaptedFactors:
        """Adapt factors x (b, l_e, d_in + d_out), zero on padding; MEND draws no latent, of which some options speak.

        Raises:
            ValueError: If gates are given.
        """
        if gates is not None:
            raise ValueError("MEND has no gates to override; leave gates out")
        adapted = self.blocks(x) * mask.unsqueeze(-1)  # after the blocks, whose biases would fill padding rows
        layer_inputs, output_gradients = adapted.split([self.d_in, adapted.shape[-1] - self.d_in], -1)
        return AdaptedFactors(layer_inputs, output_gradients)


class MENDEditor(GradientEditor):
    """Model Editor Networks with Gradient Decomposition, one hypernetwork per edited layer."""

    config_class = MENDConfig
    config: MENDConfig

    def build_hypernetwork(self, d_in: int, d_out: int) -> nn.Module:
        """Return the hypernetwork of one layer."""
        return MENDHypernetwork(self.config, d_in, d_out)

    def standardise(self, index: int, factors: GradientFactors) -> Tensor:
        """Return the standardised h ⊕ u, or h ⊕ u as it is where the config says so."""
        if self.config.standardise:
            return super().standardise(index, factors)
        return torch.cat((factors.layer_inputs, factors.output_gradients), -1)

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(
            module, ZeroLinear
        ):  # transformers skips modules without parameters of their own, such as the block
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


AutoConfig.register("mend", MENDConfig, exist_ok=True)
AutoModel.register(MENDConfig, MENDEditor, exist_ok=True)
