"""The hypernetwork of one edited layer: standardised gradient factors in, adapted factors out (Eq. 26-32)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_ibke import IBKEConfig


@dataclass(frozen=True)
class AdaptedFactors:
    """What a hypernetwork makes of the factors of b requests at one layer.

    Attributes:
        layer_inputs: ĥ, (b, l_e, d_in); zero on padding.
        output_gradients: û, (b, l_e, d_out); zero on padding.
        gates: f_{W_s}(s̃) before the sigmoid, (b, l_e); None for editors without a scale factor.
        latent: z, (b, l_m, d_m); None for editors without a latent, like the next two.
        mean: μ, (b, l_m, d_m).
        log_variance: log v², (b, l_m, d_m).
        step_size: η, (); None for that of the editor at the time. It is an output like the others, so that DDP, which
            wraps `forward`, reduces the gradient of η too.
    """

    layer_inputs: Tensor
    output_gradients: Tensor
    gates: Tensor | None = None
    latent: Tensor | None = None
    mean: Tensor | None = None
    log_variance: Tensor | None = None
    step_size: Tensor | None = None


class CrossAttention(nn.Module):
    """Cross-attention δ(q W_q (k W_k)ᵀ) k W_v with biases (Eq. 28), scores divided by sqrt(d_m / heads)."""

    def __init__(self, query_dim: int, key_dim: int, dim: int, *, scale: bool, heads: int = 1) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(key_dim, dim)
        self.value = nn.Linear(key_dim, dim)
        self.heads = heads
        self.scale = 1 / math.sqrt(dim // heads) if scale else 1.0

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, q, query_dim), (b, k, key_dim), mask (b, k) True on real keys -> (b, q, dim)."""
        q, k, v = (self._split(t) for t in (self.query(queries), self.key(keys), self.value(keys)))
        allowed = None if mask is None else mask[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class IBKEHypernetwork(nn.Module):
    """The hypernetwork of one edited layer: bottleneck (first stage) and adaptation (second stage)."""

    def __init__(self, config: IBKEConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        width, dim, scale = d_in + d_out, config.latent_dim, config.attention_scale
        self.config, self.d_in, hidden = config, d_in, config.second_stage_mlp
        self.queries = nn.Parameter(torch.empty(config.latent_length, dim))
        self.mean = CrossAttention(dim, width, dim, scale=scale)
        self.log_variance = CrossAttention(dim, width, dim, scale=scale) if config.use_information_bottleneck else None
        self.readout = CrossAttention(width, dim, dim, scale=scale, heads=config.second_stage_heads)
        self.skip = nn.Linear(width, dim) if config.second_stage_skip else None
        self.mlp = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            if hidden
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.residual = nn.Linear(dim, width)
        self.gate = nn.Linear(dim, 1) if config.use_scale_factor else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        sample: bool = False,
        gates: Tensor | None = None,
        with_variance: bool = True,
    ) -> AdaptedFactors:
        """Adapt standardised factors x (b, l_e, d_in + d_out); `gates` (b, l_e) override the pre-sigmoid gates."""
        latent, mean, log_variance = self.encode(x, mask, sample=sample, with_variance=with_variance)
        state = self.readout(x, latent)  # Eq. 31
        if self.skip is not None:
            state = state + self.skip(x)
        if self.mlp is not None:
            state = state + self.mlp(state)
        state = self.dropout(state)
        if gates is None and self.gate is not None:
            gates = self.gate(state).squeeze(-1)
        adapted = x + self.residual(state)  # Eq. 32
        if gates is not None:
            adapted = torch.sigmoid(gates).unsqueeze(-1) * adapted
        adapted = adapted * mask.unsqueeze(-1)  # after the residual, whose bias would fill padding rows
        layer_inputs, output_gradients = adapted.split([self.d_in, adapted.shape[-1] - self.d_in], -1)
        return AdaptedFactors(layer_inputs, output_gradients, gates, latent, mean, log_variance)

    def encode(
        self, x: Tensor, mask: Tensor, *, sample: bool, with_variance: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return z, μ and log v² (Eq. 26-30); every request draws its own ε, and without one v² may be left out."""
        queries = self.queries.expand(len(x), -1, -1)
        mean = self.mean(queries, x, mask)
        if self.log_variance is None or not (sample or with_variance):
            return mean, mean, None
        log_variance = self.log_variance(queries, x, mask).clamp(*self.config.log_variance_range)
        if not sample:
            return mean, mean, log_variance
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean), mean, log_variance
