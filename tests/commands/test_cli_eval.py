"""`ibke eval`: Atlas with every kind of editor, other models and datasets, chat templates, and errors of one line."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATE

from ibke_hf.atlas import ASSETS, load_backbone, load_editor, load_records
from ibke_hf.cli import main
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.evaluation.scores import ANSWERED, REPORTED

Run = Callable[..., str]


@pytest.fixture
def evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str, list[dict[str, Any]]]]:
    """Run `ibke eval`; return results, what is printed, and rows."""

    def run(*arguments: Any) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        assert main(["eval", *map(str, arguments), "--out", str(out)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        assert (out / "rows.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        return json.loads((out / "results.json").read_text()), printed.out, rows

    return run


@pytest.mark.parametrize("editor", ["none", "ft", "grace", "ibke", "mend", None])
def test_atlas(evaluated: Any, editor: str | None) -> None:
    results, printed, rows = evaluated("--dataset", "atlas", "--limit", 5, *(["--editor", editor] if editor else []))
    assert set(results) >= {"overall", "by_criterion", "by_hops", "by_domain", "records", "skipped"}
    assert set(results["overall"]) >= set(REPORTED)
    assert results["records"] == len({row["record"] for row in rows}) == 5
    assert results["settings"]["editor"] == (editor or "ibke")
    assert (results["overall"]["reliability"] > 60) == (editor != "none")
    assert results["overall"]["locality"] == 100 or editor != "none"
    lines = printed.splitlines()
    assert lines[0] == f"{editor or 'ibke'} on atlas: 5 records, percent"
    assert re.split("  +", lines[1].strip()) == ["exact match", "top 1", "in top 5", "cases"]
    numbers = [f"{results['overall'][name]:.1f}" for name in ("exact_match", "generality_top1", "generality")]
    assert ["generality", *numbers, str(results["cases"]["generality"])] in [line.split() for line in lines]
    assert re.fullmatch(r"written: \S+results\.json, \S+rows\.jsonl, \S+rows\.html", lines[-1])


def test_atlas_scores_are_those_of_the_library(evaluated: Any) -> None:
    results, _, rows = evaluated("--dataset", "atlas", "--split", "held_out", "--limit", 6, "--sequential", 3)
    evaluation = evaluate_records(
        load_editor(), *load_backbone(), load_records("held_out")[:6], sequential=3, progress=False
    )
    assert rows == list(evaluation.rows)
    assert results["overall"]["avg"] == evaluation.summary["avg"]


def test_options_reach_the_evaluation(evaluated: Any) -> None:
    results, printed, rows = evaluated(
        "--dataset",
        "atlas",
        "--editor",
        "ft",
        "--limit",
        5,
        "--seed",
        3,
        "--sequential",
        2,
        "--mode",
        "joint",
        "--no-generate",
        "--hops",
        2,
        3,
        "--collision-scope",
        "group",
        "--locality-match",
        "string",
        "--span",
        "offsets",
        "--batch-size",
        7,
    )
    settings = {
        "seed": 3,
        "limit": 5,
        "sequential": 2,
        "mode": "joint",
        "generate": False,
        "hops": [2, 3],
        "collision_scope": "group",
        "locality_match": "string",
        "span": "offsets",
        "split": None,
        "chat": False,
        "model": "ibke-atlas",
    }
    assert results["settings"].items() >= settings.items()
    assert {row["hops"] for row in rows if row["role"] != "reliability"} == {2, 3} & {row["hops"] for row in rows}
    assert results["overall"]["exact_match"] is None
    assert results["incomplete_group"] == 1
    assert "the last group has 1 of 2 requests; it is scored, where UniEdit drops it" in printed
    assert results["skipped"]["case of other criteria or hops"] > 0
    assert (
        f"skipped: {results['skipped']['case of other criteria or hops']} × case of other criteria or hops" in printed
    )


def test_another_model_with_its_editors(evaluated: Any, store: Path) -> None:
    records = ASSETS / "records" / "test"
    for editor in ("none", "ft", store / "editor"):
        results, _, rows = evaluated(
            "--dataset", records, "--model", store / "model", "--editor", editor, "--limit", 2
        )
        assert results["settings"]["editor"] == str(editor)
        assert results["records"] == 2 < len(rows)
    named = ("--editor", "ft", "--edited-modules", "model.layers.{i}.self_attn.o_proj", "--limit", 2)
    results, _, _ = evaluated("--dataset", records, "--model", store / "model", *named)
    assert results["settings"]["edited_modules"] == named[3]


@pytest.mark.parametrize("editor", ["ft", "ibke"])
@pytest.mark.parametrize(
    "file",
    [
        "counterfact/easyedit_flat_500.json",
        "counterfact/easyedit_flat_train.json",
        "counterfact/easyedit_flat_val.json",
        "counterfact/rome_native_200.json",
        "mquake/mquake_cf_3k_200.json",
        "mquake/mquake_hard_200.json",
        "uniedit/SYNTHETIC_schema_example.json",
        "zsre/zsre_mend_eval_24.json",
        "zsre/zsre_mend_train_500.json",
        "zsre/knowedit_zsre_test_100.json",
    ],
)
def test_native_datasets(evaluated: Any, native_data: Callable[[str], Path], file: str, editor: str) -> None:
    results, _, rows = evaluated("--dataset", native_data(file), "--editor", editor, "--limit", 4)
    assert results["records"] == 4
    assert {row["role"] for row in rows} >= {"reliability", "generality"}
    assert results["overall"]["locality"] is None or "mquake" not in file


def test_how_edits_are_carried_together_is_chosen_and_recorded(evaluated: Any) -> None:
    asked = ("--dataset", "atlas", "--limit", 2, "--sequential", 2, "--no-generate")
    scores = {}
    for options, recorded in (
        ((), ("auto", 0.1)),
        (("--ridge", 5), ("auto", 5.0)),
        (("--composition", "sum"), ("sum", 0.1)),
    ):
        results = evaluated(*asked, *options)[0]
        assert (results["settings"]["composition"], results["settings"]["ridge"]) == recorded
        scores[recorded] = results["overall"]
    assert len({str(one) for one in scores.values()}) == 3
    assert "composition" not in evaluated(*asked, "--editor", "none")[0]["settings"]


def test_a_second_run_with_other_settings_is_refused(evaluated: Any, refused: Run, tmp_path: Path) -> None:
    evaluated("--dataset", "atlas", "--limit", 2, "--editor", "none")
    line = refused(
        "eval", "--dataset", "atlas", "--limit", 2, "--editor", "none", "--sequential", 2, "--out", tmp_path / "out"
    )
    assert line.startswith(
        f"ibke eval: {tmp_path / 'out'}: holds an evaluation of other settings (sequential was 1, now 2); repeat those"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--dataset", "uniedit"], "ibke eval: qizhou/UniEdit: no file or folder"),
        (["--dataset", "zsre"], "dataset zsre: no Hub dataset is known for it; give the path of a file or folder"),
        (["--dataset", "atlas", "--split", "train"], "no records; the splits are test, held_out and validation"),
        (["--dataset", "atlas", "--format", "zsre"], "--format zsre: the records of atlas have one format"),
        (["--dataset", "atlas", "--domains", "cooking"], "no record is selected"),
        (
            ["--dataset", "atlas", "--model", "gpt2"],
            (
                "--editor ibke edits the embedded Atlas model only; for gpt2 give --editor ft, t_patcher, lemoe, "
                "grace, or rome or alphaedit with a --corpus, or the folder or Hub id of an editor trained for "
                "it: ibke train"
            ),
        ),
        (
            ["--dataset", "atlas", "--model", "gpt2", "--editor", "mend"],
            "--editor mend edits the embedded Atlas model only",
        ),
        (["--dataset", "atlas", "--editor", "./nowhere", "--limit", "1"], "./nowhere: no such folder"),
        (
            ["--dataset", "atlas", "--chat", "--limit", "1"],
            "the tokenizer has no chat template; leave the chat option off",
        ),
        (["--dataset", "./nothing"], "./nothing: no record file here"),
    ],
)
def test_errors_are_one_line(refused: Run, tmp_path: Path, arguments: list[str], what: str) -> None:
    assert what in refused("eval", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "rows.jsonl").exists()


# --- chat templates -------------------------------------------------------------------------------------------------


def chatting(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    return tokenizer


def test_chat_reaches_every_row(evaluated: Any, store: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = Path(shutil.copytree(store / "model", tmp_path / "model"))
    chatting(tiny_tokenizer).save_pretrained(model)
    results, _, rows = evaluated("--dataset", "atlas", "--model", model, "--editor", "none", "--limit", 2, "--chat")
    assert results["settings"]["chat"] is True
    plain = evaluated("--dataset", "atlas", "--model", model, "--editor", "none", "--limit", 2)[2]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in plain]  # the prompts are those of the records,
    assert [row["before"] for row in rows] != [row["before"] for row in plain]  # what the model reads is the template
    free = [row for row in rows if row["answer"] is not None]
    assert len(free) == len(rows)
    assert {row["answered"] for row in rows} <= {True, False}
    assert not any(row["answer"] for row in plain)
    assert results["settings"]["free"] is True and results["overall"]["answered_locality"] == 100  # without an edit


def test_free_answers_are_asked_for_in_plain_text_and_can_be_left_out_of_a_chat(
    evaluated: Any, refused: Run, store: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = Path(shutil.copytree(store / "model", tmp_path / "model"))
    chatting(tiny_tokenizer).save_pretrained(model)
    what = ("--dataset", "atlas", "--model", model, "--editor", "ft", "--limit", 2)
    results, printed, _ = evaluated(*what, "--free")
    assert results["overall"]["answered_reliability"] is not None and results["settings"]["chat"] is False
    assert re.split("  +", printed.splitlines()[1].strip()) == [
        "free answer",
        "exact match",
        "top 1",
        "in top 5",
        "cases",
    ]
    assert "asked in plain text" in printed
    numbers = [f"{results['overall'][f'{name}_generality']:.1f}" for name in ("answered",)]
    line = next(line.split() for line in printed.splitlines() if line.startswith("generality"))
    assert line[1:2] == numbers
    silent = evaluated(*what, "--chat", "--no-generate")[0]
    assert silent["overall"]["answered_reliability"] is silent["overall"]["exact_match"] is None
    line = refused("eval", *what, "--free", "--no-generate", "--out", tmp_path / "none")
    assert "--free: nothing is generated with --no-generate" in line


@pytest.mark.parametrize(
    "file", ["qaedit/qaedit_700.json", "counterfact/easyedit_flat_500.json", "zsre/zsre_mend_eval_24.json"]
)
def test_real_datasets_in_a_chat(
    evaluated: Any, native_data: Callable[[str], Path], store: Path, tmp_path: Path, tiny_tokenizer: Any, file: str
) -> None:
    model = Path(shutil.copytree(store / "model", tmp_path / "model"))
    chatting(tiny_tokenizer).save_pretrained(model)
    what = ("--dataset", native_data(file), "--model", model, "--editor", "ft", "--limit", 2, "--chat")
    results, _, rows = evaluated(*what)
    assert all(results["overall"][name] is not None for name in ANSWERED)
    assert not any("The answer is: " in row["prompt"] or "nq question" in row["prompt"] for row in rows)
