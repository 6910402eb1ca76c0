"""Drift: what an edit does to a text and to tasks that it has nothing to do with, stored and on its card."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from quick_edits import quick_edit

from ibke_hf.cli import main
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.core.records import EditRequest
from ibke_hf.data.texts import read_texts
from ibke_hf.delivery import drift as drifting
from ibke_hf.delivery.drift import PLAIN_TEXT, Drift, measure_drift, store
from ibke_hf.delivery.harness import TASKS, task_drift
from ibke_hf.delivery.tasks.questions import common_facts, questions, said
from ibke_hf.hub.cards.edit import edit_card

TEXTS = ["Marie Curie was born in Warsaw.", "A sparrow is a bird, an oak is a tree."]


@pytest.fixture
def setting(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    return (
        model,
        tiny_tokenizer,
        quick_edit(model, tiny_tokenizer, [EditRequest("The capital of France is", "Rome")], [1]),
    )


def test_drift_is_the_loss_and_divergence_of_every_token_of_the_text(setting):
    model, tokenizer, edit = setting
    drift = measure_drift(model, tokenizer, edit, TEXTS, "text")
    ids = torch.tensor([tokenizer("".join(f"{text}\n" for text in TEXTS))["input_ids"]])
    with torch.no_grad():
        plain = model(ids, labels=ids)
        with edit.attached(model):
            edited = model(ids, labels=ids)
    assert drift.tokens == ids.shape[1] - 1
    assert drift.perplexity == pytest.approx((math.exp(plain.loss), math.exp(edited.loss)), rel=1e-4)
    before, after = (part.logits[0, :-1].log_softmax(-1) for part in (plain, edited))
    kl = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    assert drift.kl == pytest.approx(float(kl), rel=1e-3) and drift.kl > 0
    assert drift.same == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))


def test_a_long_text_is_read_in_windows_and_an_edit_of_nothing_drifts_nowhere(setting, monkeypatch):
    model, tokenizer, edit = setting
    monkeypatch.setattr(drifting, "WINDOW", 7)
    nothing = replace(edit, outputs={name: 0 * factor for name, factor in edit.outputs.items()})
    drift = measure_drift(model, tokenizer, nothing, TEXTS, "text")
    total = len(tokenizer("".join(f"{text}\n" for text in TEXTS))["input_ids"])
    assert drift.tokens == total - math.ceil(total / 7)
    assert (drift.kl, drift.same) == (0.0, 1.0) and drift.perplexity[0] == drift.perplexity[1]


def test_drift_of_several_edits_or_of_no_text_is_refused(setting):
    model, tokenizer, edit = setting
    with pytest.raises(ValueError, match="found 2 independent ones; choose one"):
        measure_drift(model, tokenizer, edit.select([0, 0]), TEXTS, "text")
    with pytest.raises(ValueError, match="text: holds fewer than two tokens"):
        measure_drift(model, tokenizer, edit, [], "text")


def test_scores_are_stored_with_the_edit_and_stand_on_its_card(setting, tmp_path):
    _, _, edit = setting
    edit = replace(edit, info=replace(edit.info, scores={"f1": 90.0}))
    edit.save_pretrained(tmp_path / "edit")
    assert store(tmp_path / "edit", Drift("old", 5, (1.0, 1.0), 0.0, 1.0))
    assert store(tmp_path / "edit", Drift("prose", 9, (10.5, 11.25), 0.0123, 0.9, {"arc/acc": (0.5, 0.25)}))
    stored = LowRankEdit.from_pretrained(tmp_path / "edit")
    assert stored == edit and stored.info.requests == edit.info.requests
    assert stored.info.scores == {
        "f1": 90.0,
        "drift/prose/perplexity/before": 10.5,
        "drift/prose/perplexity/after": 11.25,
        "drift/prose/kl": 0.0123,
        "drift/prose/same top token": 0.9,
        "drift/prose/tokens": 9.0,
        "drift/arc/acc/before": 0.5,
        "drift/arc/acc/after": 0.25,
    }
    card = str(edit_card(stored, "me/edit"))
    assert "- scores: f1 90.0\n" in card
    for row in ("| prose: perplexity | 10.5 | 11.25 |", "| prose: kl |  | 0.0123 |", "| arc: acc | 0.5 | 0.25 |"):
        assert row in card
    assert "What the edit does to everything else" not in str(edit_card(edit, "me/edit"))
    assert not store(tmp_path, Drift("prose", 9, (1.0, 1.0), 0.0, 1.0))


def test_the_command_measures_prints_and_stores(store, tmp_path, capsys):
    edit = LowRankEdit.from_pretrained(store / "edit")
    edit.save_pretrained(tmp_path / "edit")
    (tmp_path / "mine.txt").write_text("\n".join(TEXTS))
    command = ["drift", "--edit", str(tmp_path / "edit"), "--model", str(store / "model")]
    assert main([*command, "--text", str(tmp_path / "mine.txt"), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "mine: perplexity" in printed and "stored in" in printed
    scores = json.loads((tmp_path / "out.json").read_text())
    assert LowRankEdit.from_pretrained(tmp_path / "edit").info.scores == scores and "drift/mine/kl" in scores
    assert main([*command, "--limit", "1"]) == 0  # on the text that ships
    assert "plain_text: perplexity" in capsys.readouterr().out


def test_the_text_that_ships_is_long_enough_to_tell():
    texts = read_texts(PLAIN_TEXT)
    assert len(texts) >= 10 and sum(len(text.split()) for text in texts) > 500


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_questions_of_the_tasks_are_those_of_a_file_of_facts(tmp_path, monkeypatch):
    assert {kind: len(questions(kind)) for kind in ("reliability", "generality", "locality")} == {
        "reliability": 3,
        "generality": 2,
        "locality": 4,
    }
    file = tmp_path / "facts.yaml"
    file.write_text("facts:\n  - prompt: A is\n    answers: [B]\n    neighbours: [C is, D is -> E | F]\n")
    monkeypatch.setenv("IBKE_FACTS", str(file))
    assert questions("reliability") == [{"fact": "A is", "prompt": "A is", "answers": ["B"]}]
    assert [row["prompt"] for row in questions("locality")] == ["D is"]
    assert said({"prompt": "D is", "answers": ["E", "F"]}, " F, of course")
    assert not said({"prompt": "D is", "answers": ["E", "F"]}, " not F")
    assert said({"prompt": "What is D?", "answers": ["E"]}, "It is E.")


def test_common_facts_have_one_right_choice_and_are_the_same_every_time():
    rows = common_facts()
    assert rows == common_facts() and len(rows) > 50
    assert all(len(set(row["choices"])) == 4 and 0 <= row["gold"] < 4 for row in rows)
    assert len({row["gold"] for row in rows}) == 4


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


@pytest.mark.parametrize("name", [file.stem for file in sorted(TASKS.glob("*.yaml"))])
def test_every_task_file_names_itself_and_functions_that_exist(name):
    pytest.importorskip("datasets")
    config = yaml.load((TASKS / f"{name}.yaml").read_text(), Loader=_Loader)
    if "group" in config:
        assert config["group"] == name and all((TASKS / f"{task}.yaml").exists() for task in config["task"])
        return
    assert config["task"] == name and config["test_split"] == "test"
    assert "dataset_path" not in config  # nothing is downloaded
    names = [value for key in ("custom_dataset", "process_results") if (value := config.get(key))]
    scope: dict = {}
    exec(compile((TASKS / "quality.py").read_text(), "quality.py", "exec"), scope)
    assert all(value.removeprefix("quality.") in scope for value in names)
    rows = scope[config["custom_dataset"].removeprefix("quality.")](version=1)["test"]
    fields = {"prompt", "answers"} if config["output_type"] == "generate_until" else {"prompt", "choices", "gold"}
    assert fields <= set(rows[0])


def test_the_lighteval_file_has_a_task_for_each_kind():
    text = (TASKS.parent / "lighteval_edit_quality.py").read_text()
    compile(text, "lighteval_edit_quality.py", "exec")
    assert "TASKS_TABLE" in text and "for kind in ROLES" in text


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_tasks_say_what_to_install(setting):
    with pytest.raises(ImportError, match=r"pip install \"lm-eval"):
        task_drift(*setting, ["ibke_common_facts"])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.parametrize("saved", [True, False])
def test_the_harness_runs_tasks_before_and_after(setting, tmp_path, saved):
    """By `peft=` where the harness can load the model, else with the edit attached."""
    model, tokenizer, edit = setting
    if saved:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    scores = task_drift(model, tokenizer, edit, ["ibke_edit_quality", "ibke_common_facts"], limit=2)
    assert {"ibke_reliability/said", "ibke_locality/said", "ibke_common_facts/acc"} <= set(scores)
    with pytest.raises(ValueError, match="lm-eval-harness has no such task"):
        task_drift(model, tokenizer, edit, ["ibke_of_no_kind"])


@pytest.mark.skipif(find_spec("lighteval") is None, reason="lighteval is not installed")
def test_lighteval_reads_the_tasks():
    """The file by itself: LightEval's whole registry downloads a table of a built-in task when it is loaded."""
    import datasets
    from lighteval.tasks.registry import Registry

    tasks = Registry.create_custom_tasks_module(Path(TASKS.parent / "lighteval_edit_quality.py")).TASKS_TABLE
    assert [task.name for task in tasks] == ["ibke:reliability", "ibke:generality", "ibke:locality"]
    row = datasets.load_dataset(tasks[0].hf_repo, tasks[0].hf_subset)["test"][0]
    doc = tasks[0].prompt_function(row, tasks[0].name)
    assert doc.query == questions("reliability")[0]["prompt"] and doc.choices == questions("reliability")[0]["answers"]
    (metric,) = tasks[0].metrics
    answer = SimpleNamespace(final_text=[f" {doc.choices[0]}.\nAnd"])
    assert metric.sample_level_fn.compute(doc=doc, model_response=answer) == 1.0
