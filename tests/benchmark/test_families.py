"""The status of families of decoders is of the current recipe, and what it says of a dozen still holds."""

from __future__ import annotations

from typing import Any

import pytest
from paths import ROOT

from ibke_hf.atlas import load_backbone
from ibke_hf.benchmark.families import CHECKS, PAGE, RECIPE, all_families, page, read_report, try_family
from ibke_hf.benchmark.tiny_models import NotTinyError, tiny_model
from ibke_hf.core.forward import padding_of
from ibke_hf.core.library_internals import is_redirected_by_peft

FOLDER = ROOT / "model_cards"
AGAIN = (
    "gpt2",
    "qwen3",
    "falcon",
    "rwkv",
    "bart",
    "mixtral",
    "deepseek_v3",
    "jamba",
    "mamba",
    "lfm2",
    "bloom",
    "phi3",
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if not (FOLDER / PAGE).exists():
        pytest.skip("model_cards is not beside the tests")
    return read_report(FOLDER)


@pytest.fixture(scope="module")
def atlas_tokenizer() -> Any:
    return load_backbone()[1]


def test_the_status_is_of_the_current_recipe_and_of_every_family(report: dict[str, Any]) -> None:
    import transformers

    assert report["recipe"] == RECIPE, "make it again: ibke families --out model_cards"
    assert (FOLDER / PAGE).read_text(encoding="utf-8") == page(report)
    if report["transformers"] == transformers.__version__:
        assert list(report["families"]) == all_families()


@pytest.mark.parametrize("family", AGAIN)
def test_what_the_status_says_still_holds(family: str, report: dict[str, Any], atlas_tokenizer: Any) -> None:
    import transformers

    if report["transformers"] != transformers.__version__:
        pytest.skip(f"the status is of transformers {report['transformers']}")
    row, stated = try_family(family, atlas_tokenizer), report["families"][family]
    for key in ("projection", "layers", "found", "padding"):
        assert row.get(key) == stated.get(key)
    for check in CHECKS:
        assert (row.get(check) is True) == (stated.get(check) is True), (check, row.get(check))


def test_every_family_answers_a_padded_batch_as_single_texts_or_refuses(report: dict[str, Any]) -> None:
    tried = {name: row for name, row in report["families"].items() if "batched" in row}
    assert len(tried) > 150
    wrong = {name: row["batched"] for name, row in tried.items() if row["batched"] is not True}
    refused = {name for name, row in tried.items() if row["padding"] == "none" or row["ibke"] is not True}
    assert refused >= set(wrong), wrong


def test_an_edit_is_refused_as_an_adapter_just_where_peft_would_drop_it(report: dict[str, Any]) -> None:
    tried = {name: row for name, row in report["families"].items() if "peft" in row}
    assert not [name for name, row in tried.items() if row["peft"] == "no effect"]
    for name, row in tried.items():
        redirected = any(is_redirected_by_peft(name, row["projection"].format(i=i)) for i in row["layers"])
        assert redirected == str(row["peft"]).startswith("AdapterError: PEFT takes"), name


def test_a_family_that_cannot_be_built_says_why() -> None:
    with pytest.raises(NotTinyError, match="reads bytes in patches"):
        tiny_model("blt", 64)
    assert padding_of(tiny_model("llama", 64)) == "left"
