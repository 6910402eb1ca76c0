"""Edits by rank: what is measured is what cut edits do, and which editors the command measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_editors import REQUESTS, make_editor
from sweep_lines import a_line
from test_measuring import records_of

from ibke_hf.analysis.drawings.ranks import title_of_ranks
from ibke_hf.analysis.files import kept_by_rank, kept_editors
from ibke_hf.analysis.ranks import AFTERWARDS, FULL, quality_by_rank
from ibke_hf.atlas.grid import Training
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.io import FileError


class Cutting:
    """An editor whose edits are cut one by one, after they were made."""

    def __init__(self, editor: Any, rank: int) -> None:
        self.editor, self.rank = editor, rank

    def edit(self, model: Any, tokenizer: Any, requests: Any, *, mode: Any = "joint", previous: Any = None) -> Any:
        assert previous is None
        edit = self.editor.edit(model, tokenizer, requests, mode="independent", composition="sum").truncate(self.rank)
        assert mode == "independent" or len(edit) == 1
        return edit


@pytest.fixture(scope="module")
def setup(tiny_model: Any, tiny_tokenizer: Any) -> tuple[Any, Any, Any]:
    model = tiny_model()
    return model, tiny_tokenizer, make_editor(model, tiny_tokenizer, initial_edit_ratio=3.0)


def test_scores_are_those_of_edits_that_are_cut_one_by_one(setup: tuple[Any, Any, Any]) -> None:
    model, tokenizer, editor = setup
    records = [replace(record, requests=record.requests[:1]) for record in records_of(6)]
    data = quality_by_rank({AFTERWARDS: {1: {0: editor}, 0: {0: editor}}}, model, tokenizer, records, many=3)
    assert editor.config.edit_rank == 0
    lines = data["editors"][AFTERWARDS]
    for key, given in (("1", Cutting(editor, 1)), (FULL, Cutting(editor, 100))):
        naive = evaluate_records(given, model, tokenizer, records, generate=False, progress=False).summary
        for name in ("reliability", "generality", "locality"):
            assert lines[key]["0"]["alone"][name] == pytest.approx(naive[name], abs=0.01)
    assert lines["1"]["0"]["alone"] != lines[FULL]["0"]["alone"]
    assert set(lines["1"]["0"]["together"]) == {"reliability", "generality", "locality", "avg"}
    with pytest.raises(ValueError, match="no record is given"):
        quality_by_rank({AFTERWARDS: {1: {0: editor}}}, model, tokenizer, [])


def test_sizes_and_errors_are_those_of_single_edits(setup: tuple[Any, Any, Any]) -> None:
    model, tokenizer, editor = setup
    records = records_of(5)
    data = quality_by_rank({AFTERWARDS: {1: {0: editor}, 0: {0: editor}}}, model, tokenizer, records)
    assert data["many"] is None
    singles = [editor.edit(model, tokenizer, record.requests[:1]) for record in records]
    for rank, key in ((1, "1"), (10**6, FULL)):
        cell = data["editors"][AFTERWARDS][key]["0"]
        cut = [one.truncate(rank) for one in singles]
        floats = [sum(t.numel() for part in (e.inputs, e.outputs) for t in part.values()) for e in cut]
        if rank == 1:
            assert cell["bytes"] == 4 * sum(floats) / len(floats)
            worst = [max(e.relative_error.values()) for e in cut]
            assert cell["relative_error"] == pytest.approx(sum(worst) / len(worst), abs=1e-3)
        else:
            tokens = [len(tokenizer(f"{r.requests[0].prompt} {r.requests[0].target}")["input_ids"]) for r in records]
            widths = sum(e.shape[2] + singles[0].outputs[name].shape[2] for name, e in singles[0].inputs.items())
            assert cell["bytes"] <= 4 * widths * max(tokens)
            assert cell["bytes"] == pytest.approx(4 * widths * (sum(tokens) / len(tokens) - 1), rel=0.1)
            assert cell["relative_error"] == 0


def test_the_title_says_what_the_lowest_rank_keeps() -> None:
    def cell(average: float, size: int) -> dict[str, Any]:
        return {"0": {"alone": {"generality": 1.0, "avg": average}, "bytes": size}}

    lines = {AFTERWARDS: {"1": cell(81.0, 10), "4": cell(90.0, 40), FULL: cell(95.0, 100)}, "other": {"1": cell(1, 1)}}
    title = title_of_ranks({"editors": lines})
    assert title == "Cut afterwards, rank 1 has average 81.0 of 95.0 at 1/10 of the size"


def test_editors_of_a_sweep_are_found_by_rank(tmp_path: Path) -> None:
    trainings = [Training(edit_rank=rank, seed=seed) for rank in (0, 1) for seed in (0, 1)]
    trainings.append(Training(edit_rank=2, use_information_bottleneck=False))
    for training in trainings:
        folder = tmp_path / "cells" / training.name / "editor"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [a_line(training) for training in trainings]}))
    found = kept_by_rank(tmp_path)
    assert {rank: list(folders) for rank, folders in found.items()} == {0: [0, 1], 1: [0, 1]}
    assert found[1][0].parent.name == "ibke_paper.l10.b0.1.r1.0"
    assert list(kept_editors(tmp_path)) == ["with IB"]  # a rank of its own is no other figure's editor
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(FileError, match="has no list of cells"):
        kept_by_rank(tmp_path)


def test_an_editor_whose_edits_are_cut_makes_the_best_edits_of_that_rank(setup: tuple[Any, Any, Any]) -> None:
    model, tokenizer, editor = setup
    whole = editor.edit(model, tokenizer, REQUESTS, mode="independent", composition="sum")
    cut = make_editor(model, tokenizer, initial_edit_ratio=3.0, edit_rank=2)
    cut.load_state_dict(editor.state_dict())
    edit = cut.edit(model, tokenizer, REQUESTS, mode="independent", composition="sum")
    assert set(edit.ranks.values()) == {2}
    for name in edit.layers:
        best = whole.truncate(2).weight_updates(name)
        torch.testing.assert_close(edit.weight_updates(name), best, rtol=1e-3, atol=1e-4)
