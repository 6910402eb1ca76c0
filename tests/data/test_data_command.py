"""`ibke data build`: the folder that it writes, and the input that it refuses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_world import TWO_RELATIONS, append, write_world

from ibke_hf.cli import main
from ibke_hf.core.records import EditRecord, collides
from ibke_hf.data.files import record_files
from ibke_hf.data.folders import build_folder, write_records
from ibke_hf.data.sources import read_records
from ibke_hf.data.uniedit import RecordError


def read_files(paths: list[Path]) -> Iterator[EditRecord]:
    return itertools.chain.from_iterable(map(read_records, paths))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a foreign world of two relations, built by the command line."""
    root = tmp_path_factory.mktemp("foreign")
    facts = write_world(root / "middle earth", TWO_RELATIONS)
    assert (
        main(
            [
                "data",
                "build",
                "--facts",
                str(facts),
                "--out",
                str(root / "out"),
                "--records",
                "60",
                "--validation",
                "0.2",
            ]
        )
        == 0
    )
    return root


def test_train_and_validation_have_disjoint_subjects(folder: Path) -> None:
    sets = {name: list(read_files([folder / "out" / name])) for name in ("train", "validation")}
    assert {name: len(records) for name, records in sets.items()} == {"train": 60, "validation": 12}
    train, validation = ({record.requests[0].subject for record in records} for records in sets.values())
    assert not train & validation
    for record in itertools.chain(*sets.values()):
        assert record.domain == "middle earth"
        assert record.id.startswith("middle earth-")
        assert 1 <= len(record.generality) <= 3
        assert len(record.locality) == 2
        assert not any(collides(case, record.edits) for case in record.locality)
    assert Counter(record.kind for record in sets["train"]) == {"counterfactual": 30, "unknown": 30}


def test_two_relations_give_every_generality_criterion(folder: Path) -> None:
    records = list(read_files([folder / "out" / "train"]))
    criteria = {criterion for record in records for case in record.generality for criterion in case.criteria}
    assert criteria == {
        "Rephrase",
        "Multi-Hop",
        "Relation Reverse",
        "Same-Entity Reasoning",
        "Subject Alias",
        "Object Alias",
    }
    locality = {criterion for record in records for case in record.locality for criterion in case.criteria}
    assert locality == {
        "Relation Specificity",
        "Object Specificity",
        "Multi-Hop",
        "Same-Entity Reasoning",
    }  # no subject has two relations
    assert {case.hops for record in records for case in record.generality} == {1, 2, 3}


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.json"))}


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_folder(folder / "middle earth", tmp_path / name, records=60, validation=0.2, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(folder / "out")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_the_command_prints_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, out = folder / "middle earth", tmp_path / "out"
    assert (
        main(["data", "build", "--facts", str(facts), "--out", str(out), "--records", "8", "--validation", "0"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[0] == f"{out / 'train'}: 8 records"
    assert not (out / "validation").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"records": 0}, "at least 1"),
        ({"generality": 0}, "at least 1"),
        ({"locality": -1}, "at least 1"),
        ({"validation": 1.0}, "validation must be in"),
        ({"validation": -0.1}, "validation must be in"),
        ({"validation": 0.01, "records": 60}, "no validation record can be built"),
    ],
)
def test_numbers_out_of_range_are_refused(folder: Path, tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build_folder(folder / "middle earth", tmp_path, **options)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_triple_gets_both_kinds_of_edit_in_turn(tmp_path: Path, left_out: int) -> None:
    triples = write_world(tmp_path / "facts", TWO_RELATIONS) / "triples.tsv"
    lines = triples.read_text(encoding="utf-8").splitlines()
    triples.write_text("\n".join(lines[: len(lines) - left_out]) + "\n", encoding="utf-8")
    build_folder(tmp_path / "facts", tmp_path / "out", records=4 * len(lines), validation=0)
    kinds: dict[str, set[str]] = {}
    for record in read_files([tmp_path / "out" / "train"]):
        kinds.setdefault(record.requests[0].prompt, set()).add(record.kind)
    assert all(edit_kinds == {"counterfactual", "unknown"} for edit_kinds in kinds.values())


def test_tables_that_give_no_record_are_refused(tmp_path: Path) -> None:
    relation = "lies\tlies in\ttown\tcountry\tyes\tno"
    only = {
        "relations.tsv": f"relation\tlabel\tsubject_kind\tobject_kind\tsingle_value\tinverse_single\n{relation}\n",
        "templates.tsv": "relation\tform\ttext\nlies\tprompt\t{} lies in\nlies\tprompt\t{} is "
        "in\nlies\tnoun\tthe country of {}\n",
        "triples.tsv": "subject\trelation\tobject\nAlton\tlies\tAlia\n",
        "entities.tsv": "entity\taliases\n",
    }
    with pytest.raises(ValueError, match="no train record can be built; add triples"):
        build_folder(write_world(tmp_path / "facts", replaced=only), tmp_path / "out", validation=0)


def test_bad_rows_are_printed_one_a_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = append(
        write_world(tmp_path / "facts", TWO_RELATIONS) / "triples.tsv", "Alton\ttown_country\tBoria", "nonsense"
    )
    assert main(["data", "build", "--facts", str(tmp_path / "facts"), "--out", str(tmp_path / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"ibke data build: {tmp_path / 'facts' / 'triples.tsv'}:{line}: 'Alton' has two objects")
    assert second.startswith(f"{tmp_path / 'facts' / 'triples.tsv'}:{line + 1}: a row has 3 non-empty cells")
    assert not (tmp_path / "out").exists()


def test_records_of_other_facts_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    build_folder(folder / "middle earth", tmp_path, records=8, validation=0)
    build_folder(folder / "middle earth", tmp_path, records=4, validation=0)  # again is fine
    assert len(list(read_files([tmp_path / "train"]))) == 4
    with pytest.raises(ValueError, match=r"holds other record files already \(middle earth.json\)"):
        write_records([("elsewhere", {})], tmp_path / "train")


def test_files_and_folders_are_read(folder: Path, tmp_path: Path) -> None:
    (file,) = record_files(folder / "out" / "train")
    assert list(read_files([file, folder / "out" / "validation"])) == [
        *read_files([folder / "out" / "train"]),
        *read_files([folder / "out" / "validation"]),
    ]
    for missing in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(RecordError, match="no record file here; expected UniEdit JSON, see `ibke data build`"):
            list(read_files([missing]))
