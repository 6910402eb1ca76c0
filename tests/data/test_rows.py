"""Records as rows of a dataset, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ibke_hf.core.records import EditCase, EditRecord, EditRequest, Hop
from ibke_hf.data.rows import record_features, record_from_row, record_row, records_dataset
from ibke_hf.data.sources import read_records

Find = Callable[[str], Path]


HOP = Hop("p", "t", "Q1", "P1", "time:{'time': '+1869'}", False, None)


CASE = EditCase("p", " t", ("A", "B"), 3, 1, ("u",), (HOP,), (HOP, HOP), "list")


FULL = EditRecord(
    "1",
    "d",
    "x y",
    (EditRequest("p", "t\n", "s"), EditRequest("q", "ü😀")),
    (CASE, CASE),
    (EditCase("p", "t"),),
    (HOP,),
    "unknown",
    "r",
    {"original": "o", "b": ""},
)


BARE = EditRecord("2", "", "", (EditRequest("p", "t"),))


@pytest.mark.parametrize("record", [FULL, BARE])
def test_rows_are_records_again(record: EditRecord) -> None:
    import datasets

    assert record_from_row(record_row(record)) == record
    assert record_from_row(json.loads(json.dumps(record_row(record)))) == record
    table = datasets.Dataset.from_list([record_row(record)], features=record_features())
    assert record_from_row(table[0]) == record


@pytest.mark.parametrize(
    "name",
    [
        "counterfact/rome_native_200",
        "zsre/knowedit_zsre_test_100",
        "mquake/mquake_cf_3k_200",
        "uniedit/SYNTHETIC_schema_example",
    ],
)
def test_samples_go_through_datasets_and_back(native_data: Find, tmp_path: Path, name: str) -> None:
    source = native_data(f"{name}.json")
    whole = list(read_records(source))
    table = records_dataset(source, cache_dir=tmp_path)
    stream = records_dataset(source, streaming=True)
    assert table.features == stream.features == record_features()
    assert [record_from_row(row) for row in table] == whole == [record_from_row(row) for row in stream]
