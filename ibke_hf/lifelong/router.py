"""The router: tells from what a model has computed below its lowest edited layer which edits a prompt is about.

A prompt and a request are each pooled to one vector, with attention over the tokens' states at a few layers; an edit
is picked where the two are near. Pooling is a sum over tokens, so that a prompt that comes in parts (a cache that is
filled piece by piece, another turn of a chat) is read part by part, at the memory of one vector a row.
"""

# Annotations are not postponed here: @strict checks the types of fields.
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional

from ..core.configuration_ibke import EditorConfig, require_range
from ..core.editor_model import EditorModel
from ..core.layers import BackboneError
from .reading import Sources, dimension_of, sources_of


@strict
class RouterConfig(EditorConfig):
    """What a router reads, and when it picks an edit.

    Args:
        sources: Names of the modules whose outputs are read, below the lowest edited layer.
        lowest: Name of the lowest edited layer, whose input is read too.
        source_dims: Width of each of these states, the input of the lowest layer last.
        width: Width of a token's features.
        heads: Attention heads of a pooling.
        dim: Entries of the vector of a prompt or request.
        dropout: Share of the features that training leaves out.
        threshold: Similarity (a cosine) above which an edit is picked; chosen on validation records.
        most_edits: k, edits that one row carries at most.
    """

    model_type = "ibke_router"

    sources: list[str] | None = None
    lowest: str = ""
    source_dims: list[int] | None = None
    width: int = 192
    heads: int = 4
    dim: int = 128
    dropout: float | int = 0.0
    threshold: float | int = 0.5
    most_edits: int = 2

    def validate_sizes(self) -> None:
        """Check the numbers."""
        for name, high in (("width", 65536), ("heads", 1024), ("dim", 65536), ("most_edits", 64)):
            require_range(self, name, 1, high)
        require_range(self, "threshold", -1.0, 1.0)
        require_range(self, "dropout", 0.0, 0.9)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        if self.source_dims and len(self.source_dims) != len(self.sources or []) + 1:
            raise ValueError("source_dims must name one width for each of sources, and one for the lowest layer")


class Pooled(NamedTuple):
    """Sums over the tokens that were read so far, of b rows and H heads.

    Attributes:
        largest: (b, H) the largest score, -inf where no token was read.
        weight: (b, H) sum of exp(score - largest).
        values: (b, H, width / H) the values in that weighting.
    """

    largest: Tensor
    weight: Tensor
    values: Tensor

    def merged(self, other: "Pooled") -> "Pooled":
        """Return the sums over the tokens of both."""
        largest = torch.maximum(self.largest, other.largest)
        scale, other_scale = (_scale(part.largest, largest) for part in (self, other))
        return Pooled(
            largest,
            self.weight * scale + other.weight * other_scale,
            self.values * scale[..., None] + other.values * other_scale[..., None],
        )

    def select(self, rows: Tensor) -> "Pooled":
        """Return some of the rows."""
        return Pooled(*(part.index_select(0, rows.to(part.device)) for part in self))


def _scale(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(old.isneginf(), torch.zeros_like(old), (old - new).exp())


class Pooling(nn.Module):
    """Pools the features of tokens to one vector: of a prompt, or of a request.

    Both are pooled by the same weights, so that like texts are near each other before anything is learnt; each has its
    own attention, which tells what counts of a question and of a statement with its answer.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.heads = config.heads
        # without biases: a softmax takes no notice of one
        self.question = nn.Linear(config.width, config.heads, bias=False)
        self.request = nn.Linear(config.width, config.heads, bias=False)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.dim)
        self.norm = nn.LayerNorm(config.width)
        self.hidden = nn.Linear(config.width, 2 * config.width)
        self.residual = nn.Linear(2 * config.width, config.dim)

    def pool(self, features: Tensor, mask: Tensor, *, requests: bool = False) -> Pooled:
        """Sum over the tokens (b, l, width) that the mask (b, l) keeps."""
        score = self.request if requests else self.question
        scores = score(features).masked_fill(~mask[..., None], -torch.inf)
        largest = scores.max(1).values
        weights = _scale(scores, largest[:, None])
        values = self.value(features).unflatten(-1, (self.heads, -1))
        return Pooled(largest, weights.sum(1), torch.einsum("blh,blhd->bhd", weights, values))

    def forward(self, pooled: Pooled) -> Tensor:
        """Return the unit vectors (b, dim) of what was pooled; zero where no token was."""
        mean = (pooled.values / pooled.weight.clamp(min=1e-30)[..., None]).flatten(1)
        vectors = self.out(mean) + self.residual(functional.gelu(self.hidden(self.norm(mean))))
        return functional.normalize(vectors, dim=-1) * (pooled.weight[:, :1] > 0)


class Router(EditorModel):
    """Maps the states of prompts and of requests to vectors that are near where the prompt is about the request."""

    config_class = RouterConfig
    base_model_prefix = "router"
    config: RouterConfig

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        if not config.source_dims:
            raise ValueError("the config names no states to read; use Router.for_backbone(model, layers)")
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for d in config.source_dims)
        self.readers = nn.ModuleList(nn.Linear(d, config.width) for d in config.source_dims)
        self.pooling = Pooling(config)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.none = nn.Parameter(torch.tensor(0.5))  # similarity that stands for "no edit" in training
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load a router, as transformers does; it is computed in fp32 whatever it was stored in."""
        return super().from_pretrained(*args, **{"dtype": torch.float32, **options})

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Pooling):
            for weight in (module.question.weight, module.request.weight, module.residual.weight):
                nn.init.zeros_(weight)  # training starts from the mean over all tokens
        elif module is self:
            nn.init.constant_(self.log_scale, 3.0)
            nn.init.constant_(self.none, 0.5)

    @classmethod
    def for_backbone(cls, model: Any, layers: Sequence[str], **config: Any) -> "Router":
        """Build an untrained router for the editors of a model that edit these layers.

        Args:
            model: The backbone.
            layers: Full names of the edited layers, such as ``model.layers.3.mlp.down_proj``.
            config: Further fields of the config.

        Raises:
            BackboneError: If the model lacks the layers, or its blocks are in no list.
        """
        sources = sources_of(model, layers)
        fields = {
            "base_model_name_or_path": getattr(model.config, "name_or_path", "") or "",
            "sources": list(sources.names),
            "lowest": sources.lowest,
            "source_dims": list(sources.dims),
        }
        return cls(RouterConfig(**{**fields, **config}))

    @property
    def sources(self) -> Sources:
        """What the router reads."""
        return Sources(tuple(self.config.sources or ()), self.config.lowest, tuple(self.config.source_dims or ()))

    def require_backbone(self, model: Any) -> None:
        """Refuse a model that lacks what the router reads.

        Raises:
            BackboneError: Names the module and both widths.
        """
        sources = self.sources
        modules = sources.modules(model)
        for (name, module), width in zip(modules.items(), sources.dims, strict=True):
            found = dimension_of(model, name, module, sources.lowest)
            if found is not None and found != width:
                raise BackboneError(
                    f"the router was trained for {self.config.base_model_name_or_path or 'a model'} where {name} is "
                    f"{width} wide, this model's is {found}; train one for it: ibke train-router"
                )
        self.warn_of_other_backbone(model)

    def features(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Return the features (b, l, width) of tokens from their states (b, l, d) at each source; zero on padding."""
        parts = [
            reader(norm(state[mask].float()))
            for norm, reader, state in zip(self.norms, self.readers, states, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        features = functional.dropout(functional.gelu(total), self.config.dropout, self.training)
        return features.new_zeros(*mask.shape, features.shape[-1]).index_put(mask.nonzero(as_tuple=True), features)

    def forward(self, states: Sequence[Tensor], mask: Tensor, *, requests: bool = False) -> Tensor:
        """Return the vectors (b, dim) of prompts, or of requests, whose real tokens the mask (b, l) tells."""
        vectors: Tensor = self.pooling(self.pool(states, mask, requests=requests))
        return vectors

    def pool(self, states: Sequence[Tensor], mask: Tensor, *, requests: bool = False) -> Pooled:
        """Return what is summed over the tokens of prompts, or of requests; :attr:`pooling` makes a vector of it."""
        pooled: Pooled = self.pooling.pool(self.features(states, mask), mask, requests=requests)
        return pooled


def digest_of(router: Router) -> str:
    """Return what tells a router apart from all others: a digest of its weights."""
    known = vars(router).get("_digest")
    if known is None:
        digest = hashlib.sha256()
        for name, tensor in sorted(router.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        known = vars(router)["_digest"] = digest.hexdigest()[:16]
    return str(known)
