"""Records on the Hub: a dataset with a card, which `datasets` and `read_records` read back without loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub
from markdown_tables import markdown_rows
from small_world import write_world

from ibke_hf.cli import main
from ibke_hf.data.folders import build_folder
from ibke_hf.data.rows import record_features, record_from_row
from ibke_hf.data.sources import read_records
from ibke_hf.hub.push import folder_kind, push_folder

datasets = pytest.importorskip("datasets")
ID = "org/world-records"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """What `ibke data build` makes of a small world."""
    build_folder(write_world(tmp_path / "facts"), tmp_path / "records", records=12, validation=0.25)
    return tmp_path / "records"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> LoopbackHub:
    """The stand-in, for `datasets` too, which has a switch of its own."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return hub


def test_records_come_back_by_datasets_and_by_read_records(online: LoopbackHub, records: Path, tmp_path: Path) -> None:
    push_folder(records, ID, private=True, metadata={"license": "cc0-1.0"})
    repository = online[f"datasets/{ID}"]
    assert repository.private and repository.titles == ["initial commit", "Add the records"]
    for split in ("train", "validation"):
        expected = list(read_records(records / split))
        rows = datasets.load_dataset(ID, split=split, cache_dir=str(tmp_path / "cache"))
        assert rows.features == record_features()
        assert [record_from_row(row) for row in rows] == expected
        assert list(read_records(ID, split=split, cache_dir=tmp_path / "hub")) == expected
    assert set(datasets.load_dataset(ID, cache_dir=str(tmp_path / "cache"))) == {"train", "validation"}


def test_the_card_counts_rows_and_says_how_to_load(online: LoopbackHub, records: Path) -> None:
    push_folder(records, ID, metadata={"license": "cc0-1.0"})
    card = DatasetCard.load(ID)
    assert card.data.license == "cc0-1.0"
    train, validation = (list(read_records(records / split)) for split in ("train", "validation"))
    for name, part in (("train", train), ("validation", validation)):
        cases = [sum(len(getattr(record, kind)) for record in part) for kind in ("requests", "generality", "locality")]
        assert [name, *map(str, (len(part), *cases))] in markdown_rows(card.text)
    assert (
        f'datasets.load_dataset("{ID}", split="train")' in card.text
        and f'read_records("{ID}", split="train")' in card.text
    )
    assert all(f"`{name}`" in card.text for name in record_features())


def test_a_second_push_replaces_the_files_of_its_splits(online: LoopbackHub, records: Path) -> None:
    push_folder(records, ID)
    rest = {name for name in online[f"datasets/{ID}"].files() if name.startswith("validation/")}
    (file,) = (records / "train").glob("*.json")
    file.rename(file.with_name("renamed.json"))
    shutil.rmtree(records / "validation")
    push_folder(records, ID)
    files = set(online[f"datasets/{ID}"].files())
    assert files == {
        ".gitattributes",
        "README.md",
        "train/renamed.json",
        "data/train.parquet",
        *rest,
    }  # which may be somebody's


def test_a_folder_of_files_is_one_split(online: LoopbackHub, records: Path) -> None:
    assert main(["push", str(records / "validation"), ID, "--create-pr"]) == 0
    files = online[f"datasets/{ID}"].files("refs/pr/1")
    assert "data/validation.parquet" in files and not [name for name in files if "train" in name]
    (records / "train").rename(records / "mine")
    assert folder_kind(records / "mine") == "records"
    assert main(["push", str(records / "mine"), "org/mine"]) == 0
    assert "data/train.parquet" in online["datasets/org/mine"].files()


def test_records_that_cannot_be_pushed_are_named(
    hub: LoopbackHub, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *options: str) -> None:
        assert main(["push", str(records), ID, *options]) == 2
        assert message in capsys.readouterr().err

    refused("--max-rank belongs to an edit", "--max-rank", "3")
    (records / "validation").rename(records / "held-out")
    refused("the split 'held-out' must be named by letters, digits and _")
    (records / "held-out").rename(records / "held_out")
    file = next((records / "held_out").glob("*.json"))
    content = json.loads(file.read_text())
    key = next(iter(content))
    file.write_text(json.dumps({key: {**content[key], "edit": 3}}))
    refused(file.name)
    file.write_text("{}")
    for other in (records / "held_out").glob("*.json"):
        if other != file:
            other.unlink()
    refused("no record in")
    assert hub.repositories == {}
