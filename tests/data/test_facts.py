"""Tables of facts: what is read, and that every bad row is reported by file and line, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_world import RELATION_HEADER, TWO_RELATIONS, append, write_world

from ibke_hf.data import facts
from ibke_hf.data.facts import FactsError, Triple, World, load_world, stable_id, unique_ids


def problems(folder: Path) -> list[str]:
    with pytest.raises(FactsError) as caught:
        load_world(folder)
    return [line.replace(f"{folder}/", "") for line in str(caught.value).splitlines()]


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_world_is_read_with_its_wordings_and_look_ups(tmp_path: Path) -> None:
    world = load_world(write_world(tmp_path / "north"))
    assert len(world.triples) == 80
    capital = world.relations["country_capital"]
    assert (capital.domain, capital.label, capital.subject_kind, capital.object_kind) == (
        "north",
        "capital",
        "country",
        "town",
    )
    assert capital.single_value
    assert capital.inverse_single
    assert not world.relations["country_export"].single_value
    assert capital.prompt("Alia") == "The capital of Alia is"
    assert capital.prompt("the country where Alton lies", 3) == "The country where Alton lies is governed from"
    assert capital.inverse_prompt("Alton") == "Alton is the capital of"
    assert world.aliases["Alia"] == ("Aila", "Old Aila")
    assert world.objects("Alia", "country_export") == {"tin", "wool", "salt"}
    assert len(world.entities) == len(set(world.entities)) == 8 + 24 + 6 + 5
    assert set(world.by_kind) == {"town", "country", "good", "year"}
    with pytest.raises(ValueError, match="no inverse wording"):
        world.relations["town_country"].inverse_prompt("Alia")


def test_folders_of_domains_make_one_world(tmp_path: Path) -> None:
    write_world(tmp_path / "towns", ("town_country",))
    write_world(tmp_path / "capitals", ("country_capital",), {"entities.tsv": "entity\taliases\n"})
    world = load_world(tmp_path)
    assert {name: relation.domain for name, relation in world.relations.items()} == {
        "town_country": "towns",
        "country_capital": "capitals",
    }
    assert len(world.triples) == 32


def test_the_current_folder_gives_a_domain_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_world(tmp_path / "north"))
    assert {relation.domain for relation in load_world(".").relations.values()} == {"north"}


def test_aliases_are_optional(tmp_path: Path) -> None:
    (write_world(tmp_path) / "entities.tsv").unlink()
    assert load_world(tmp_path).aliases == {}


def test_tables_written_by_spreadsheets_are_read(tmp_path: Path) -> None:
    plain = load_world(write_world(tmp_path / "a"))
    for file in write_world(tmp_path / "b").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load_world(tmp_path / "b").triples == plain.triples


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    append(write_world(tmp_path) / "triples.tsv", "Neu\u2028town\ttown_country\tAlia")
    assert Triple("Neu\u2028town", "town_country", "Alia") in load_world(tmp_path).triples


def test_a_world_without_some_triples_keeps_its_look_ups_right(tmp_path: Path) -> None:
    world = load_world(write_world(tmp_path))
    gone = [*world.by_subject["Alia"], world.triples[0]]
    smaller, rebuilt = world.without(gone), world.restricted_to([t for t in world.triples if t not in gone])
    assert tuple(smaller.triples) == rebuilt.triples
    for index in ("by_subject", "by_object", "by_relation"):
        assert {k: v for k, v in getattr(smaller, index).items() if v} == getattr(rebuilt, index)
    assert world.objects("Alia", "country_capital") == {"Alton"}  # the world itself is a value


# --- ids ------------------------------------------------------------------------------------------------------------


def test_ids_depend_on_the_name_alone(tmp_path: Path) -> None:
    assert stable_id("Q", "Alia") == stable_id("Q", "Alia") == unique_ids("Q", ["Boria", "Alia"])["Alia"]
    assert unique_ids("Q", ["Boria", "Alia"]) == unique_ids("Q", ["Alia", "Boria", "Alia"])


def test_entities_never_share_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts.zlib, "crc32", len)
    assert unique_ids("Q", ["ab", "cd", "efg"]) == {"ab": "Q2", "cd": "Q3", "efg": "Q4"}


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "what"),
    [
        ("relations.tsv", "town_country\tagain\ttown\tcountry\tyes\tno", "relation 'town_country' is defined twice"),
        (
            "relations.tsv",
            "new\tnew\ttown\tcountry\tmaybe\tno",
            "single_value and inverse_single are yes or no, found 'maybe' and 'no'",
        ),
        ("relations.tsv", "new\tnew\ttown\tcountry\tyes", "a row has 6 non-empty cells without outer spaces"),
        (
            "templates.tsv",
            "town_country\tverse\tWhere is {}?",
            "form is one of prompt, question, noun, inverse, inverse_noun, found 'verse'",
        ),
        ("templates.tsv", "town_country\tprompt\tThe country is", "a wording has exactly one {}"),
        ("templates.tsv", "town_country\tprompt\t{} or {} lies in", "a wording has exactly one {}"),
        ("templates.tsv", "town_country\tprompt\t{0} lies in", "a wording has exactly one {}"),
        ("templates.tsv", "town_country\tprompt\t{} lies in }", "a wording has exactly one {}"),
        ("templates.tsv", "town_land\tprompt\t{} lies in", "relation 'town_land' is not in relations.tsv"),
        (
            "templates.tsv",
            "town_country\tprompt\t{} lies in",
            "the prompt wording '{} lies in' of 'town_country' is given twice",
        ),
        ("triples.tsv", "Alton\ttown_land\tAlia", "relation 'town_land' is not in relations.tsv"),
        ("triples.tsv", "Alton\ttown_country\tAlia", "the row stands at"),
        (
            "triples.tsv",
            "Alton\ttown_country\tBoria",
            "'Alton' has two objects of the single-valued 'town_country': 'Alia'",
        ),
        (
            "triples.tsv",
            "Zia\tcountry_capital\tAlton",
            "'Alton' has two subjects of 'country_capital', whose inverse is single: 'Alia'",
        ),
        ("triples.tsv", "Alia\ttown_country\tBoria", "'Alia' is a 'town' here and a 'country' elsewhere; rename one"),
        ("triples.tsv", "Newtown\ttown_country\ttin", "'tin' is a 'country' here and a 'good' elsewhere; rename one"),
        ("triples.tsv", "Newtown\ttown_country\t Alia", "a row has 3 non-empty cells without outer spaces"),
        ("triples.tsv", "Newtown\ttown_country", "a row has 3 non-empty cells"),
        ("triples.tsv", "Newtown\ttown_country\t", "a row has 3 non-empty cells"),
        ("triples.tsv", "Newtown\ttown_country\tAlia\tsurely", "a row has 3 non-empty cells"),
        ("entities.tsv", "Boria\tAila", "alias 'Aila' belongs to 'Alia' already"),
        ("entities.tsv", "Boria\tCasia", "alias 'Casia' of 'Boria' is an entity's own name; leave it out"),
        ("entities.tsv", "Atlantis\tAtl", "entity 'Atlantis' is in no triple"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, table: str, row: str, what: str) -> None:
    line = append(write_world(tmp_path) / table, row)
    assert any(problem.startswith(f"{table}:{line}: {what}") for problem in problems(tmp_path))


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    folder = write_world(tmp_path)
    first = append(folder / "triples.tsv", "Alton\ttown_country\tBoria", "", "x", "Alton\tnowhere\tBoria")
    other = append(folder / "templates.tsv", "town_country\tprompt\tno gap")
    reported = problems(folder)
    assert [problem.split(" ")[0] for problem in reported] == [
        f"templates.tsv:{other}:",
        f"triples.tsv:{first}:",
        f"triples.tsv:{first + 2}:",
        f"triples.tsv:{first + 3}:",
    ]


def test_every_missing_wording_of_a_relation_is_reported(tmp_path: Path) -> None:
    append(write_world(tmp_path) / "relations.tsv", "bare\tbare\ttown\tcountry\tyes\tyes")
    append(tmp_path / "templates.tsv", "town_country\tinverse\t{} holds")
    report = "\n".join(problems(tmp_path))
    for what in ("1 noun wording", "1 inverse wording", "1 inverse_noun wording", "at least 2 prompt wordings"):
        assert f"relations.tsv:6: relation 'bare' needs {what}, found 0" in report
    assert (
        "relations.tsv:2: relation 'town_country' needs 0 inverse wording, found 1" in report
    )  # the inverse has many answers


@pytest.mark.parametrize("table", ["relations.tsv", "templates.tsv", "triples.tsv"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_missing_table_is_reported_with_its_columns(tmp_path: Path, table: str, nested: bool) -> None:
    write_world(tmp_path / "north", TWO_RELATIONS)
    write_world(tmp_path / "south", ("country_export",), {"entities.tsv": "entity\taliases\n"})
    (tmp_path / "south" / table).unlink()
    folder = tmp_path if nested else tmp_path / "south"
    assert any(
        f"south/{table}:1: the file is missing; its columns are " in f"south/{p.removeprefix('south/')}"
        for p in problems(folder)
    )


def test_a_wrong_header_and_an_empty_file_are_reported(tmp_path: Path) -> None:
    write_world(tmp_path, replaced={"triples.tsv": "Alton\ttown_country\tAlia\n", "entities.tsv": ""})
    reported = problems(tmp_path)
    assert (
        reported[0]
        == r"triples.tsv:1: the header is subject, relation, object between tabs, found 'Alton\ttown_country\tAlia'"
    )
    assert reported[1] == "entities.tsv:1: the header is entity, aliases between tabs, found ''"


def test_a_table_in_another_encoding_is_reported(tmp_path: Path) -> None:
    file = write_world(tmp_path) / "triples.tsv"
    line = append(file, "Zürich\ttown_country\tAlia")
    file.write_bytes(file.read_text(encoding="utf-8").encode("latin-1"))
    assert f"triples.tsv:{line}: not UTF-8 text; save the table as UTF-8" in problems(tmp_path)


@pytest.mark.parametrize("folder", ["nowhere", "empty", "file"])
def test_a_folder_without_tables_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=rf"{folder}: no relations.tsv"):
        load_world(tmp_path / folder)


def test_an_empty_world_is_a_world(tmp_path: Path) -> None:
    headers = {
        "relations.tsv": f"{RELATION_HEADER}\n",
        "templates.tsv": "relation\tform\ttext\n",
        "triples.tsv": "subject\trelation\tobject\n",
        "entities.tsv": "entity\taliases\n",
    }
    assert load_world(write_world(tmp_path, replaced=headers)) == World({}, ())
