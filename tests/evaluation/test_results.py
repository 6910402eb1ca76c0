"""A folder of results: rows survive kill -9, settings are not mixed, files are whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import make_records

from ibke_hf import EditRecord, EditRequest, IBKEEditor, __version__
from ibke_hf.core.tokens import RequestError, encode_requests
from ibke_hf.editors.ft import FineTuningEditor
from ibke_hf.evaluation import results
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.evaluation.results import (
    ResultsError,
    ResultsFolder,
    evaluate_to_folder,
    fingerprint_of,
    fingerprint_of_records,
)
from ibke_hf.io import FileError

SETTINGS = {"dataset": "made", "model": "tiny", "editor": "ibke"}
OPTIONS: dict[str, Any] = {"sequential": 2, "batch_size": 4, "progress": False}
ROW = {"dataset": "made", "record": "r", "role": "locality", "case": 0}


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    model = tiny_model()
    torch.manual_seed(0)
    editor = IBKEEditor.for_backbone(model, latent_dim=16, latent_length=3, initial_edit_ratio=0.5)
    editor.calibrate(
        model,
        [encode_requests(tiny_tokenizer, [r for record in make_records(20, 1, seed=7) for r in record.requests])],
    )
    return editor, model, tiny_tokenizer


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_second_process_in_the_folder_is_refused_before_it_writes(setting, tmp_path):
    script = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileError, match="another process is writing there"):
            evaluate_to_folder(tmp_path, *setting, make_records(3, 1), settings=SETTINGS, **OPTIONS)
        other.communicate(b"\n")
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_everything_is_in_the_folder(setting, tmp_path):
    records = make_records(9, 2)
    written = evaluate_to_folder(
        tmp_path / "deep" / "out", *setting, records, settings=SETTINGS, unread={"no target": 3}, **OPTIONS
    )
    evaluation = evaluate_records(*setting, records, **OPTIONS)
    folder = tmp_path / "deep" / "out"
    assert sorted(file.name for file in folder.iterdir()) == [
        ".lock",
        "results.json",
        "rows.html",
        "rows.jsonl",
        "settings.json",
        "skipped.jsonl",
    ]
    assert lines(folder / "rows.jsonl") == list(evaluation.rows)
    assert json.loads((folder / "results.json").read_text()) == written
    assert {name: evaluation.summary[name] for name in written["overall"]} == written["overall"]
    assert set(written["overall"]) >= {
        "reliability",
        "generality",
        "locality",
        "f1",
        "avg",
        "generality_top1",
        "locality_top1",
        "exact_match",
    }
    assert all(
        written[name] == evaluation.summary[name]
        for name in ("by_criterion", "by_hops", "by_domain", "records", "cases")
    )
    collisions = evaluation.skipped["locality case that collides with an edit"]
    assert written["skipped"] == {"no target": 3, "locality case that collides with an edit": collisions}
    assert len(lines(folder / "skipped.jsonl")) == collisions > 0
    assert written["incomplete_group"] == evaluation.incomplete_group
    settings = json.loads((folder / "settings.json").read_text())
    assert settings == written["settings"]
    assert settings.items() >= {**SETTINGS, "sequential": 2, "ibke_hf": __version__}.items()
    assert not {"batch_size", "progress"} & set(settings)


def test_generated_answers_stand_beside_teacher_forced_ones(setting):
    rows = evaluate_records(*setting, make_records(6, 1), progress=False).rows
    assert all((row["generated"] is None) == (row["role"] == "locality") for row in rows)
    said = [row["generated"].strip().startswith(row["target"]) for row in rows if row["role"] == "reliability"]
    assert said == [row["exact_match"] for row in rows if row["role"] == "reliability"]


CHILD = """
import os, signal, sys
from ibke_hf.cli import main
from ibke_hf.evaluation.results import ResultsFolder
add, left = ResultsFolder.add, [int(sys.argv[1])]
def add_or_die(folder, row):
    if not left[0]:
        folder._rows.write('{"dataset": "uniedit", "rec')
        folder._rows.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    add(folder, row)
ResultsFolder.add = add_or_die
main(sys.argv[2:])
"""


@pytest.mark.parametrize("survivors", [23, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_after_kill_9_ends_like_one_that_was_never_killed(tmp_path, capsys, survivors):
    from ibke_hf.cli import main

    command = ["eval", "--dataset", "atlas", "--limit", "6", "--batch-size", "2", "--sequential", "2", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(survivors), *command, str(killed)], check=False, capture_output=True
    )
    assert done.returncode == -9
    assert (killed / "rows.jsonl").read_bytes().count(b"\n") == survivors
    assert not (killed / "rows.jsonl").read_bytes().endswith(b"\n")
    assert not (killed / "results.json").exists()
    assert main([*command, str(killed)]) == 0
    for name in ("rows.jsonl", "skipped.jsonl", "settings.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = (
        json.loads((folder / "results.json").read_text()) | {"edit_seconds": 0, "edit_seconds_alone": 0}
        for folder in (killed, tmp_path / "whole")
    )
    assert one == other
    before = (killed / "rows.jsonl").stat().st_mtime_ns, (killed / "results.json").read_bytes()
    assert main([*command, str(killed)]) == 0  # once more: nothing is run, nothing changes
    assert ((killed / "rows.jsonl").stat().st_mtime_ns, (killed / "results.json").read_bytes()) == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_dropped_and_made_again(setting, tmp_path, cut):
    records = make_records(5, 2)
    evaluate_to_folder(tmp_path, *setting, records, settings=SETTINGS, **OPTIONS)
    file, whole = tmp_path / "rows.jsonl", (tmp_path / "rows.jsonl").read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    file.write_bytes(whole[:start] + whole[start:][:cut])
    evaluate_to_folder(tmp_path, *setting, records, settings=SETTINGS, **OPTIONS)
    assert file.read_bytes() == whole


def test_a_smaller_batch_may_go_on_with_a_run(setting, tmp_path):
    records, rows = make_records(6, 1), []
    whole = evaluate_records(*setting, records, **OPTIONS)

    def stop(row):
        rows.append(row)
        if len(rows) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultsFolder, "skip", lambda *_: None)
        add = ResultsFolder.add
        patch.setattr(ResultsFolder, "add", lambda folder, row: (add(folder, row), stop(row)))
        evaluate_to_folder(tmp_path, *setting, records, settings=SETTINGS, **OPTIONS)
    written = evaluate_to_folder(tmp_path, *setting, records, settings=SETTINGS, **{**OPTIONS, "batch_size": 1})
    assert [results.row_key(row) for row in lines(tmp_path / "rows.jsonl")] == [
        results.row_key(row) for row in whole.rows
    ]
    assert written["overall"]["generality"] == pytest.approx(whole.summary["generality"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"settings": {**SETTINGS, "editor": "ft"}}, 'editor was "ibke", now "ft"'),
        ({"settings": {"dataset": "other", **SETTINGS}}, None),
        ({"sequential": 3}, "sequential was 2, now 3"),
        ({"generate": False}, "generate was null, now false"),
        ({"settings": {**SETTINGS, "limit": 5}}, "limit was null, now 5"),
    ],
)
def test_other_settings_are_refused_and_named(setting, tmp_path, change, what):
    options = {"settings": SETTINGS, **OPTIONS}
    evaluate_to_folder(tmp_path, *setting, make_records(3, 1), **options)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if what is None:  # the order in which settings are named does not matter
        evaluate_to_folder(tmp_path, *setting, make_records(3, 1), **{**options, **change})
        return
    with pytest.raises(ResultsError, match="holds an evaluation of other settings") as caught:
        evaluate_to_folder(tmp_path, *setting, make_records(3, 1), **{**options, **change})
    assert f"({what}); repeat those settings" in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_retrained_editor_another_model_and_changed_records_are_other_settings(setting, tmp_path, tiny_model):
    editor, model, tokenizer = setting
    records = make_records(3, 1)
    evaluate_to_folder(tmp_path, editor, model, tokenizer, records, settings=SETTINGS, **OPTIONS)
    with pytest.raises(ResultsError, match="model_weights was"):
        evaluate_to_folder(tmp_path, editor, tiny_model(seed=1), tokenizer, records, settings=SETTINGS, **OPTIONS)
    with pytest.raises(ResultsError, match="editor_weights was"):
        evaluate_to_folder(
            tmp_path, FineTuningEditor.for_backbone(model), model, tokenizer, records, settings=SETTINGS, **OPTIONS
        )
    changed = replace(records[0], requests=(EditRequest("Oslo lies in", "Rome"),))
    with pytest.raises(ResultsError, match=r"records was \"3 \(\w+\)\", now \"3 \(\w+\)\""):
        evaluate_to_folder(tmp_path, editor, model, tokenizer, [changed, *records[1:]], settings=SETTINGS, **OPTIONS)


def test_fingerprints_tell_weights_and_hyper_parameters_apart(tiny_model):
    model = tiny_model("gpt2")
    before = fingerprint_of(model)
    assert fingerprint_of(tiny_model("gpt2")) == before
    assert fingerprint_of(model.half()) != before
    half = fingerprint_of(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    assert fingerprint_of(model) != half
    editors = [FineTuningEditor.for_backbone(model, learning_rate=rate) for rate in (0.1, 0.1, 0.2)]
    assert fingerprint_of(editors[0]) == fingerprint_of(editors[1]) != fingerprint_of(editors[2])
    assert fingerprint_of(None) is None
    odd = EditRecord("r", "made", "art", (EditRequest("a lone \ud800", "b"),))
    assert fingerprint_of_records([odd]) != fingerprint_of_records([])


def test_settings_of_a_run_that_made_no_row_are_replaced(setting, tmp_path):
    editor, model, tokenizer = setting
    bad = EditRecord("r0", "made", "art", (EditRequest("Oslo lies in", " "),))
    with pytest.raises(RequestError, match="record 'r0' of made, request 0: the target is empty"):
        evaluate_to_folder(tmp_path, editor, model, tokenizer, [bad], settings=SETTINGS, **OPTIONS)
    assert not (tmp_path / "rows.jsonl").read_bytes()
    assert (
        evaluate_to_folder(tmp_path, editor, model, tokenizer, make_records(2, 1), settings=SETTINGS, **OPTIONS)[
            "records"
        ]
        == 2
    )


def test_no_record_is_an_error(setting, tmp_path):
    with pytest.raises(ResultsError, match="no record is selected"):
        evaluate_to_folder(tmp_path / "out", *setting, [], settings=SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ResultsError, match=r"holds results\.json but no settings\.json, so it is not of this command"):
        ResultsFolder(tmp_path, SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"a": 1}\n', r"rows\.jsonl: line 1 is not a row of results"),
        ("[1]\n", r"line 1 is not a row"),
        ("{\n" + json.dumps(ROW) + "\n", r"line 1 is not a row"),
        (f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n", r"line 2 is not a row"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", r"line 2 repeats a row, as when two runs write at once"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, content, what):
    ResultsFolder(tmp_path, SETTINGS)
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ResultsError, match=what):
        ResultsFolder(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ResultsError, match=r"settings\.json: not valid JSON"):
        ResultsFolder(tmp_path, SETTINGS)


def test_any_text_survives_the_file(tmp_path):
    row = {**ROW, "prompt": 'é "\u2028\x85 \ud800 line\nend'}
    with ResultsFolder(tmp_path, SETTINGS) as folder:
        folder.add(row)
        assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 1  # written at once
    assert ResultsFolder(tmp_path, SETTINGS).rows == (row,)
