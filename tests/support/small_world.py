"""A small world of facts, written as the four tables of a domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

STEMS = ("Al", "Bor", "Cas", "Del", "Elm", "Fen", "Gor", "Hal")


COUNTRIES = [f"{stem}ia" for stem in STEMS]


TOWNS = [f"{stem}{end}" for end in ("ton", "ville", "burg") for stem in STEMS]


GOODS = ["tin", "wool", "amber", "salt", "cork", "silk"]


RELATION_HEADER = "relation\tlabel\tsubject_kind\tobject_kind\tsingle_value\tinverse_single"


RELATIONS = {
    "town_country": (
        "country of the town\ttown\tcountry\tyes\tno",
        {"prompt": ["{} lies in", "The country of {} is", "{} is a town in"], "noun": ["the country where {} lies"]},
    ),
    "country_capital": (
        "capital\tcountry\ttown\tyes\tyes",
        {
            "prompt": ["The capital of {} is", "{} is governed from"],
            "noun": ["the capital of {}"],
            "inverse": ["{} is the capital of"],
            "inverse_noun": ["the country whose capital is {}"],
        },
    ),
    "country_export": (
        "export\tcountry\tgood\tno\tno",
        {"prompt": ["{} exports", "Among the exports of {} is"], "noun": ["an export of {}"]},
    ),
    "town_year": (
        "year of foundation\ttown\tyear\tyes\tno",
        {"prompt": ["{} was founded in", "The town of {} dates from"], "noun": ["the year in which {} was founded"]},
    ),
}


TWO_RELATIONS = ("town_country", "country_capital")


def world_triples() -> dict[str, list[tuple[str, str]]]:
    return {
        "town_country": [(town, COUNTRIES[i % 8]) for i, town in enumerate(TOWNS)],
        "country_capital": [(country, TOWNS[i]) for i, country in enumerate(COUNTRIES)],
        "country_export": [(country, GOODS[(i + j) % 6]) for i, country in enumerate(COUNTRIES) for j in (0, 1, 3)],
        "town_year": [(town, str(1200 + i % 5)) for i, town in enumerate(TOWNS)],
    }


def write_world(
    folder: Path, relations: tuple[str, ...] = tuple(RELATIONS), replaced: Mapping[str, str] | None = None
) -> Path:
    """Write a small world; `replaced` gives whole tables other contents."""
    templates = [
        f"{name}\t{form}\t{text}" for name in relations for form, texts in RELATIONS[name][1].items() for text in texts
    ]
    backwards = {name: name[::-1].title() for name in COUNTRIES + TOWNS[:12]}
    triples = [f"{subject}\t{name}\t{obj}" for name in relations for subject, obj in world_triples()[name]]
    tables = {
        "relations.tsv": [RELATION_HEADER, *(f"{name}\t{RELATIONS[name][0]}" for name in relations)],
        "templates.tsv": ["relation\tform\ttext", *templates],
        "triples.tsv": ["subject\trelation\tobject", *triples],
        "entities.tsv": ["entity\taliases", *(f"{name}\t{alias} | Old {alias}" for name, alias in backwards.items())],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        (folder / name).write_text((replaced or {}).get(name, "\n".join(lines) + "\n"), encoding="utf-8")
    return folder


def append(file: Path, *lines: str) -> int:
    """Append lines; return the number of the first one."""
    text = file.read_text(encoding="utf-8")
    file.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return text.count("\n") + 1
