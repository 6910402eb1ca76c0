"""Seeded options, prompts and settings through the command line: one clear error or a result, and nothing hangs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from command_runs import PROMPT, TARGET
from fuzzing import WORDS, Fuzz, commands_of, damaged

from ibke_hf.atlas import ASSETS
from ibke_hf.cli import build_parser

NAMES = ("prompt", "target", "subject", "neighbour")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_model")]


@pytest.mark.parametrize("seed", range(4))
def test_options(seed: int, fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    commands = list(commands_of(build_parser()))
    good = [str(store / name) for name in ("model", "editor", "edit")] + [PROMPT, TARGET, str(tmp_path / "out")]
    for _ in range(175):
        path, parser = rng.choice(commands)
        words = list(path)
        for action in parser._actions:
            if action.dest == "help" or not (action.required or rng.random() < 0.3):
                continue
            words += [rng.choice(action.option_strings)] if action.option_strings else []
            if action.nargs != 0:
                words += [rng.choice(WORDS if rng.random() < 0.7 else good) for _ in range(rng.randint(1, 2))]
        fuzz(*words)


def test_prompts(fuzz: Fuzz, store: Path) -> None:
    rng = random.Random(1)
    for _ in range(100):
        texts = [rng.choice([*WORDS, PROMPT, TARGET, "x " * 300]) for _ in range(4)]
        editor = rng.choice([store / "editor", "ft", "rome", store / "edit", store / "model", "mend", "none"])
        asked = [f"--{name}={text}" for name, text in zip(NAMES, texts, strict=True)]
        fuzz("edit", *asked, "--editor", editor, "--model", store / "model")


def test_training_settings(fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    training = {"max_steps": 1, "seed": 0, "beta": 0.1, "learning_rate": 1e-4, "per_device_train_batch_size": 1}
    settings = {
        "backbone": str(store / "model"),
        "records": [str(ASSETS / "records" / "validation" / "art.json")],
        "out": "out",
        "kind": "ibke",
        "layers": [1, 2],
        "dtype": "float32",
        "editor": {"latent_dim": 8, "latent_length": 2},
        "training": training,
    }
    for index in range(175):
        file = tmp_path / "settings.yaml"
        file.write_bytes(damaged(json.dumps(settings).encode(), rng))  # JSON is YAML
        fuzz("train", "--config", file, *rng.choice([[], ["--out", tmp_path / f"out{index}"]]))


@pytest.mark.parametrize("records", [True, False])
def test_table_settings(records: bool, fuzz: Fuzz, store: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    editors = {"ft": {"steps": 1, "layers": [1]}, "grace": {"steps": 1}, "mend": {"hidden_dim": 4}}
    settings: dict[str, Any] = {"layers": [1], "editors": editors, "training": {"max_steps": 1, "beta": 0.1}}
    file = ASSETS / "records" / "validation" / "art.json"
    trained = ["--records", file, "--editors", "none", "ft", "mend"] if records else ["--editors", "none", "ft"]
    options = ["--backbone", store / "model", "--datasets", tmp_path / "none.json", "--seeds", 1, "--limit", 1]
    for index in range(90):
        config = tmp_path / "settings.yaml"
        config.write_bytes(damaged(json.dumps(settings).encode(), rng))
        fuzz("table", *options, *trained, "--config", config, "--out", tmp_path / f"out{index}")
