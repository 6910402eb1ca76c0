"""The start of a training on many records: quick once they were read, in little memory, in an order over all files."""

from __future__ import annotations

import json
from pathlib import Path

from ibke_hf.benchmark.record_loading import write_records
from ibke_hf.cli import main
from ibke_hf.data.sources import read_records


def test_made_records_are_read_as_uniedit(tmp_path: Path) -> None:
    write_records(tmp_path / "train", 7, 3)
    records = list(read_records(str(tmp_path / "train")))
    assert len(records) == 7 and len({record.domain for record in records}) == 3
    assert all(record.generality[0].hops == 2 and record.locality and record.edits for record in records)


def test_records_are_at_hand_again_without_being_read_and_are_drawn_from_all_files(
    tmp_path: Path,
) -> None:
    assert main(["bench", "records", "--records", "500", "--json", str(tmp_path / "records.json")]) == 0
    results = {entry["name"]: entry for entry in json.loads((tmp_path / "records.json").read_text())}
    assert results["records_start_up"]["ratio"] < 0.5 and results["records_memory"]["ratio"] < 0.2
    assert results["records_start_up"]["ours"] < results["records_first_time"]["ours"]
    assert results["records_of_largest_file"]["shape"] == "500 drawn, over 25 files"
    page = (tmp_path / "records.md").read_text()
    assert "ibke bench records --records 500" in page
