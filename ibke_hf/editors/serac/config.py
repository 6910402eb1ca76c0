"""SERAC's configuration, and which decoders its two parts start from."""

from typing import Any

from huggingface_hub.dataclasses import strict

from ...core.configuration_ibke import EditorConfig, require_choice, require_range
from ...core.tokens import (
    context_length,
)

FORMS = ("embedding", "cross")


@strict
class SERACConfig(EditorConfig):
    """Configuration of :class:`SERACEditor`.

    Args:
        scope_model: Config of the decoder that the scope classifier reads with, as a dict with its ``model_type``.
        counterfactual_model: Config of the counterfactual model, likewise.
        scope_form: ``"embedding"``: requests and prompts are embedded apart, so that a memory costs one pass over the
            prompt; or ``"cross"``: the classifier reads request and prompt together, once for each request in the
            memory.
        embedding_dim: Width of the embeddings.
        threshold: Least probability of being in scope [paper: 0.5].
        separator: Id of the token between request and prompt.
    """

    model_type = "serac"

    scope_model: dict[str, Any] | None = None
    counterfactual_model: dict[str, Any] | None = None
    scope_form: str = "embedding"
    embedding_dim: int = 128
    threshold: float | int = 0.5
    separator: int = 0

    def validate_fields(self) -> None:
        """Check the fields; a bad value names the field and what is allowed."""
        require_choice("scope_form", self.scope_form, FORMS)
        require_range(self, "embedding_dim", 1, 65536)
        require_range(self, "threshold", 0.0, 1.0)
        require_range(self, "separator", 0, 10_000_000)

    def module_names(self) -> list[str]:
        """Return the names of the edited layers: none."""
        return []


def vocabulary(model: Any) -> int:
    """Return the number of tokens that a model predicts."""
    return int(model.config.get_text_config().vocab_size)


def body(model: Any) -> Any:
    """Return a decoder without its vocabulary projection."""
    return getattr(model, model.base_model_prefix, model)


def plain_config(model: Any) -> dict[str, Any]:
    """Return a config as a dict that JSON and `AutoConfig.for_model` take."""
    content: dict[str, Any] = model.config.to_dict()
    left_out = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {name: value for name, value in content.items() if name not in left_out}


def small_config(model: Any) -> dict[str, Any]:
    """Return the config of a small decoder with the backbone's tokens: at most 512 wide and six layers deep."""
    config = model.config.get_text_config()
    heads = max(1, min(int(config.hidden_size), 512) // 64)
    return {
        "model_type": "llama",
        "vocab_size": int(config.vocab_size),
        "hidden_size": 64 * heads,
        "intermediate_size": 192 * heads,
        "num_hidden_layers": min(int(config.num_hidden_layers), 6),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2 * (context_length(model) or 1024),
        "tie_word_embeddings": True,
    }
