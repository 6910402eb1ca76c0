"""Few-shot augmentation: records of other datasets among those of a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from record_files import CITIES, Json
from training_runs import REQUIRED

from ibke_hf.data.augmentation import draw_records
from ibke_hf.training.recipe import train_editor, training_settings


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Ten records in another format, one of them without a target."""
    rows = [
        {
            "subject": city,
            "src": f"What is {city} known for?",
            "pred": "wine",
            "rephrase": f"For what is {city} known?",
            "alt": "" if i == 9 else f"cheese {i}",
            "answers": ["wine"],
            "loc": "nq question: where is the river",
            "loc_ans": "Thames",
            "cond": "",
        }
        for i, city in enumerate(CITIES + CITIES[:4])
    ]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    return str(tmp_path / "other.json")


def test_few_shot_records_are_drawn_with_a_seed_and_logged(other: str) -> None:
    records, (log,) = draw_records([other], 4, seed=1)
    assert [record.id for record in records] == log["ids"]
    assert {name: log[name] for name in ("source", "wanted", "drawn", "seed", "skipped")} == {
        "source": other,
        "wanted": 4,
        "drawn": 4,
        "seed": 1,
        "skipped": log["skipped"],
    }
    assert sum(log["skipped"].values()) == 1
    assert draw_records([other], 4, seed=1)[0] == records
    assert any(draw_records([other], 4, seed=seed)[0] != records for seed in range(2, 6))
    whole, (log,) = draw_records([other], 512, seed=1)
    assert (len(whole), log["wanted"], log["drawn"]) == (9, 512, 9)


def test_training_mixes_other_datasets_in(settings: Json, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "ibke_hf.training.trainer.GradientEditorTrainer.train",
        lambda self, **_: SimpleNamespace(
            training_loss=float(seen.append([r.dataset for r in self.train_dataset]) is None)
        ),
    )
    monkeypatch.setattr("ibke_hf.training.trainer.GradientEditorTrainer.save_model", lambda *_: None)
    monkeypatch.setattr("ibke_hf.training.trainer.GradientEditorTrainer.evaluate", lambda *_: {})
    train_editor({**settings, "augment": [other], "augment_records": 3})
    assert seen == [["uniedit"] * 4 + ["zsre"] * 3]
    (log,) = json.loads((Path(settings["out"]) / "augmentation.json").read_text())
    assert (log["source"], len(log["ids"])) == (other, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment_records": 0}, "augment_records must be a whole number of at least 1, found 0"),
        ({"augment_records": "many"}, "augment_records must be of type int, found 'many'"),
    ],
)
def test_a_bad_augmentation_is_named(change: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_settings(None, {**REQUIRED, **change}, {}, {})
