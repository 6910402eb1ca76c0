"""`ibke card`: committed cards written and checked, needs, and the card of a trained editor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import LoopbackHub
from markdown_tables import markdown_rows

from ibke_hf.atlas import ASSETS
from ibke_hf.cli import main
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.evaluation.scores import TITLES
from ibke_hf.hub.cards import render_card, stale_files
from ibke_hf.hub.cards.results import eval_results_text

RESULTS = {
    "overall": {"reliability": 99.123, "generality": 80.0, "exact_match": 61.0},
    "records": 7,
    "settings": {"dataset": "qizhou/UniEdit", "split": "test", "sequential": 1},
}


def test_the_command_writes_checks_and_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["card", "atlas"]) == 0
    files = [Path("model_cards/atlas/README.md"), Path("model_cards/atlas/.eval_results/atlas.yaml")]
    assert capsys.readouterr().out.splitlines() == [f"written: {file}" for file in files]
    assert sorted(path for path in Path("model_cards").rglob("*") if path.is_file()) == sorted(files)
    assert main(["card", "atlas", "--check"]) == 0
    assert capsys.readouterr().out == "atlas: up to date\n"
    with files[0].open("a") as file:
        file.write("by hand\n")
    assert main(["card", "atlas", "--check"]) == 2
    assert capsys.readouterr().err.startswith(
        f"ibke card: {files[0]}: not what `ibke card` writes now; write it again"
    )
    assert main(["card", "atlas"]) == 0
    assert stale_files("atlas", "model_cards") == []
    assert main(["card", "all", "--check"]) == 2
    assert "gpt2-xl/README.md, " in capsys.readouterr().err
    assert main(["card", "all", "--out", "elsewhere"]) == 0
    assert main(["card", "all", "--out", "elsewhere", "--check"]) == 0


def test_needs_are_those_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "gpt2-xl", "--needs"]) == 0
    assert capsys.readouterr().out.strip() in render_card("gpt2-xl")["README.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gpt3"],
            "no card 'gpt3'; the cards are atlas, smollm2-135m-instruct, gpt2-xl, gpt-j-6b, qwen3-1.7b, qwen3-8b",
        ),
        (["gpt3", "--check"], "no card 'gpt3'; the cards are atlas"),
        (["/no/such/folder"], "no card '/no/such/folder'; the cards are atlas"),
        (
            ["atlas", "--needs"],
            (
                "--needs belongs to an editor that is not trained yet: gpt2-xl, gpt-j-6b, qwen3-1.7b, qwen3-8b; "
                "found 'atlas'"
            ),
        ),
        (["gpt3", "--needs"], "found 'gpt3'"),
        (["all", "--needs"], "found 'all'"),
        (["atlas", "--results", "x"], "--results belongs to the folder of a trained editor; 'atlas' is none"),
        (["all", "--repository", "me/x"], "--repository belongs to the folder of a trained editor; 'all' is none"),
    ],
)
def test_what_has_no_card_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["card", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def trained(tmp_path: Path, tiny_model: Any) -> Path:
    model = tiny_model("gpt2")
    model.config.name_or_path = "openai-community/gpt2"
    IBKEEditor.for_backbone(model, latent_dim=8, latent_length=2).save_pretrained(tmp_path / "ibke-tiny")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "ibke-tiny"


def test_the_card_shown_is_the_one_that_is_pushed(
    trained: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ["--results", str(trained.parent / "results")]
    assert main(["card", str(trained), "--repository", "org/ibke-tiny", *results]) == 0
    shown = capsys.readouterr().out
    assert main(["push", str(trained), "org/ibke-tiny", *results]) == 0
    assert hub["org/ibke-tiny"].files()["README.md"].decode() == shown
    assert [TITLES["exact_match"], "61.0"] in markdown_rows(shown)
    assert "base_model: openai-community/gpt2" in shown
    entries = parse_eval_result_entries(yaml.safe_load(hub["org/ibke-tiny"].files()[".eval_results/UniEdit.yaml"]))
    assert [(entry.task_id, entry.notes.rpartition(", ")[2]) for entry in entries] == [
        ("exact_match", "greedy generation"),
        ("reliability", "teacher-forced"),
        ("generality", "teacher-forced"),
    ]


def test_free_answers_are_listed_with_what_they_are(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overall = {**RESULTS["overall"], "answered_reliability": 71.5}
    results = {**RESULTS, "overall": overall, "settings": {**RESULTS["settings"], "chat": True}}
    (trained / "results.json").write_text(json.dumps(results))
    assert main(["card", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert [TITLES["answered_reliability"], "71.5"] in markdown_rows(shown)
    assert "Free answers are the model's own continuation in a chat" in " ".join(shown.split())
    assert "free generation in a chat" in eval_results_text({"": results})


def test_a_folder_is_called_by_its_name_and_finds_results_beside_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained.parent / "results" / "results.json", trained)
    assert main(["card", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert 'from_pretrained("ibke-tiny")' in shown and [TITLES["reliability"], "99.1"] in markdown_rows(shown)
    assert {entry.metric_type for entry in ModelCard(shown).data.eval_results} == {
        "reliability",
        "generality",
        "exact_match",
    }


@pytest.mark.parametrize("arguments", [["--check"], ["--out", "x"], ["--needs"]])
def test_options_of_other_cards_are_refused(
    arguments: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(trained), *arguments]) == 2
    assert f"{arguments[0]} belongs to the cards of this package" in capsys.readouterr().err
    assert main(["card", str(trained), "--results", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_folder_without_an_editor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ASSETS / "records", tmp_path / "records")
    (tmp_path / "empty").mkdir()
    assert main(["card", str(tmp_path / "records")]) == 2
    assert "holds records, whose card `ibke push` writes" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "empty")]) == 2
    assert "neither an editor, an edit nor records" in capsys.readouterr().err
