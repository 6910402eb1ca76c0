"""ParaRel's and LRE's files become tables of facts, without the subjects that are to measure an editor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import SHARED

from ibke_hf.cli import main
from ibke_hf.data.facts import Triple, load_world
from ibke_hf.data.fields import RecordError
from ibke_hf.data.public_facts import write_tables
from ibke_hf.data.sources import read_records
from ibke_hf.data.subjects import edited_subjects

REAL = SHARED / "data"
EVALUATION = (
    "counterfact/easyedit_flat_500.json",
    "counterfact/rome_native_200.json",
    "zsre/zsre_mend_eval_24.json",
    "zsre/zsre_mend_train_500.json[420:]",
    "knowedit/zsre_test_1000.json",
    "mquake/mquake_cf_3k_200.json[140:]",
    "mquake/mquake_hard_200.json",
    "qaedit/qaedit_700.json",
)


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def pararel(tmp_path: Path) -> Path:
    """Capitals, of which one is told twice, one contradicts another, and one subject is its own object."""
    pairs = [("Aria", "Alto"), ("Borea", "Bell"), ("Aria", "Alto"), ("Borea", "Brim"), ("Cor", "Cor"), ("Dun", "Dale")]
    patterns = ["The capital of [X] is [Y] .", "[Y] is the capital of [X].", "[X], that has a [Y]", "[X] chose [Y],"]
    for name, rows in (
        ("triples", [{"sub_label": subject, "obj_label": obj, "uuid": "1"} for subject, obj in pairs]),
        ("patterns", [{"pattern": pattern} for pattern in patterns]),
    ):
        (tmp_path / "pararel" / name).mkdir(parents=True)
        (tmp_path / "pararel" / name / "P36.jsonl").write_text(lines(*rows))
    return tmp_path / "pararel"


@pytest.fixture
def lre(tmp_path: Path) -> Path:
    (tmp_path / "lre").mkdir()
    relation = {
        "prompt_templates": ["The capital of {} is", "no place for a subject"],
        "prompt_templates_zs": ["What is the capital of {}? It is the city of"],
        "samples": [{"subject": "Elba", "object": "Ems"}, {"subject": "Aria", "object": "Alto"}],
    }
    (tmp_path / "lre" / "country_capital_city.json").write_text(json.dumps(relation))
    return tmp_path / "lre"


def test_both_sources_make_one_relation(pararel: Path, lre: Path, tmp_path: Path) -> None:
    counts = write_tables(tmp_path / "facts", pararel=pararel, lre=lre, without={"dun"})
    assert counts == {
        "triples": 3,
        "relations": 1,
        "stated twice": 2,
        "another object or subject of a relation that has one alone": 1,
        "a name that is its own object": 1,
        "subject to be kept out": 1,
    }
    world = load_world(tmp_path / "facts")
    assert set(world.triples) == {
        Triple("Aria", "P36", "Alto"),
        Triple("Borea", "P36", "Bell"),
        Triple("Elba", "P36", "Ems"),
    }
    capital = world.relations["P36"]
    assert capital.domain == "geography"
    published = ("The capital of {} is", "{} chose", "What is the capital of {}? It is the city of")
    assert set(published) <= set(capital.prompts)
    assert not any("has a" in prompt or "no place" in prompt for prompt in capital.prompts)
    assert capital.question("Aria") == "What is the capital of Aria?"
    assert capital.inverse_prompt("Alto") == "Alto is the capital of"


def test_a_source_alone_is_enough(lre: Path, tmp_path: Path) -> None:
    assert write_tables(tmp_path / "facts", lre=lre)["triples"] == 2
    with pytest.raises(RecordError, match="no source of facts is given"):
        write_tables(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="empty: no triple of a known relation; no file"):
        write_tables(tmp_path / "none", pararel=tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pararel/triples/P36.jsonl", "[1]\n", "P36.jsonl.*is not an object"),
        ("pararel/triples/P36.jsonl", "{", "P36.jsonl: not valid JSON"),
        ("pararel/patterns/P36.jsonl", '{"pattern": 3}\n', "P36.jsonl.*'pattern' is not a text"),
        ("lre/country_capital_city.json", "[]", "country_capital_city.json"),
        ("lre/country_capital_city.json", "{}", "country_capital_city.json.*'samples' is missing"),
    ],
)
def test_a_broken_file_is_named(
    pararel: Path, lre: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(RecordError, match=message):
        write_tables(tmp_path / "facts", pararel=pararel, lre=lre)


def test_the_wordings_that_ship_make_every_relation(lre: Path, tmp_path: Path) -> None:
    """Each relation has what a table needs even where no publisher's file adds a wording."""
    from ibke_hf.data import public_facts

    for row in public_facts._cells(public_facts.WORDINGS / "relations.tsv"):
        name = row["relation"]
        folder = tmp_path / name
        (folder / "triples").mkdir(parents=True)
        (folder / "triples" / f"{name}.jsonl").write_text(lines({"sub_label": "A", "obj_label": "B"}))
        write_tables(folder / "facts", pararel=folder)
        relation = load_world(folder / "facts").relations[name]
        assert relation.questions, name
        assert all(question.endswith("?") for question in relation.questions), name


def test_the_command_says_what_was_left_out(
    pararel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_records: Callable[..., Path]
) -> None:
    measured = write_records(tmp_path / "measured.json", "Borea")
    out = tmp_path / "facts"
    assert main(["data", "facts", "--pararel", str(pararel), "--out", str(out), "--without", str(measured)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 2 triples of 1 relations" in printed
    assert "left out 2: subject to be kept out" in printed


@pytest.fixture
def write_records() -> Callable[..., Path]:
    def write(file: Path, *subjects: str) -> Path:
        file.write_text(
            json.dumps(
                [
                    {
                        "subject": s,
                        "src": f"What is {s}?",
                        "pred": "",
                        "rephrase": "",
                        "alt": "x",
                        "answers": [],
                        "loc": "",
                        "loc_ans": "",
                        "cond": "",
                    }
                    for s in subjects
                ]
            )
        )
        return file

    return write


# --- the real files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="the published files are not here")
def test_no_subject_of_an_evaluation_is_in_the_built_records(tmp_path: Path) -> None:
    measured = [str(REAL / name) for name in EVALUATION]
    facts, out = tmp_path / "facts", tmp_path / "records"
    sources = ["--pararel", str(REAL / "pararel"), "--lre", str(REAL / "relations")]
    assert main(["data", "facts", *sources, "--out", str(facts), "--without", *measured]) == 0
    build = [
        "--records",
        "300",
        "--generality",
        "1",
        "--locality",
        "1",
        "--question-rate",
        "0.5",
        "--novel-rate",
        "0.2",
    ]
    assert main(["data", "build", "--facts", str(facts), "--out", str(out), *build]) == 0
    subjects = edited_subjects(measured)
    assert len(subjects) > 2500
    world = load_world(facts)
    assert len(world.triples) > 30_000
    assert not subjects & {triple.subject.casefold() for triple in world.triples}
    trained = [record for split in ("train", "validation") for record in read_records(out / split)]
    assert len(trained) == 330
    assert not any(subjects & record.subjects for record in trained)
    hops = (hop for record in trained for case in (*record.generality, *record.locality) for hop in case.facts)
    assert not subjects & {str(hop.subject).casefold() for hop in hops}
