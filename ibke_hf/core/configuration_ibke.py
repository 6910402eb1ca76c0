"""Configuration of IBKE editors and the presets of SPEC §6. No torch in here."""

# Annotations are not postponed here: @strict checks the types of fields, and a type that is a text passes anything.
from collections.abc import Collection
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

PRESETS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2-xl": {"edited_modules": "transformer.h.{i}.mlp.c_proj", "edited_layers": [15, 16, 17]},
    "EleutherAI/gpt-j-6b": {"edited_modules": "transformer.h.{i}.mlp.fc_out", "edited_layers": [6, 7, 8]},
    "Qwen/Qwen3-1.7B": {"edited_modules": "model.layers.{i}.mlp.down_proj", "edited_layers": [6, 7, 8]},
    "Qwen/Qwen3-8B": {"edited_modules": "model.layers.{i}.mlp.down_proj", "edited_layers": [6, 7, 8]},
}
PRESET_DIMENSIONS = {
    "openai-community/gpt2-xl": (6400, 1600),
    "EleutherAI/gpt-j-6b": (16384, 4096),
    "Qwen/Qwen3-1.7B": (6144, 2048),
    "Qwen/Qwen3-8B": (12288, 4096),
}


@strict
class EditorConfig(PreTrainedConfig):
    """What every editor with weights says of itself.

    Args:
        base_model_name_or_path: Name or path of the model that the editor belongs to; ``backbone`` is another name of
            this field, which earlier versions saved it under.
    """

    attribute_map = {"backbone": "base_model_name_or_path"}  # noqa: RUF012  as transformers declares it

    base_model_name_or_path: str = ""


@strict
class GradientEditorConfig(EditorConfig):
    """What every editor that reads gradient factors needs to know of its backbone.

    Args:
        edited_modules: Name template of the edited projections, ``{i}`` standing for the layer.
        edited_layers: Indices of the edited layers.
        input_dims: d_in of each edited layer.
        output_dims: d_out of each edited layer.
        statistics_epsilon: ε of the standardisation (s - mean)/(std + ε) (SPEC §2.4).
        initial_edit_ratio: ‖side path‖ / ‖layer output‖ that η starts from (SPEC §3).
        capture_loss_scale: Scales the edit loss while gradients are in fp16.
        composition: How edits are carried together: ``"solve"``, each made on the unedited model, see
            :mod:`~ibke_hf.core.composition` [ours]; or the ``"sum"`` of their side paths, each made on the model that
            carries those before it [paper, UniEdit]. ``"auto"``, which a config that was saved without the field says
            too: solved together once the editor is trained, summed in training, as the paper does.
        ridge: λ of the solve, as a share of the mean diagonal.
        size_by_gradient: κ: an edit is multiplied by r / (r + κ), where r is the size of the request's gradient beside
            that of the calibration set, so that what a model knows already is hardly edited; 0 for edits whose size
            does not depend on it [ours, off].
        edit_rank: Rank that every edit is cut to, in training too; 0 for as many as its requests have tokens [ours,
            off].
        trained_edits_per_group: Records that training edited jointly (`edits_per_group`), 0 where that is not known;
            an edit of more requests is beyond what the editor has learnt.
    """

    edited_modules: str = ""
    edited_layers: list[int] | None = None
    input_dims: list[int] | None = None
    output_dims: list[int] | None = None
    statistics_epsilon: float | int = 1e-7
    initial_edit_ratio: float | int = 0.05
    capture_loss_scale: float | int = 1.0
    trained_edits_per_group: int = 0
    composition: str = "auto"
    ridge: float | int = 0.1
    size_by_gradient: float | int = 0.0
    edit_rank: int = 0

    def module_names(self) -> list[str]:
        """Return the full names of the edited projections."""
        return [self.edited_modules.format(i=layer) for layer in self.edited_layers or []]

    def validate_layers(self) -> None:
        """Check that the layer lists belong together."""
        lengths = {
            len(field) for field in (self.edited_layers, self.input_dims, self.output_dims) if field is not None
        }
        if len(lengths) > 1:
            raise ValueError("edited_layers, input_dims and output_dims name different numbers of layers")
        if self.edited_layers:
            require_template(self.edited_modules)
        if any(layer < 0 for layer in self.edited_layers or []):
            raise ValueError(f"edited_layers must be at least 0, found {self.edited_layers}")

    def validate_ranges(self) -> None:
        """Check the numbers shared by all gradient editors."""
        require_range(self, "statistics_epsilon", 0.0, 1.0)
        require_range(self, "initial_edit_ratio", 1e-8, 10.0)
        require_range(self, "capture_loss_scale", 1e-8, 1e8)
        require_range(self, "trained_edits_per_group", 0, 1_000_000_000)
        require_choice("composition", self.composition, ("auto", *COMPOSITIONS))
        require_range(self, "ridge", 1e-8, 1e8)
        require_range(self, "size_by_gradient", 0.0, 100.0)
        require_range(self, "edit_rank", 0, 65536)


@strict
class IBKEConfig(GradientEditorConfig):
    """Configuration of :class:`~ibke_hf.IBKEEditor`; the defaults are SPEC §6's.

    Args:
        latent_length: l_m, rows of the latent and of the learnable sequence ζ [paper: 10].
        latent_dim: d_m, the module dimension [settled: 1024].
        use_information_bottleneck: Off: z = μ and no ITM term (ablation).
        use_scale_factor: Off: σ(·) = 1 (ablation).
        attention_scale: Divide attention scores by sqrt(d_m) [settled].
        log_variance_range: Range that log v² is clamped to [settled].
        second_stage_heads: Attention heads of the second stage [1 as in Eq. 31; more are ours].
        second_stage_skip: Add a token-wise linear map of x to s̃ [ours, off in the paper's presets].
        second_stage_mlp: Width of an MLP block on s̃, 0 for none [ours, off in the paper's presets].
        dropout: Share of s̃ that is dropped in training [ours, off].
    """

    model_type = "ibke"

    latent_length: int = 10
    latent_dim: int = 1024
    use_information_bottleneck: bool = True
    use_scale_factor: bool = True
    attention_scale: bool = True
    log_variance_range: tuple[float | int, float | int] | list[float | int] = (-10.0, 10.0)  # JSON has lists alone
    second_stage_heads: int = 1
    second_stage_skip: bool = False
    second_stage_mlp: int = 0
    dropout: float | int = 0.0

    def validate_sizes(self) -> None:
        """Check the sizes of the hypernetwork."""
        require_range(self, "latent_length", 1, 4096)
        require_range(self, "latent_dim", 1, 65536)
        require_range(self, "second_stage_heads", 1, 1024)
        require_range(self, "second_stage_mlp", 0, 1_000_000)
        require_range(self, "dropout", 0.0, 0.9)
        bounds = self.log_variance_range
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(
                f"log_variance_range must be (low, high) with low < high, found {self.log_variance_range}"
            )
        if self.latent_dim % self.second_stage_heads:
            raise ValueError(
                f"latent_dim {self.latent_dim} must be divisible by second_stage_heads {self.second_stage_heads}"
            )

    @classmethod
    def from_preset(cls, backbone: str, **overrides: Any) -> "IBKEConfig":
        """Return the paper's configuration for one of the backbones of SPEC §6.

        Raises:
            ValueError: For a backbone without a preset; lists those that have one.
        """
        if backbone not in PRESETS:
            raise ValueError(
                f"no preset for {backbone!r}; presets: {', '.join(PRESETS)}. For another model use "
                f"IBKEEditor.for_backbone(model)"
            )
        d_in, d_out = PRESET_DIMENSIONS[backbone]
        number = len(PRESETS[backbone]["edited_layers"])
        half = backbone in ("EleutherAI/gpt-j-6b", "Qwen/Qwen3-8B")  # the paper runs these two in FP16
        settings = {
            **PRESETS[backbone],
            "base_model_name_or_path": backbone,
            "input_dims": [d_in] * number,
            "output_dims": [d_out] * number,
            "capture_loss_scale": 1024.0 if half else 1.0,
        }
        return cls(**{**settings, **overrides})


def require_range(config: Any, name: str, low: float, high: float) -> None:
    """Raise a ValueError that names the field and the allowed range unless low <= value <= high."""
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, found {value}")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise a ValueError that names the field and the choices unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")


def require_template(edited_modules: str) -> None:
    """Raise a ValueError unless a name template has a place for the layer."""
    if "{i}" not in edited_modules:
        raise ValueError(f"edited_modules must contain {{i}} in place of the layer's index, found {edited_modules!r}")


def require_mode(mode: str) -> None:
    """Raise a ValueError that names the modes unless `mode` is one of them."""
    require_choice("mode", mode, get_args(Mode))


def steps_of(mode: str, number: int) -> list[slice]:
    """Return which of so many requests are edited together, in turn: each alone in sequential mode, else all."""
    return [slice(k, k + 1) for k in range(number)] if mode == "sequential" else [slice(None)]


COMPOSITIONS = ("sum", "solve")
Composition = Literal["sum", "solve"]
Mode = Literal["joint", "sequential", "independent"]
