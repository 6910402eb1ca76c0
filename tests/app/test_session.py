"""A visitor's edits: what is undone is gone bit by bit, what is left is as if it alone had been edited, errors change nothing."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_workbench import FORM, PROMPTS, TARGETS, small_workbench

from ibke_hf import LowRankEdit
from ibke_hf.app import workbench as session
from ibke_hf.app.workbench import Fact, Form, Session, forget, load_workbench
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError

FACTS = tuple(
    Form(prompt, target, neighbours="Berlin is in").fact() for prompt, target in zip(PROMPTS, TARGETS, strict=False)
)


@pytest.fixture(scope="module")
def bench(tiny_model, tiny_tokenizer):
    return small_workbench(tiny_model, tiny_tokenizer)


def edited(bench, facts):
    made = Session()
    for fact in facts:
        made = bench.add(made, fact)
    return made


def logits(bench, edit=None):
    ids = bench.tokenizer(" ".join(PROMPTS), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if edit is None:
            return bench.model(input_ids=ids).logits
        with edit.attached(bench.model):
            return bench.model(input_ids=ids).logits


def test_edits_add_up_as_in_sequential_mode(bench):
    made = edited(bench, FACTS[:3])
    requests = [fact.request for fact in FACTS[:3]]
    whole = bench.editor.edit(bench.model, bench.tokenizer, requests, mode="sequential")
    torch.testing.assert_close(logits(bench, made.edit), logits(bench, whole), rtol=1e-4, atol=1e-4)
    assert made.edit.info.requests == tuple(requests)
    assert made.facts == FACTS[:3]
    assert all(step.seconds > 0 and step.factors for step in made.steps)


def test_undoing_all_gives_the_plain_model_bit_by_bit(bench):
    plain = logits(bench)
    made = edited(bench, FACTS[:3])
    assert not torch.equal(logits(bench, made.edit), plain)
    for index in (1, 1, 0):
        made = bench.remove(made, index)
    assert (made.steps, made.edit) == ((), None)
    assert torch.equal(logits(bench, made.edit), plain)
    assert bench.clear(edited(bench, FACTS[:2])) == Session()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_what_is_left_is_as_if_it_alone_had_been_edited(bench, index):
    made = bench.remove(edited(bench, FACTS[:4]), index)
    alone = edited(bench, [fact for i, fact in enumerate(FACTS[:4]) if i != index])
    assert made.edit == alone.edit
    assert [step.factors for step in made.steps] == [step.factors for step in alone.steps]


@pytest.mark.parametrize(
    ("index", "by", "order"), [(0, 1, (1, 0, 2)), (2, -1, (0, 2, 1)), (2, -9, (2, 0, 1)), (0, 9, (1, 2, 0))]
)
def test_moving_edits_in_the_new_order(bench, index, by, order):
    before = edited(bench, FACTS[:3])
    moved = bench.move(before, index, by)
    assert moved.facts == tuple(FACTS[i] for i in order)
    assert moved.edit == edited(bench, moved.facts).edit
    assert moved.edit != before.edit


def test_moving_beyond_the_ends_changes_nothing(bench):
    made = edited(bench, FACTS[:2])
    assert bench.move(made, 0, -1) is made
    assert bench.move(made, 1, 1) is made


def test_progress_is_reported(bench):
    told = []
    bench.remove(edited(bench, FACTS[:4]), 0, told.append)
    bench.side_by_side(FACTS[0], told.append)
    assert told == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form("", "Rome"), "the fact: the prompt is empty"),
        (Form("France", " \n"), "the fact: the target is empty"),
        (Form("The capital of France is", "long " * 200), "the fact: "),
        (Form("x" * 5000, "Rome"), "the fact: 5000 characters"),
        (Form("France \udc00", "Rome"), "the fact: .*surrogate"),
        (replace(FORM, neighbours="-> x"), "neighbour 1"),
        (replace(FORM, consequences="word " * 150), "consequence 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(bench, form, message):
    with pytest.raises(RequestError, match=message):
        bench.add(Session(), form.fact())


def test_there_is_an_end_to_edits_and_to_the_list(bench, monkeypatch):
    monkeypatch.setattr(session, "MAX_EDITS", 2)
    made = edited(bench, FACTS[:2])
    with pytest.raises(RequestError, match="2 edits are active"):
        bench.add(made, FACTS[2])
    for act in (bench.remove, bench.look, lambda one, index: bench.move(one, index, 1)):
        with pytest.raises(RequestError, match="no edit 3; 2 are active"):
            act(made, 2)


def test_a_broken_recomputation_leaves_the_session(bench, monkeypatch):
    made = edited(bench, FACTS[:3])
    kept = replace(made)

    def fail(*_, **__):
        raise NonFiniteError("the loss is not finite")

    with monkeypatch.context() as patched:
        patched.setattr(bench.editor, "edit", fail)
        with pytest.raises(NonFiniteError):
            bench.remove(made, 0)
    assert made == kept


def test_another_process_can_take_a_session_over(bench):
    made = edited(bench, FACTS[:2])
    assert pickle.loads(pickle.dumps(made)) == made
    assert all(tensor.device.type == "cpu" for tensor in (*made.edit.inputs.values(), *made.edit.outputs.values()))


def test_questions_are_asked_of_all_edits_together(bench):
    made = edited(bench, FACTS[:2])
    rows = bench.look(made, 0)
    assert [row["prompt"] for row in rows] == [PROMPTS[0], "Berlin is in"]
    [asked] = bench.ask(made, f" {PROMPTS[0]} ")
    assert (asked["role"], asked["prompt"], asked["right"]) == ("question", PROMPTS[0], None)
    assert [p for _, p in asked["after"]["top"]] == pytest.approx([p for _, p in rows[0]["after"]["top"]], abs=1e-6)
    with pytest.raises(RequestError, match="the question is empty"):
        bench.ask(made, "  ")


def test_side_by_side_edits_the_fact_alone(bench):
    columns = bench.side_by_side(FORM.fact())
    assert list(columns) == ["IBKE", "fine-tuning"]
    for column in columns.values():
        assert [row["before"] for row in column["rows"]] == [row["before"] for row in columns["IBKE"]["rows"]]
        assert column["seconds"] > 0
    assert columns["IBKE"]["rows"] == bench.look(bench.add(Session(), FORM.fact()), 0)
    assert columns["fine-tuning"]["nbytes"] > columns["IBKE"]["nbytes"] > 0
    alone = session.Workbench(bench.model, bench.tokenizer, bench.editor)
    with pytest.raises(RequestError, match="no fine-tuning editor"):
        alone.side_by_side(FORM.fact())


def test_downloads_are_lora_adapters_in_a_folder_of_their_own(bench, tmp_path):
    with pytest.raises(RequestError, match="no active edit to save"):
        bench.save(Session())
    made, file = bench.save(edited(bench, FACTS[:3]))
    other, other_file = bench.save(edited(bench, FACTS[3:4]))
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    assert LowRankEdit.from_pretrained(tmp_path / "ibke-edit") == made.edit
    later, replaced = bench.save(bench.remove(made, 0))
    assert (later.folder, replaced) == (made.folder, file)
    assert [path.name for path in Path(made.folder).iterdir()] == ["ibke-edit.zip"]
    assert other_file.parent != file.parent
    for one in (made, other, Session()):
        forget(one)
    assert not file.parent.exists()
    assert not other_file.parent.exists()


def test_forms_drop_what_belongs_to_another_fact():
    examples = (FORM, Form("Iron is a", "metal", "What is iron?", "", "An oak is a -> tree"))
    assert FORM.fitted(examples) is FORM
    assert replace(FORM, prompt="The capital of Spain is").fitted(examples) == Form("The capital of Spain is", "Rome")
    changed = replace(FORM, target="Oslo").fitted(examples)
    assert changed == replace(FORM, target="Oslo", consequences="Paris is in")
    assert replace(changed, prompt="Spain").fitted(examples) == Form("Spain", "Oslo")
    own = replace(FORM, prompt="Spain", rephrasings="my own")
    assert own.fitted(examples) is own
    assert Fact(EditRequest("a", "b")).questions == ()


# --- which model ------------------------------------------------------------------------------------------------------


def test_atlas_is_the_default():
    bench = load_workbench()
    assert (bench.name, type(bench.editor).__name__, type(bench.fine_tuning).__name__) == (
        "Atlas",
        "IBKEEditor",
        "FineTuningEditor",
    )
    assert not bench.model.training


def test_another_model_and_its_editor(bench, tmp_path):
    for name, thing in (("model", bench.model), ("model", bench.tokenizer), ("editor", bench.editor)):
        thing.save_pretrained(tmp_path / name)
    loaded = load_workbench(str(tmp_path / "editor"), str(tmp_path / "model"))
    assert loaded.name == "model"
    assert loaded.fine_tuning.config.edited_layers == tuple(bench.editor.config.edited_layers)
    ours, theirs = (one.add(Session(), FACTS[0]).edit for one in (bench, loaded))
    for name in ours.layers:
        torch.testing.assert_close(ours.weight_update(name), theirs.weight_update(name))


@pytest.mark.parametrize(
    ("editor", "backbone", "message"),
    [
        (None, "some/model", "needs an editor"),
        ("editor", None, "does not say which backbone"),
        ("model", "model", "not an editor"),
    ],
)
def test_what_does_not_fit_is_said(bench, tmp_path, editor, backbone, message):
    bench.model.save_pretrained(tmp_path / "model")
    bench.editor.save_pretrained(tmp_path / "editor")
    with pytest.raises(ValueError, match=message):
        load_workbench(editor and str(tmp_path / editor), backbone)
