"""Types of the editors' config fields are checked, and what JSON makes of them is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from ibke_hf import IBKEConfig
from ibke_hf.editors.mend import MENDConfig
from ibke_hf.editors.serac.config import SERACConfig

LAYERS: dict[str, Any] = {"edited_modules": "h.{i}", "edited_layers": [1], "input_dims": [4], "output_dims": [2]}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (IBKEConfig, "latent_length", "ten"),
        (IBKEConfig, "attention_scale", 3),
        (IBKEConfig, "log_variance_range", [None, 1]),
        (IBKEConfig, "edited_layers", "12"),
        (MENDConfig, "hidden_dim", 2.5),
        (MENDConfig, "edited_modules", 7),
        (SERACConfig, "threshold", "half"),
        (SERACConfig, "base_model_name_or_path", 1),
    ],
)
def test_a_field_of_a_wrong_type_is_named(kind: Any, field: str, value: Any) -> None:
    fields = {} if kind is SERACConfig else LAYERS
    with pytest.raises(StrictDataclassError, match=f"field '{field}'"):
        kind(**{**fields, field: value})


@pytest.mark.parametrize("kind", [IBKEConfig, MENDConfig])
def test_whole_numbers_and_lists_of_json_are_taken(kind: Any, tmp_path: Path) -> None:
    config = kind(**LAYERS, statistics_epsilon=0, capture_loss_scale=2)
    config.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert (again.statistics_epsilon, again.capture_loss_scale, again.edited_layers) == (0, 2, [1])
    if kind is IBKEConfig:
        assert tuple(again.log_variance_range) == config.log_variance_range
