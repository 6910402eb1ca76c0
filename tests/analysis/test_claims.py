"""Verdicts on the paper's claims: by differences and their errors over seeds, and never without data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from sweep_lines import paper_like, sweep_lines

from ibke_hf.analysis.claims import (
    HELD,
    NOT_HELD,
    NOT_MEASURED,
    NOT_TESTABLE,
    Claim,
    Part,
    as_markdown,
    claims_of,
)
from ibke_hf.analysis.files import Evidence, kept_editors, read_evidence
from ibke_hf.cli import main
from ibke_hf.io import FileError


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((1.0, 1.2, 0.9), HELD),
        ((-1.0, -1.2, -0.9), NOT_HELD),
        ((2.0, -1.5, 0.4), NOT_HELD),  # smaller than its error
        ((1.0, 1.0), NOT_MEASURED),
        ((1.0, None, 1.0), NOT_MEASURED),
        ((), NOT_MEASURED),
        ((0.0, 0.0, 0.0), NOT_HELD),
    ],
)
def test_a_difference_holds_where_it_is_positive_and_no_smaller_than_its_error(values: Any, word: str) -> None:
    assert Part("a − b", values).word == word


def test_a_claim_is_as_good_as_its_worst_part() -> None:
    held, failed, open_ = Part("", (1.0, 1.1, 1.0)), Part("", (-1.0, -1.1, -1.0)), Part("", ())
    for parts, word in (
        ((held,), HELD),
        ((held, held), HELD),
        ((held, open_), NOT_MEASURED),
        ((held, open_, failed), NOT_HELD),
        ((), NOT_MEASURED),
    ):
        assert Claim("", "", parts, "").word == word
    assert Claim("", "", (held,), "", testable=False).word == NOT_TESTABLE
    assert Part("a − b", (1.0, 2.0, 3.0)).said() == "a − b: +2.0 ± 1.0"
    assert Part("a − b", ()).said() == "a − b: –"


def test_nothing_is_said_without_data() -> None:
    claims = claims_of(Evidence())
    assert len(claims) == 13
    assert {claim.word for claim in claims} == {NOT_MEASURED}
    two_seeds = claims_of(Evidence(sweep_lines(seeds=2)))
    assert {claim.word for claim in two_seeds} == {NOT_MEASURED}


def test_verdicts_follow_the_scores() -> None:
    words = {claim.text: claim.word for claim in claims_of(Evidence(sweep_lines()))}
    assert words["A longer latent (larger l_m) helps"] == HELD
    assert words["β = 0.1 is best for reliability and locality"] == HELD
    assert words["β = 1 is best for generality"] == HELD
    assert words["At l_m = 1 any increase of β hurts"] == HELD
    assert words["β = 10 hurts all three metrics"] == NOT_HELD  # as good as 0.1 for generality, as the scores are made
    assert words["Leaving out the scale factor hurts generality and locality"] == HELD
    assert words["A few records of counterfactual data help on counterfactual edits"] == HELD

    def without_effect(training: Any, metric: str) -> float:
        return paper_like(training, metric) + 2.0 * (not training.use_scale_factor)

    words = {claim.text: claim.word for claim in claims_of(Evidence(sweep_lines(without_effect)))}
    assert words["Leaving out the scale factor hurts generality and locality"] == NOT_HELD
    assert words["A longer latent (larger l_m) helps"] == HELD


def test_sparsity_and_clusters_are_compared_seed_by_seed() -> None:
    sparse = {"with IB": (0.5, 0.6, 0.55), "without IB": (0.2, 0.3, 0.2)}
    statistics = {
        label: {
            str(seed): {"h.1": {"sparsity": value}, "h.2": {"sparsity": value}} for seed, value in enumerate(values)
        }
        for label, values in sparse.items()
    }
    editors = {
        label: {"layers": {"h.1": {"silhouette": {str(seed): -value for seed, value in enumerate(values)}}}}
        for label, values in sparse.items()
    }
    words = {
        claim.text: claim.word
        for claim in claims_of(Evidence(figures={"7a": {"statistics": statistics}, "6": {"editors": editors}}))
    }
    assert words["The bottleneck makes scale factors sparser"] == HELD
    assert words["The bottleneck makes the clusters of latents clearer"] == NOT_HELD


def test_the_command_writes_the_page_of_what_the_folder_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": sweep_lines()}))
    assert main(["claims", str(tmp_path)]) == 0
    page = (tmp_path / "CLAIMS.md").read_text(encoding="utf-8")
    assert page == as_markdown(claims_of(read_evidence(tmp_path)))
    assert "| A longer latent (larger l_m) helps | Figure 3 | **held** |" in page
    assert "**not measured yet**" in page
    capsys.readouterr()
    assert main(["claims", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(FileError, match="has no list of cells"):
        (tmp_path / "sweep.json").write_text("{}")
        kept_editors(tmp_path)


def test_the_committed_page_is_what_the_committed_data_say() -> None:
    folder = ROOT / "model_cards" / "atlas"
    assert (folder / "CLAIMS.md").read_text(encoding="utf-8") == as_markdown(claims_of(read_evidence(folder)))
