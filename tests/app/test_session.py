"""A visitor's edits: what is undone is gone bit by bit, what is left is as if it alone had been edited."""

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
from ibke_hf.app.forms import Fact, Form
from ibke_hf.app.look import choices
from ibke_hf.app.session import Session, forget
from ibke_hf.app.workbench import Workbench, load_workbench
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.records import EditRequest
from ibke_hf.core.tokens import RequestError
from ibke_hf.editors.saved import load_edit
from ibke_hf.lifelong.routed import RoutedEdit
from ibke_hf.lifelong.router import Router

FACTS = tuple(
    Form(prompt, target, neighbours="Berlin is in").fact() for prompt, target in zip(PROMPTS, TARGETS, strict=False)
)


@pytest.fixture(scope="module")
def bench(tiny_model, tiny_tokenizer):
    return small_workbench(tiny_model, tiny_tokenizer)


def edited(bench, facts):
    edits = Session()
    for fact in facts:
        edits = bench.add(edits, fact)
    return edits


def logits(bench, edit=None):
    ids = bench.tokenizer(" ".join(PROMPTS), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if edit is None:
            return bench.model(input_ids=ids).logits
        with edit.attached(bench.model):
            return bench.model(input_ids=ids).logits


def test_edits_are_solved_together_as_those_of_a_sequence(bench):
    visit = edited(bench, FACTS[:3])
    requests = [fact.request for fact in FACTS[:3]]
    whole = bench.editor.edit(bench.model, bench.tokenizer, requests, mode="sequential")
    torch.testing.assert_close(logits(bench, visit.edit), logits(bench, whole), rtol=1e-4, atol=1e-4)
    assert visit.edit.info.requests == tuple(requests)
    assert visit.facts == FACTS[:3]
    assert all(step.seconds > 0 and step.factors for step in visit.steps)


def test_undoing_all_gives_the_plain_model_bit_by_bit(bench):
    plain = logits(bench)
    visit = edited(bench, FACTS[:3])
    assert not torch.equal(logits(bench, visit.edit), plain)
    for index in (1, 1, 0):
        visit = bench.remove(visit, index)
    assert (visit.steps, visit.edit) == ((), None)
    assert torch.equal(logits(bench, visit.edit), plain)
    assert bench.clear(edited(bench, FACTS[:2])) == Session()


def test_edits_of_a_rank_are_cut_one_by_one_and_can_be_made_whole_again(bench):
    whole = edited(bench, FACTS[:2])
    cut = bench.of_rank(whole, 1)
    parts = [step.edit.truncate(1) for step in whole.steps]
    assert torch.equal(logits(bench, cut.edit), logits(bench, parts[0].compose(parts[1], how="solve")))
    assert not torch.allclose(logits(bench, cut.edit), logits(bench, whole.edit))
    assert cut.steps == whole.steps  # what was made is kept whole
    more = bench.add(cut, FACTS[2])
    assert more.rank == 1 and len(more.steps) == 3
    alone = bench.remove(bench.remove(more, 2), 1)
    assert set(alone.edit.ranks.values()) == {1}
    assert torch.equal(logits(bench, bench.of_rank(cut, 0).edit), logits(bench, whole.edit))
    with pytest.raises(RequestError, match="found -1"):
        bench.of_rank(cut, -1)
    tuned = Workbench(bench.model, bench.tokenizer, bench.fine_tuning)
    with pytest.raises(RequestError, match="no low rank to cut"):
        tuned.of_rank(Session(), 1)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_what_is_left_is_as_if_it_alone_had_been_edited(bench, index):
    visit = bench.remove(edited(bench, FACTS[:4]), index)
    alone = edited(bench, [fact for i, fact in enumerate(FACTS[:4]) if i != index])
    assert visit.edit == alone.edit
    assert [step.factors for step in visit.steps] == [step.factors for step in alone.steps]


def test_the_order_of_edits_does_not_matter(bench):
    """Why the page has no way to change it."""
    one, other = edited(bench, FACTS[:3]), edited(bench, [FACTS[i] for i in (2, 0, 1)])
    torch.testing.assert_close(logits(bench, one.edit), logits(bench, other.edit), rtol=1e-5, atol=1e-5)


def test_one_edit_can_take_the_place_of_all(bench):
    instead = bench.add(edited(bench, FACTS[:3]), FACTS[3], instead=True)
    alone = edited(bench, FACTS[3:4])
    assert (instead.facts, instead.edit) == (alone.facts, alone.edit)
    with pytest.raises(RequestError, match="the target is empty"):
        bench.add(instead, Form("France", " ").fact(), instead=True)


def test_a_prompt_is_edited_to_one_answer_at_a_time(bench):
    again = Form(PROMPTS[0], "Oslo").fact()
    visit = bench.add(edited(bench, FACTS[:2]), again)
    assert [fact.request.target for fact in visit.facts] == [TARGETS[1], "Oslo"]
    assert visit.edit == edited(bench, [FACTS[1], again]).edit


def test_edits_that_are_lost_among_others_are_told(bench, monkeypatch):
    visit = edited(bench, FACTS[:3])
    told = [bench.look(visit, i)[0]["right"] for i in range(3)]
    assert bench.holding(visit) == told
    monkeypatch.setattr(session, "read_answers", lambda *_: [{"answer": TARGETS[0]}, {"answer": ""}, {"answer": "x"}])
    assert bench.holding(visit) == [True, False, False]
    assert bench.holding(Session()) == []


def test_what_a_browser_has_kept_is_edited_in_again(bench):
    visit = edited(bench, [*FACTS[:3], FORM.fact()])
    forms = [Form.of_fact(fact) for fact in visit.facts]
    again = bench.restore(Session(), [form.fact() for form in forms])
    assert (again.facts, again.edit) == (visit.facts, visit.edit)


def test_progress_is_reported(bench):
    told = []
    bench.side_by_side(FACTS[0], told.append)
    assert told == [(0, 2), (1, 2)]


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
    visit = edited(bench, FACTS[:2])
    with pytest.raises(RequestError, match="2 edits are active"):
        bench.add(visit, FACTS[2])
    for act in (bench.remove, bench.look):
        with pytest.raises(RequestError, match="no edit 3; 2 are active"):
            act(visit, 2)


def test_a_broken_edit_leaves_the_session(bench, monkeypatch):
    visit = edited(bench, FACTS[:3])
    kept = replace(visit)

    def fail(*_, **__):
        raise NonFiniteError("the loss is not finite")

    with monkeypatch.context() as patched:
        patched.setattr(bench.editor, "edit", fail)
        with pytest.raises(NonFiniteError):
            bench.add(visit, FACTS[3])
    assert visit == kept


def test_another_process_can_take_a_session_over(bench):
    visit = edited(bench, FACTS[:2])
    assert pickle.loads(pickle.dumps(visit)) == visit
    assert all(tensor.device.type == "cpu" for tensor in visit.edit.tensors().values())


def test_questions_are_asked_of_all_edits_together(bench):
    visit = edited(bench, FACTS[:2])
    rows = bench.look(visit, 0)
    assert [row["prompt"] for row in rows] == [PROMPTS[0], "Berlin is in"]
    [asked] = bench.ask(visit, f" {PROMPTS[0]} ")
    assert (asked["role"], asked["prompt"], asked["right"]) == ("question", PROMPTS[0], None)
    assert [p for _, p in asked["after"]["top"]] == pytest.approx([p for _, p in rows[0]["after"]["top"]], abs=1e-6)
    with pytest.raises(RequestError, match="the question is empty"):
        bench.ask(visit, "  ")


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
    visit, file = bench.save(edited(bench, FACTS[:3]))
    other, other_file = bench.save(edited(bench, FACTS[3:4]))
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    assert load_edit(tmp_path / "ibke-edit") == visit.edit
    adapter = LowRankEdit.from_pretrained(tmp_path / "ibke-edit")
    torch.testing.assert_close(logits(bench, adapter), logits(bench, visit.edit), rtol=1e-4, atol=1e-4)
    later, replaced = bench.save(bench.remove(visit, 0))
    assert (later.folder, replaced) == (visit.folder, file)
    assert [path.name for path in Path(visit.folder).iterdir()] == ["ibke-edit.zip"]
    assert other_file.parent != file.parent
    for one in (visit, other, Session()):
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
    other_fact = replace(FORM, prompt="Spain", rephrasings="my own")
    assert other_fact.fitted(examples) is other_fact
    assert Fact(EditRequest("a", "b")).questions == ()


# --- which model ----------------------------------------------------------------------------------------------------


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
        ("editor", None, "does not say which backbone"),
        ("model", "model", "not an editor"),
    ],
)
def test_what_does_not_fit_is_said(bench, tmp_path, editor, backbone, message):
    bench.model.save_pretrained(tmp_path / "model")
    bench.editor.save_pretrained(tmp_path / "editor")
    with pytest.raises(ValueError, match=message):
        load_workbench(editor and str(tmp_path / editor), backbone)


def test_with_a_router_the_list_is_a_library_of_which_a_prompt_carries_its_own(tiny_model, tiny_tokenizer):
    plain = small_workbench(tiny_model, tiny_tokenizer)
    torch.manual_seed(0)
    layers = plain.editor.config.module_names()
    router = Router.for_backbone(plain.model, layers, width=16, heads=2, dim=16, threshold=1.0).eval()
    routed = small_workbench(tiny_model, tiny_tokenizer, router=router)
    one = edited(routed, FACTS[:1])
    assert torch.equal(logits(routed, one.edit), logits(plain, edited(plain, FACTS[:1]).edit))  # one acts always
    three = edited(routed, FACTS[:3])
    assert isinstance(three.edit, RoutedEdit) and len(three.edit.parts) == 3
    assert torch.equal(logits(routed, three.edit), logits(routed))  # nothing is as near as 1
    router.config.threshold, router.config.most_edits = -1.0, 3
    solved = LowRankEdit.compose(*three.edit.parts, how="solve")
    torch.testing.assert_close(logits(routed, three.edit), logits(routed, solved), rtol=1e-4, atol=1e-4)
    left = routed.remove(three, 1)
    assert left.edit.parts == (three.edit.parts[0], three.edit.parts[2]) and left.facts == (FACTS[0], FACTS[2])
    assert pickle.loads(pickle.dumps(three)).edit.parts == three.edit.parts
    saved, archive = routed.save(three)
    assert archive.exists()
    forget(saved)


def test_a_list_is_solved_by_the_editors_ridge_and_summed_where_its_config_says_so(tiny_model, tiny_tokenizer):
    bench = small_workbench(tiny_model, tiny_tokenizer)
    bench = session.Workbench(bench.model, bench.tokenizer, bench.editor)
    assert edited(bench, FACTS[:2]).edit.ridge == bench.editor.config.ridge
    bench.editor.config.ridge = 0.7
    bench = session.Workbench(bench.model, bench.tokenizer, bench.editor)
    visit = edited(bench, FACTS[:3])
    assert visit.edit.ridge == 0.7 and bench.remove(visit, 0).edit.ridge == 0.7
    bench.editor.config.composition = "sum"
    visit = edited(session.Workbench(bench.model, bench.tokenizer, bench.editor), FACTS[:2])
    requests = [fact.request for fact in FACTS[:2]]
    each = bench.editor.edit(bench.model, bench.tokenizer, requests, mode="independent")
    for name in visit.edit.layers:
        torch.testing.assert_close(visit.edit.weight_update(name), each.weight_updates(name).sum(0))


def test_the_list_says_which_edits_are_at_odds(bench):
    spelt = Form("the capital of France is?", "Oslo").fact()
    visit = edited(bench, (*FACTS[:2], spelt))
    (conflict,) = visit.conflicts()
    assert (conflict.first, conflict.second, conflict.kind) == (0, 2, "override")
    labels = [label for label, _ in choices(visit, [True, True, False], visit.conflicts())]
    assert labels[0].endswith("Rome (at odds with 3)") and labels[2].endswith("Oslo (lost; at odds with 1)")
    assert labels[1].endswith("Poland")
