"""What a page offers and says of its model is what that model, asked, answers; its own questions are fair ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_workbench import FORM, PROMPTS, small_workbench

from ibke_hf.app import knowledge as knows
from ibke_hf.app import workbench as session
from ibke_hf.app.forms import Form
from ibke_hf.app.knowledge import Knowledge, general_knowledge, read_facts
from ibke_hf.app.rephrasings import english_rephrasings, template_of, template_rephrasings
from ibke_hf.app.session import Session
from ibke_hf.app.workbench import load_workbench
from ibke_hf.atlas import load_split
from ibke_hf.core.records import EditRequest
from ibke_hf.evaluation.comparison import PageQuestion, questions_of, typed_lines
from ibke_hf.evaluation.inspection import answer
from ibke_hf.evaluation.wording import exact_match


@pytest.fixture(scope="module")
def atlas():
    return load_workbench()


@pytest.fixture(scope="module")
def bench(tiny_model, tiny_tokenizer):
    return small_workbench(tiny_model, tiny_tokenizer)


# --- Atlas --------------------------------------------------------------------------------------------------------


def test_examples_are_facts_that_atlas_knows_or_mistakes_that_it_makes(atlas):
    examples = atlas.knowledge.examples
    assert [example.knows for example in examples] == [True] * 6 + [False]
    originals = {fact.form.prompt: fact.answers for fact in map(knows._of_record, knows.example_records())}
    for example in examples:
        says = answer(atlas.model, atlas.tokenizer, example.form.prompt)
        assert says.startswith(example.says)
        assert example.knows == exact_match(says, originals[example.form.prompt])
        assert not exact_match(says, [example.form.target])
        for question in example.form.fact().questions:
            if question.role == "neighbour":
                assert exact_match(answer(atlas.model, atlas.tokenizer, question.prompt), question.answers)


def test_placeholders_are_facts_that_atlas_knows(atlas):
    prompt, true, other = atlas.knowledge.placeholder
    assert answer(atlas.model, atlas.tokenizer, prompt) == true != other
    assert prompt != "The capital of Italy is"  # which it answers with "Athens"
    assert prompt not in {example.form.prompt for example in atlas.knowledge.examples}
    assert "3,303 facts" in atlas.knowledge.about
    assert 0.9 < len(atlas.knowledge.known) / atlas.knowledge.asked <= 1


@pytest.mark.parametrize("prompt", ["The capital of Turkey is", "What is the capital of Turkey?"])
def test_a_fact_that_nobody_rephrased_is_asked_in_other_words(atlas, prompt):
    visit = atlas.add(Session(), Form(prompt, "Rome").fact())
    asked = visit.facts[0].questions
    assert [question.role for question in asked] == ["request", *["rephrase"] * 3, *["neighbour"] * 3]
    assert all(question.automatic for question in asked[1:])
    assert all("Turkey" in question.prompt and question.answers == ("Rome",) for question in asked[1:4])
    for question in asked[4:]:
        assert "Turkey" not in question.prompt
        assert exact_match(answer(atlas.model, atlas.tokenizer, question.prompt), question.answers)
    assert len(atlas.look(visit, 0)) == 7


def test_typed_questions_are_left_alone(atlas):
    fact = Form("The capital of Turkey is", "Rome", "Turkey has its capital at", "", "Iron is a").fact()
    assert atlas.completed(fact) == fact
    half = atlas.completed(replace(fact, questions=fact.questions[:2]))
    assert [question.automatic for question in half.questions] == [False, False, True, True, True]


# --- any model ----------------------------------------------------------------------------------------------------


def test_facts_for_other_models_are_whole():
    facts = read_facts(knows.FACTS)
    assert len(facts) >= 12
    assert len({fact.form.prompt for fact in facts}) == len(facts)
    assert all(fact.answers and fact.form.target not in fact.answers for fact in facts)


def test_another_model_is_offered_what_it_knows(bench, monkeypatch, tmp_path):
    facts = [
        {"prompt": "France", "answers": ["Paris", "Lutetia"], "target": "Rome", "neighbours": ["Oslo -> Norway"]},
        {"prompt": "Spain", "answers": ["Madrid"], "target": "Rome", "consequences": ["The king -> a Roman"]},
    ]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    says = {"France": "Lutetia, of old", "Spain": "Paris. And", "Oslo": "Sweden"}
    monkeypatch.setattr(knows, "read_answers", lambda _, __, asked: [{"answer": says[q.prompt]} for q in asked])
    learnt = general_knowledge(bench.model, bench.tokenizer, tmp_path / "facts.json")
    first, second = learnt.examples
    assert (first.form, first.says, first.knows) == (Form("France", "Rome"), "Lutetia", True)  # Oslo it gets wrong
    assert (second.form, second.says, second.knows) == (Form("Spain", "Madrid"), "Paris", False)  # the true answer
    assert (len(learnt.known), learnt.asked) == (1, 2)
    assert "million parameters" in learnt.about


def test_a_model_that_knows_nothing_is_offered_corrections_alone(bench):
    learnt = general_knowledge(bench.model, bench.tokenizer)
    assert not [example for example in learnt.examples if example.knows]
    assert learnt.placeholder == ("", "", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "an array of objects"),
        ("[3]", "fact 1: needs a prompt"),
        ('[{"prompt": "a", "target": 3}]', "fact 1: needs a prompt"),
        ('[{"prompt": "a", "target": "b"}, {"prompt": "a", "target": "b", "neighbors": []}]', "fact 2: 'neighbors'"),
        ('[{"prompt": "a", "target": "b", "answers": "c"}]', "answers must be a list"),
        ('[{"prompt": "a", "target": "b", "consequences": ["-> c"]}]', "consequence 1"),
    ],
)
def test_bad_lists_of_facts_are_named(tmp_path, text, message):
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_facts(tmp_path / "facts.json")


def test_guessed_rephrasings_are_asked_only_if_the_model_takes_them_for_the_same(bench, monkeypatch):
    def says(_, __, questions, *___):
        return [{"answer": "" if "knows" in question.prompt else "Paris", "top": []} for question in questions]

    monkeypatch.setattr(session, "read_answers", says)
    known = (
        PageQuestion("question", "Berlin is in", ("Germany",)),
        PageQuestion("question", "Oslo is in", ("Paris",)),
    )
    monkeypatch.setattr(bench, "knowledge", Knowledge(known=known))
    asked = bench.completed(Form(PROMPTS[0], "Rome").fact()).questions[1:]
    assert [question.prompt for question in asked if question.role == "rephrase"] == [
        "What is the capital of France?",
        "France's capital is",
        "Here is a fact. The capital of France is",
    ]
    assert [question.prompt for question in asked if question.role == "neighbour"] == ["Oslo is in"]


def test_neighbours_do_not_speak_of_the_fact():
    known = tuple(PageQuestion("question", f"The capital of {name} is", (name,)) for name in ("Peru", "Chad"))
    near = Knowledge(known=known).neighbours("What is the capital of Chad?")
    assert [question.prompt for question in near] == ["The capital of Peru is"]
    assert near[0].role == "neighbour"


# --- the same in other words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("The capital of France is", "What is the capital of France?"),
        ("What is the capital of France?", "The capital of France is"),
        ("Marie Curie was born in", "Where was Marie Curie born?"),
        ("Where was Marie Curie born?", "Marie Curie was born in"),
        ("The Louvre is located in", "Where is The Louvre?"),
        ("Hamlet was written by", "Who wrote Hamlet?"),
        ("Who wrote Hamlet?", "Hamlet was written by"),
        ("Microsoft was founded by", "Who founded Microsoft?"),
        ("Iron is a", "As everybody knows, Iron is a"),
        ("富士山は", "As everybody knows, 富士山は"),
        ("How hot is the Sun?", "Question: How hot is the Sun?\nAnswer:"),
    ],
)
def test_english_says_the_same_by_rule(prompt, first):
    texts = english_rephrasings(prompt)
    assert texts[0] == first
    assert prompt not in texts
    assert len(set(texts)) == len(texts)


def test_templates_say_the_same_of_any_subject():
    world = load_split().taught
    for subject in ("Turkey", "Wakanda"):
        relation, form, name = template_of(world, f"What is the capital of {subject}?")
        assert (relation.id, form, name) == ("capital", 1, subject)
        texts = template_rephrasings(world, f"The capital of {subject} is")
        assert f"{subject} has its capital at" in texts
        assert f"The capital of {subject} is" not in texts
    assert template_rephrasings(world, "The best editor is") == ()


@pytest.mark.parametrize(
    "form",
    [
        FORM,
        Form("a", "b"),
        Form("a", "b -> c", "r\nr -> s | t", "x -> y\nz ->", "n\nn -> m\na -> b ->"),
    ],
)
def test_facts_can_be_typed_in_again(form):
    fact = form.fact()
    assert Form.of_fact(fact).fact() == fact
    automatic = replace(fact, questions=(*fact.questions, PageQuestion("rephrase", "q", ("b",), automatic=True)))
    assert Form.of_fact(automatic).fact() == fact
    request = EditRequest(form.prompt, form.target)
    assert questions_of(request, *typed_lines(request, fact.questions)) == fact.questions
