"""What the tests of whole trainings share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_files import CITIES, Json, write_records


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Json:
    """Settings of a training in a folder of its own, on two record files."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    return {
        "backbone": str(tmp_path / "backbone"),
        "out": str(tmp_path / "editor"),
        "layers": [1, 2],
        "dtype": "float32",
        "records": [write_records(tmp_path / "train.json", CITIES[:4])],
        "validation": [write_records(tmp_path / "held.json", CITIES[4:])],
        "editor": {"latent_dim": 8, "latent_length": 2},
        "choose_step_size": False,  # which takes longer than these trainings
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "eval_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
        },
    }
