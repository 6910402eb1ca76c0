"""Training on backbones that a `device_map` spreads gives the losses of a backbone in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from spread_models import HALF_ON_DISK, offloaded, on_two_devices
from training_runs import arguments, assert_equal_weights, new_editor, record, weights
from two_devices import two_devices

from ibke_hf.cli import main
from ibke_hf.training.trainer import IBKETrainer, RecordDataset

TINY = {"tie_word_embeddings": False, "attn_implementation": "eager"}  # whose kernels are the same everywhere


def trained(backbone: Any, tokenizer: Any, folder: Path, composition: str = "sum", **options: Any) -> IBKETrainer:
    trainer = IBKETrainer(
        new_editor(backbone, composition=composition),
        backbone=backbone,
        args=arguments(folder, **options),
        processing_class=tokenizer,
        train_dataset=RecordDataset([record(i, 2, 1, hops=1) for i in range(2)]),
    )
    trainer.train()
    return trainer


def losses(trainer: IBKETrainer) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "grad_norm") if name in entry]


@pytest.mark.parametrize("kept", [False, True], ids=["computed", "activations kept"])
def test_a_step_on_two_devices_is_that_on_one(
    kept: bool, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    caches = [{"activation_cache": str(tmp_path / f"cache of {name}")} if kept else {} for name in ("one", "two")]
    whole = trained(tiny_model(**TINY), tiny_tokenizer, tmp_path / "one", "solve", max_steps=1, **caches[0])
    with two_devices() as devices:
        spread = on_two_devices(tiny_model(**TINY), *devices)
        steps = losses(trained(spread, tiny_tokenizer, tmp_path / "two", "solve", max_steps=1, **caches[1]))
    assert steps == pytest.approx(losses(whole), rel=1e-4) and len(steps) == 2


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_training_on_offloaded_layers_is_training_on_resident_ones(
    where: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    backbones = (tiny_model(**TINY), offloaded(tiny_model(**TINY), where, tmp_path / "offload"))
    runs = [trained(each, tiny_tokenizer, tmp_path / str(i), max_steps=3) for i, each in enumerate(backbones)]
    assert losses(runs[0]) == losses(runs[1])
    assert_equal_weights(*(weights(run.editor) for run in runs))


def test_the_command_trains_on_a_backbone_with_layers_on_the_disk(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "places.yaml").write_text(yaml.safe_dump(HALF_ON_DISK))
    del settings["validation"], settings["training"]["eval_steps"]
    saved = []
    for name, options in (("whole", []), ("spread", ["--device-map", str(tmp_path / "places.yaml")])):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**settings, "out": str(tmp_path / name)}))
        assert main(["train", "--config", str(tmp_path / "settings.yaml"), *options]) == 0
        saved.append((tmp_path / name / "model.safetensors").read_bytes())
    assert saved[0] == saved[1]
