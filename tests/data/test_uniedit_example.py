"""UniEdit's schema example, read whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from paths import SHARED

from ibke_hf.core.records import EditCase, EditRequest, Hop, collides
from ibke_hf.data.uniedit import YES_NO, read_uniedit

EXAMPLE = SHARED / "data" / "uniedit" / "SYNTHETIC_schema_example.json"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    if not EXAMPLE.exists():
        pytest.skip(f"the schema example of UniEdit is not beside this checkout: {EXAMPLE}")
    skipped: Counter[str] = Counter()
    read = list(read_uniedit(EXAMPLE, skipped))
    assert all(
        record == record.formatted(leading_space="protocol") for record in read
    )  # as UniEdit's evaluator has it
    records = {record.id: record.formatted(leading_space="auto") for record in read}  # the default, below left out
    assert not skipped
    return records


def test_example_keys_keep_their_gaps(example: dict[str, Any]) -> None:
    assert list(example) == [f"SYNTHETIC_schema_example-{key}" for key in (12, 15, 21, 33)]
    for record in example.values():
        assert (record.dataset, record.domain) == ("uniedit", "SYNTHETIC_schema_example")
        assert record.requests == (EditRequest("The chromosome consists of", "DNA", "chromosome"),)
        assert record.edits == (
            Hop("The chromosome consists of", "DNA", "Q900001", "P9001", "Q900002", True, "chromosome"),
        )
        assert record.relation == "has part(s)"
        assert (record.kind, record.metadata) == ("", {})
        assert (len(record.generality), len(record.locality)) == (1, 1)


AVERY = Hop("The Avery experiment is a facet of", "DNA", "Q900004", "P9003", "Q900002", True, "Avery experiment")


AUTOSOME = Hop("An autosome is a subclass of", "chromosome", "Q900003", "P9002", "Q900001", True, "autosome")


EDIT = Hop("The chromosome consists of", "DNA", "Q900001", "P9001", "Q900002", True, "chromosome")


ALIAS_EDIT = Hop("The GO:0005694 consists of", "DNA spiral", "Q900001", "P9001", "Q900002", True, "GO:0005694")


FORMULA = Hop(
    "The chemical formula of clavaldehyde is", "C₈H₇NO₅", "Q900005", "P9004", "string:C₈H₇NO₅", False, "clavaldehyde"
)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            12,
            EditCase(
                "An autosome is a subclass of a structure that has part(s) such as",
                "DNA spiral",
                ("Multi-Hop", "Subject Alias", "Object Alias"),
                2,
                5,
                ("DNA", "deoxyribonucleic acid"),
                (AUTOSOME,),
                (AUTOSOME, ALIAS_EDIT),
                "uni_gen",
            ),
        ),
        (
            15,
            EditCase(
                "The structure containing the content of the Avery experiment is",
                "chromosome",
                ("Multi-Hop", "Relation Reverse"),
                2,
                5,
                ("GO:0005694",),
                (AVERY,),
                (AVERY, EDIT),
                "uni_gen",
            ),
        ),
        (
            21,
            EditCase(
                f"Is the topic the Avery experiment is a facet of the same as what the chromosome consists "
                f"of?{YES_NO}",
                "Yes",
                ("Same-Entity Reasoning",),
                1,
                1,
                (),
                (AVERY,),
                (AVERY, EDIT),
                "uni_gen",
            ),
        ),
        (
            33,
            EditCase(
                "Among the parts of a chromosome is",
                "DNA",
                ("Rephrase", "Subject Alias", "Object Alias"),
                1,
                5,
                ("DNA spiral", "deoxyribonucleic acid"),
                (),
                (ALIAS_EDIT,),
                "uni_gen",
            ),
        ),
    ],
)
def test_example_generality(example: dict[str, Any], key: int, expected: EditCase) -> None:
    assert example[f"SYNTHETIC_schema_example-{key}"].generality == (expected,)


def test_example_locality(example: dict[str, Any]) -> None:
    for key in (12, 21):
        (case,) = example[f"SYNTHETIC_schema_example-{key}"].locality
        assert case == EditCase(FORMULA.prompt, FORMULA.target, (), 1, 5, (), (FORMULA,), (FORMULA,), "uni_loc")
    for key in (15, 33):
        (case,) = example[f"SYNTHETIC_schema_example-{key}"].locality
        assert case.criteria == ("Object Specificity",)
        assert case.target == "1869 AD"
        assert case.facts[0].tail.startswith("time:{'time': '+1869-00-00T00:00:00Z'")
        assert not case.facts[0].tail_is_item
        assert not collides(case, example[f"SYNTHETIC_schema_example-{key}"].edits)
