"""Records from files, folders and the Hub by one call, with filters and samples, and as rows of `datasets`."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from ibke_hf.data.fields import RecordError
from ibke_hf.data.rows import record_from_row, records_dataset
from ibke_hf.data.sources import read_records, recognise, select
from ibke_hf.data.uniedit import read_uniedit

Json = dict[str, Any]
Find = Callable[[str], Path]


def entity(name: str) -> Json:
    return {"id": f"Q-{name}", "label": name, "description": "", "aliases": [f"{name} again"]}


def uniedit(number: int) -> Json:
    """A record whose generality case has 1 to 3 hops in turn, and whose locality case has one."""

    def hop(i: int) -> Json:
        return {
            "path": ["h_e", "r_e", "t_e"] if i == 0 else [f"e_{i}", f"r_{i}", f"e_{i + 1}"],
            "reverse_in_multi_hop": False,
            "prompt": f"Place {number}.{i} lies in",
            "subject": "Place",
            "target": f"Land {i}",
            "head_entity": entity(f"{number}.{i}"),
            "property": {"id": f"P{i}", "label": "country"},
            "tail_entity": {"datatype": "wikibase-item", "value": entity(f"Land {i}")},
        }

    def case(hops: list[Json]) -> Json:
        paths = [[*h["path"], "f", "s"] for h in hops]
        return {
            "path_type": "single",
            "prompt": f"Case {number} is",
            "target": "Land",
            "paths": paths,
            "one_hops": hops,
        }

    hops = [hop(i) for i in range(number % 3 + 1)]
    return {"edit": hop(0), "generality": {"0": case(hops)}, "locality": {"0": case([hop(7)])}}


def flat(number: int) -> Json:
    return {
        "case_id": number,
        "prompt": "Oslo lies in",
        "target_new": "Norway",
        "subject": "Oslo",
        "ground_truth": "Denmark",
        "rephrase_prompt": "People in Oslo speak",
        "locality_prompt": "Ribe is in",
        "locality_ground_truth": "Denmark",
    }


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """UniEdit's layout: a folder for each split, a file for each domain, keys with gaps."""
    root = tmp_path / "UniEdit"
    for split, first in (("train", 0), ("test", 100)):
        for domain in ("art", "civil engineering"):
            write(root / split / f"{domain}.json", {str(first + 2 * i): uniedit(i) for i in range(6)})
    write(root / "dataset_infos.json", {})
    (root / "README.md").write_text("a card", encoding="utf-8")
    return root


def ids(records: Any) -> list[str]:
    return [record.id for record in records]


# --- files and folders ----------------------------------------------------------------------------------------------


def test_a_split_of_a_folder_is_read(layout: Path) -> None:
    train, test = (list(read_records(layout, split=split)) for split in ("train", "test"))
    assert ids(train) == [f"{domain}-{2 * i}" for domain in ("art", "civil engineering") for i in range(6)]
    assert ids(test) == [f"{domain}-{100 + 2 * i}" for domain in ("art", "civil engineering") for i in range(6)]
    assert list(read_records(str(layout / "train"))) == train
    assert list(read_records(layout / "test" / "art.json", split="train")) == test[:6]  # a file is what it is


def test_a_split_is_never_guessed(layout: Path) -> None:
    with pytest.raises(RecordError, match=r"UniEdit: holds the splits test, train; choose one with split$"):
        next(read_records(layout))
    with pytest.raises(
        RecordError, match=r"UniEdit: no record file of the split 'dev'; the splits found are: test, train$"
    ):
        next(read_records(layout, split="dev"))


def test_a_word_of_the_file_name_may_say_the_split(tmp_path: Path) -> None:
    for number, name in enumerate(("counterfact-train.json", "counterfact-val.json.gz", "counterfact_test.jsonl")):
        write(tmp_path / name, flat(number) if name.endswith("l") else [flat(number)])
    assert [ids(read_records(tmp_path, split=split)) for split in ("train", "val", "validation", "test")] == [
        ["0"],
        ["1"],
        ["1"],
        ["2"],
    ]
    with pytest.raises(RecordError, match="holds the splits test, train, validation"):
        next(read_records(tmp_path))
    write(tmp_path / "cities.json", [flat(9)])  # now a split is no more told by every name
    assert len(list(read_records(tmp_path))) == 4


def test_a_folder_of_another_name_may_be_a_split(layout: Path) -> None:
    shutil.move(layout / "test", layout / "held_out")
    assert len(list(read_records(layout, split="held_out"))) == 12


def test_formats_are_recognised_from_the_content(native_data: Find, tmp_path: Path) -> None:
    names = {
        "counterfact/rome_native_200": "counterfact",
        "counterfact/easyedit_flat_500": "counterfact",
        "zsre/zsre_mend_eval_24": "zsre",
        "zsre/knowedit_zsre_test_100": "zsre",
        "mquake/mquake_hard_200": "mquake",
        "uniedit/SYNTHETIC_schema_example": "uniedit",
    }
    for name, known in names.items():
        assert recognise(native_data(f"{name}.json")) == known
        assert recognise(shutil.copy(native_data(f"{name}.json"), tmp_path / "records.json")) == known


@pytest.mark.parametrize(
    ("content", "contents"),
    [
        ([{"question": "?", "answer": "!"}], "the keys answer, question"),
        ({"version": 1}, "no keys ('1')"),
        ([3], "no keys ('3')"),
    ],
)
def test_other_content_is_an_error_that_lists_the_formats(tmp_path: Path, content: Any, contents: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(RecordError) as caught:
        next(read_records(file))
    start = f"{file}: no known format; its first record has {contents}. Expected one of uniedit: edit + generality;"
    assert str(caught.value).startswith(start)
    with pytest.raises(
        RecordError, match=r"a.json: a UniEdit file is|a.json: record 'a-version': the record is not an object"
    ):
        next(read_records(file, format="uniedit"))


def test_wrong_options_are_refused_at_once(layout: Path) -> None:
    with pytest.raises(
        ValueError, match="format must be one of uniedit, mquake, counterfact, zsre, knowedit, qaedit, found 'json'"
    ):
        read_records(layout, format="json")
    with pytest.raises(ValueError, match="limit must be at least 1, found 0"):
        read_records(layout, limit=0)


def test_a_file_without_records_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "art.json", {})
    write(tmp_path / "history.json", {"1": uniedit(1)})
    skipped: Counter[str] = Counter()
    assert ids(read_records(tmp_path, skipped=skipped)) == ["history-1"]
    assert skipped == {"file without any record": 1}


def test_two_records_may_not_share_an_id(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.json", [flat(5)])
    with pytest.raises(RecordError, match=r"b.json: record '5' of 'counterfact' was read before"):
        list(read_records(tmp_path))
    (tmp_path / "art.json").write_text(
        f'{{"1": {json.dumps(uniedit(1))}, "1": {json.dumps(uniedit(2))}}}', encoding="utf-8"
    )
    with pytest.raises(RecordError, match=r"art.json: record 'art-1' of 'uniedit' was read before"):
        list(read_records(tmp_path / "art.json"))


# --- filters and samples --------------------------------------------------------------------------------------------


def test_domains_choose_files(layout: Path) -> None:
    (layout / "train" / "art.json").write_text("broken", encoding="utf-8")  # and no other file is opened
    assert {record.domain for record in read_records(layout, split="train", domains=["civil engineering"])} == {
        "civil engineering"
    }
    with pytest.raises(RecordError, match="no file of the domain engineering; found art, civil engineering"):
        next(read_records(layout, split="train", domains={"engineering", "art"}))


def test_domains_filter_records_too(layout: Path) -> None:
    skipped: Counter[str] = Counter()
    assert list(read_records(layout / "train" / "art.json", domains="history", skipped=skipped)) == []
    assert skipped == {"record of another domain": 6}


def test_hops_and_criteria_filter_cases(layout: Path) -> None:
    file = layout / "train" / "art.json"
    skipped: Counter[str] = Counter()
    filtered = list(read_records(file, hops={2, 3}, skipped=skipped))
    assert [[c.hops for c in r.generality + r.locality] for r in filtered] == [[2], [3], [2], [3]]
    assert skipped == {"case of other criteria or hops": 8, "record without a case of these criteria and hops": 2}
    assert all(len(r.requests) == 1 for r in filtered)
    whole = list(read_records(file))
    assert [len(r.generality) for r in select(whole, hops=1)] == [1, 0, 0, 1, 0, 0]
    multi = list(read_records(file, criteria="multi-hop"))
    assert multi == filtered
    assert list(read_records(file, criteria=["Rephrase", "Multi-Hop"], hops=3)) == [
        r for r in filtered if r.generality[0].hops == 3
    ]


def test_limit_takes_the_first_and_reads_no_further(layout: Path) -> None:
    (layout / "train" / "civil engineering.json").write_text("broken", encoding="utf-8")
    assert ids(read_records(layout, split="train", limit=6)) == [f"art-{2 * i}" for i in range(6)]
    assert ids(read_records(layout / "train" / "art.json", limit=2, hops=2)) == [
        "art-2",
        "art-8",
    ]  # of those that are left
    assert len(list(read_records(layout / "train" / "art.json", limit=99))) == 6


def test_a_seed_draws_records_uniformly_in_their_order(layout: Path) -> None:
    whole = ids(read_records(layout, split="train"))
    drawn = [ids(read_records(layout, split="train", limit=3, seed=seed)) for seed in range(400)]
    assert drawn[7] == ids(read_records(layout, split="train", limit=3, seed=7))
    assert all(sorted(some, key=whole.index) == some and len(set(some)) == 3 for some in drawn)
    counts = Counter(name for some in drawn for name in some)
    assert all(70 <= counts[name] <= 130 for name in whole)  # 100 expected, 8.7 the standard deviation
    assert (
        ids(read_records(layout, split="train", limit=99, seed=1))
        == whole
        == ids(read_records(layout, split="train", seed=1))
    )


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(layout: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the Hub that serves `layout` as qizhou/UniEdit; returns what was asked of it."""
    asked: list[Any] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def dataset_info(self, repository: str, *, revision: str | None = None) -> Any:
            asked.append((repository, revision, self.token))
            if repository != "qizhou/UniEdit":
                raise OSError("404 Client Error")
            files = [
                SimpleNamespace(rfilename=f.relative_to(layout).as_posix()) for f in layout.rglob("*") if f.is_file()
            ]
            return SimpleNamespace(sha="c0ffee", siblings=files)

    def download(repository: str, name: str, *, repo_type: str, revision: str, token: Any, cache_dir: Any) -> str:
        assert (repository, repo_type, revision) == ("qizhou/UniEdit", "dataset", "c0ffee")
        asked.append(name)
        return str(layout / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_hub_dataset_is_read_by_the_same_call(hub: list[Any], layout: Path) -> None:
    loaded = read_records("qizhou/UniEdit", split="test", revision="v1", token="secret")
    assert hub == []
    first = next(loaded)
    assert hub == [("qizhou/UniEdit", "v1", "secret"), "test/art.json"]  # one file at a time
    assert [first, *loaded] == list(read_records(layout, split="test"))
    assert hub[2:] == ["test/civil engineering.json"]


def test_only_wanted_files_are_downloaded(hub: list[Any]) -> None:
    assert len(list(read_records("qizhou/UniEdit", split="train", domains=["civil engineering"], limit=2))) == 2
    assert hub[1:] == ["train/civil engineering.json"]


@pytest.mark.parametrize("source", ["qizhou/UniEdit/train/art.json", "hf://datasets/qizhou/UniEdit/train/art.json"])
def test_a_path_in_a_hub_dataset_is_read(hub: list[Any], layout: Path, source: str) -> None:
    assert list(read_records(source)) == list(read_uniedit(layout / "train" / "art.json"))
    assert list(read_records("qizhou/UniEdit/train")) == list(read_records(layout, split="train"))


def test_what_is_neither_here_nor_on_the_hub_is_named(hub: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"someone/records: no file or folder here, .* \(404 Client Error\)"):
        next(read_records("someone/records"))
    with pytest.raises(RecordError, match="UniEdit: holds the splits test, train"):
        next(read_records("qizhou/UniEdit"))
    asked = len(hub)
    for path in (tmp_path / "records", Path("someone/records"), "records.json", "../no/records"):
        with pytest.raises(RecordError, match="no record file here; expected UniEdit JSON"):
            next(read_records(path))
    assert len(hub) == asked  # a path is no id


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_dataset_takes_the_filters_and_notices_a_change(
    layout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: Json = {"split": "train", "domains": {"art"}, "hops": [2, 3], "limit": 3, "seed": 1}
    expected = list(read_records(layout, **options))
    with caplog.at_level(logging.WARNING, "ibke_hf.data.rows"):
        assert [record_from_row(row) for row in records_dataset(layout, cache_dir=tmp_path, **options)] == expected
    assert "left out 2: record without a case of these criteria and hops" in caplog.text
    assert [record_from_row(row) for row in records_dataset(layout, streaming=True, **options)] == expected
    write(layout / "train" / "art.json", {"77": uniedit(1)})
    assert [row["id"] for row in records_dataset(layout, cache_dir=tmp_path, **options)] == ["art-77"]


def test_a_hub_dataset_streams(hub: list[Any]) -> None:
    stream = records_dataset("qizhou/UniEdit", streaming=True, split="train")
    assert hub == []
    assert next(iter(stream))["id"] == "art-0"
    assert hub[1:] == ["train/art.json"]


def test_an_unreadable_record_is_named_through_datasets(layout: Path, tmp_path: Path) -> None:
    write(layout / "train" / "art.json", {"3": {"edit": {"prompt": "p", "target": "t"}, "generality": {}}})
    with pytest.raises(RecordError, match=r"art.json: record 'art-3': field 'edit.tail_entity' is missing"):
        records_dataset(layout / "train" / "art.json", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        records_dataset(layout, limit=0)
    with pytest.raises(TypeError, match="colour"):
        records_dataset(layout, colour=1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    text = json.dumps(uniedit(2), indent=4)
    with (tmp_path / "art.json").open("w", encoding="utf-8") as handle:
        handle.write("{" + ",\n".join(f'"{2 * i}": {text}' for i in range(10_000)) + "}")
    assert (tmp_path / "art.json").stat().st_size > 40e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(tmp_path)) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6, f"{peak / 1e6:.1f} MB"


# --- slices and subjects ---------------------------------------------------------------------------------------------


def test_a_source_may_end_in_a_slice_of_its_records(layout: Path) -> None:
    every = ids(read_records(layout, split="train"))
    for slice_, expected in (("[:2]", every[:2]), ("[2:]", every[2:]), ("[1:3]", every[1:3]), ("[:]", every)):
        assert ids(read_records(f"{layout}{slice_}", split="train")) == expected
    assert ids(read_records(f"{layout}[1:]", split="train", limit=1)) == every[1:2]
    with pytest.raises(RecordError, match=r"no record file here|no file or folder here"):
        list(read_records(f"{layout}[-2:]"))


def test_a_file_that_is_named_like_a_slice_is_that_file(tmp_path: Path, layout: Path) -> None:
    file = next(path for path in layout.rglob("*.json") if "train" in path.as_posix())
    (tmp_path / "records[:1]").write_text(file.read_text())
    assert len(list(read_records(str(tmp_path / "records[:1]")))) == len(list(read_records(file)))


def test_records_of_some_subjects_are_left_out_and_counted(layout: Path) -> None:
    records = list(read_records(layout, split="train"))
    subject = next(iter(records[0].subjects))
    skipped: Counter[str] = Counter()
    kept = ids(read_records(layout, split="train", without={subject}, skipped=skipped))
    assert kept == [record.id for record in records if subject not in record.subjects]
    assert skipped["record of a subject to be kept out"] == len(records) - len(kept) > 0
