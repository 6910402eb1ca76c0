"""The page without a server: what its handlers return, what it says of bad input, how it is launched."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

gr = pytest.importorskip("gradio", reason="the extra demo is not installed")

from paths import ROOT  # noqa: E402
from small_workbench import FORM, PROMPTS, TARGETS, small_workbench  # noqa: E402

from ibke_hf.app import page as app  # noqa: E402
from ibke_hf.app.forms import Form  # noqa: E402
from ibke_hf.app.knowledge import Example, Knowledge  # noqa: E402
from ibke_hf.app.session import Session  # noqa: E402
from ibke_hf.cli import main  # noqa: E402
from ibke_hf.evaluation.comparison import PageQuestion  # noqa: E402

SPACE = ROOT / "spaces" / "ibke-editor"
EXAMPLES = (Example(FORM, "Paris", knows=True), Example(Form("Iron is a", "metal"), "bird", knows=False))
FIELDS = ("prompt", "target", "rephrasings", "consequences", "neighbours")


@pytest.fixture(scope="module")
def bench(tiny_model, tiny_tokenizer):
    return small_workbench(tiny_model, tiny_tokenizer, name="<tiny>")


@pytest.fixture
def page(bench):
    with gr.Blocks(analytics_enabled=False):
        return app.Page(bench, EXAMPLES)


def edit(page, form, session):
    return page.edit(*(getattr(form, name) for name in FIELDS), session)


def edited(page, number):
    shown = {page.session: Session()}
    for prompt, target in list(zip(PROMPTS, TARGETS, strict=False))[:number]:
        shown = edit(page, Form(prompt, target), shown[page.session])
    return shown


# --- handlers -------------------------------------------------------------------------------------------------------


def test_an_edit_is_shown_and_kept(page, bench):
    shown = edit(page, FORM, Session())
    visit = shown[page.session]
    assert visit.facts == (FORM.fact(),)
    assert shown[page.rows] == bench.look(visit, 0)
    assert shown[page.active].choices == [("1. The capital of France is → Rome", 0)]
    assert shown[page.active].value == 0
    assert shown[page.results].count("<article") == 5
    assert shown[page.results].count('class="ibke-layer"') == len(bench.editor.config.edited_layers)
    assert (shown[page.tools].visible, shown[page.none_yet].visible, shown[page.more].visible) == (True, False, True)
    for title, score in (("Did it take?", "reliability"), ("Does it carry over?", "generality")):
        assert f'title="{score}">{title}' in shown[page.verdict]
    assert shown[page.comparison] == shown[page.asked] == ""


def test_a_visitor_goes_through_everything(page, bench):
    shown = edited(page, 3)
    assert [label.removesuffix(" (lost)") for label, _ in shown[page.active].choices] == [
        f"{i + 1}. {PROMPTS[i]} → {TARGETS[i]}" for i in range(3)
    ]
    assert shown[page.active].value == 2
    visit = shown[page.session]
    shown = page.show(0, visit)
    assert page.session not in shown  # what only shows cannot bring an older list of edits back
    assert (shown[page.active].value, shown[page.rows][0]["prompt"]) == (0, PROMPTS[0])
    figure, rows = page.ask("Berlin is in", visit)
    assert "Berlin is in" in figure
    assert rows == bench.ask(visit, "Berlin is in")
    assert page.compare(0, visit).count("<tr") >= 1 + 1 + 1
    saved, file = page.save(visit)
    assert Path(file.value["path"]).name == "ibke-edit.zip"
    app.forget(saved)
    shown = page.undo(1, visit)
    assert [fact.request.prompt for fact in shown[page.session].facts] == [PROMPTS[0], PROMPTS[2]]
    assert shown[page.active].value == 1
    shown = page.undo_all(shown[page.session])
    assert shown[page.session].edit is None
    assert (shown[page.verdict], shown[page.results]) == (app.WAITING, "")
    assert (shown[page.tools].visible, shown[page.none_yet].visible, shown[page.rows]) == (False, True, [])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form("", "Rome"), "the prompt is empty"),
        (Form("France", ""), "the target is empty"),
        (Form("a", "long " * 200), "the fact: "),
        (Form("<b>France</b>", " "), r"&lt;b&gt;France&lt;/b&gt;"),
        (Form("France", "Rome", consequences="-> x"), "consequence 1"),
    ],
)
def test_bad_input_gives_the_message_without_a_traceback(page, form, message):
    with pytest.raises(gr.Error, match=message) as raised:
        edit(page, form, Session())
    assert not raised.value.print_exception


def test_handlers_that_need_an_edit_say_so(page):
    for handler in (page.undo, page.show, page.compare):
        for index in (None, 0, 7, -1):
            with pytest.raises(gr.Error, match="no active edit is chosen"):
                handler(index, Session())
    with pytest.raises(gr.Error, match="no active edit to save"):
        page.save(Session())
    with pytest.raises(gr.Error, match="the question is empty"):
        page.ask(" ", Session())


def test_questions_of_an_example_go_with_its_fact(page):
    assert page.fit("The capital of Spain is", *[getattr(FORM, name) for name in FIELDS[1:]]) == ("", "", "")
    shown = edit(page, Form("Iron is a", "tree", FORM.rephrasings, FORM.consequences, FORM.neighbours), Session())
    assert {row["automatic"] for row in shown[page.rows][1:]} <= {True}


# --- many edits, a reload -------------------------------------------------------------------------------------------


def test_the_second_edit_is_warned_of_and_can_take_the_place_of_the_first(page):
    shown = edited(page, 1)
    assert (shown[page.edit_button].visible, shown[page.warning].visible) == (False, True)
    assert (shown[page.replace_button].visible, shown[page.add_button].visible) == (True, True)
    assert "One edit is active" in shown[page.warning].value
    fields = [getattr(Form("Berlin is in", "Oslo"), name) for name in FIELDS]
    replaced = page.replace(*fields, shown[page.session])
    assert [fact.request.target for fact in replaced[page.session].facts] == ["Oslo"]
    added = page.edit(*fields, shown[page.session])
    assert [fact.request.target for fact in added[page.session].facts] == [TARGETS[0], "Oslo"]
    assert "2 edits are active" in added[page.warning].value
    shown = page.undo_all(added[page.session])
    assert (shown[page.edit_button].visible, shown[page.replace_button].visible) == (True, False)
    assert (shown[page.warning].visible, shown[page.add_button].visible) == (False, False)


def test_edits_that_the_model_has_lost_are_marked(page, bench, monkeypatch):
    visit = edited(page, 3)[page.session]
    monkeypatch.setattr(bench, "holding", lambda _: [True, False, True])
    shown = page.show(0, visit)
    assert [label.endswith("(lost)") for label, _ in shown[page.active].choices] == [False, True, False]
    assert "Of your 3 edits the model answers 2" in shown[page.verdict]
    assert "undo some of them" in shown[page.verdict]


def test_a_reload_brings_the_same_edits_back(page, bench):
    visit = edit(page, FORM, edited(page, 2)[page.session])[page.session]
    kept = page.settle(visit)[page.browser]
    assert len(str(kept)) < 2000  # facts, not factors
    shown = page.restore(kept, Session())
    assert (shown[page.session].facts, shown[page.session].edit) == (visit.facts, visit.edit)
    nothing = page.settle(Session())[page.browser]  # None would leave in the browser what is there
    assert nothing == {"model": "<tiny>", "facts": []}
    assert page.restore(nothing, Session()) == {page.session: Session()}


@pytest.mark.parametrize(
    "stored",
    [
        None,
        7,
        [],
        {"model": "<tiny>"},
        {"model": "<tiny>", "facts": 3},
        {"model": "<tiny>", "facts": [["a"], 3, None]},
        {"model": "another", "facts": [["a", "b", "", "", ""]]},
    ],
)
def test_what_no_page_has_stored_brings_nothing_back(page, stored):
    assert page.restore(stored, Session())[page.session] == Session()


def test_a_page_with_edits_is_not_overwritten_by_what_the_browser_keeps(page):
    visit = edited(page, 1)[page.session]
    assert page.restore({"model": "<tiny>", "facts": [["a", "b", "", "", ""]]}, visit) == {page.session: visit}


def test_stored_facts_are_checked_as_typed_ones_are(page):
    with pytest.raises(gr.Error, match="the target is empty"):
        page.restore({"model": "<tiny>", "facts": [["France", " ", "", "", ""]]}, Session())


def test_edits_are_cut_to_a_rank_and_the_page_says_so(page):
    shown = edited(page, 2)
    cut = page.cut(1, 0, shown[page.session])
    assert cut[page.session].rank == 1
    assert "cut to rank 1" in cut[page.verdict] and "cut to rank" not in shown[page.verdict]
    assert "cut to rank" not in page.cut(0, 0, cut[page.session])[page.verdict]
    with pytest.raises(gr.Error, match="no active edit is chosen"):
        page.cut(1, None, Session())


def test_everything_that_changes_edits_waits_while_they_change(page):
    waiting = set(page._locked)
    assert {page.edit_button, page.replace_button, page.add_button, page.prompt, page.target} <= waiting
    assert {page.undo_button, page.clear_button, page.rank, page.save_button, page.active} <= waiting
    settled = page.settle(Session())
    assert all(settled[one]["interactive"] for one in waiting)


# --- what the page says of the model ------------------------------------------------------------------------------


def _texts(blocks, kind, name):
    return [str(getattr(block, name)) for block in blocks.blocks.values() if isinstance(block, kind)]


def test_placeholders_are_what_the_model_knows(bench, monkeypatch):
    known = (
        PageQuestion("question", "Berlin is in", ("Germany",)),
        PageQuestion("question", "Berlin is in the", ("west",)),
    )
    monkeypatch.setattr(bench, "knowledge", Knowledge("a <tiny> one", known=known, asked=3))
    blocks = app.build_app(bench, [])
    assert {"Berlin is in", "west"} <= set(_texts(blocks, gr.Textbox, "placeholder"))
    said = "".join(_texts(blocks, gr.HTML, "value"))
    assert "a &lt;tiny&gt; one" in said
    assert "Asked 3 facts before you came, it answered 2 right" in said


def test_a_model_that_knows_nothing_gets_no_fact_suggested(bench):
    blocks = app.build_app(bench, [])
    assert set(_texts(blocks, gr.Textbox, "placeholder")) <= {"", "None"}
    assert not _texts(blocks, gr.Dataset, "label")


# --- the whole page -------------------------------------------------------------------------------------------------


def test_every_handler_is_wired_to_one_queue(bench):
    blocks = app.build_app(bench, EXAMPLES)
    wired = {dependency.api_name: dependency for dependency in blocks.fns.values()}
    for name in ("edit", "replace", "undo", "undo_all", "show", "compare", "save", "ask"):
        assert (wired[name].concurrency_id, wired[name].concurrency_limit) == ("model", app.AT_ONCE)
    assert not blocks.analytics_enabled
    texts = [block.value for block in blocks.blocks.values() if isinstance(block, gr.HTML)]
    assert any("&lt;tiny&gt;" in str(text) for text in texts)


def test_the_page_asks_for_nothing_from_elsewhere():
    options = app.launch_options()
    theme = options["theme"]
    assert theme._stylesheets == []
    style = theme._get_theme_css() + Path(options["css_paths"]).read_text(encoding="utf-8")
    assert not re.findall(r"@import|@font-face|url\(.?http|googleapis", style)


def test_a_visitor_who_leaves_takes_the_files_along(page, bench):
    visit, file = bench.save(edited(page, 1)[page.session])
    assert page.session.delete_callback is app.forget
    page.session.delete_callback(visit)
    assert not file.exists()


# --- launching ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(bench, monkeypatch):
    """What `launch` loads and how it serves it, without doing either."""
    seen = {}
    monkeypatch.setattr(app, "load_workbench", lambda *names: seen.update(names=names) or bench)
    monkeypatch.setattr(gr.Blocks, "launch", lambda blocks, **options: seen.update(options=options, blocks=blocks))
    monkeypatch.delenv("IBKE_EDITOR", raising=False)
    monkeypatch.delenv("IBKE_BACKBONE", raising=False)
    for name in app.MODEL_CALLS:
        monkeypatch.setattr(bench, name, getattr(bench, name))  # puts them back
    return seen


def test_environment_says_which_model(launched, monkeypatch):
    app.launch()
    assert launched["names"] == (None, None)
    monkeypatch.setenv("IBKE_EDITOR", "org/editor")
    monkeypatch.setenv("IBKE_BACKBONE", "org/model")
    app.launch(server_port=1234)
    assert launched["names"] == ("org/editor", "org/model")
    assert launched["options"]["server_port"] == 1234
    assert launched["options"]["css_paths"] == app.STYLE


def test_command_line_launches_the_page(launched):
    assert main(["app", "--editor", "mine", "--backbone", "yours", "--port", "7001"]) == 0
    assert launched["names"] == ("mine", "yours")
    assert launched["options"]["server_port"] == 7001


def test_command_line_explains_a_backbone_without_an_editor(capsys):
    assert main(["app", "--backbone", "org/model"]) == 2
    assert "org/model" in capsys.readouterr().err


def test_zerogpu_lends_its_accelerator_to_what_runs_the_model(launched, bench, monkeypatch):
    lent = []

    def lend(function):
        lent.append(function.__name__)
        return function

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=lend))
    app.launch()
    assert lent == ["add", "restore", "look", "holding", "ask", "side_by_side"]
    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace())  # a folder of that name on the path
    assert app.accelerated()(len) is len
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert app.accelerated()(len) is len


def test_missing_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ibke_hf.app.page")
    with pytest.raises(ImportError, match=r'extra "demo": pip install "ibke-hf\[demo\]"'):
        importlib.import_module("ibke_hf.app.page")


def test_space_says_what_it_runs_on():
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert {"title", "emoji", "python_version", "tags"} <= set(head)
    pins = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert (head["sdk"], head["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={head['sdk_version']}" in pins
    assert f"gradio=={head['sdk_version']}" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert len((SPACE / "app.py").read_text(encoding="utf-8").splitlines()) < 10
