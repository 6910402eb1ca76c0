"""Facts as a test suite: files are read strictly, answers judged, failures told by table, exit code and JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ibke_hf.cli import main
from ibke_hf.core import composition, modeling_ibke
from ibke_hf.core.composition import SolvedEdit
from ibke_hf.core.edits import LowRankEdit
from ibke_hf.delivery import check as checking
from ibke_hf.delivery.check import Outcome, check_facts, failures, report, to_edit, write_junit
from ibke_hf.delivery.facts import read_checked_facts
from ibke_hf.evaluation.comparison import PageQuestion
from ibke_hf.io import FileError

FACTS = """\
facts:
  - name: Canberra
    prompt: The capital of Australia is
    answers: [Canberra, the city of Canberra]
    subject: Australia
    rephrasings:
      - What is the capital of Australia?
    neighbours: [The capital of Bulgaria is -> Sofia, The capital of Lebanon is]
  - prompt: The capital of Bulgaria is
    answers: Sofia
"""


TARGETS = ("Oslo", "Lima", "Rome")


def facts_file(folder, text=FACTS):
    file = folder / "facts.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_says_what_is_asked_and_which_answers_count(tmp_path, tiny_tokenizer):
    first, second = read_checked_facts(facts_file(tmp_path))
    assert [(one.role, one.prompt, one.answers) for one in first.questions] == [
        ("request", "The capital of Australia is", ("Canberra", "the city of Canberra")),
        ("rephrase", "What is the capital of Australia?", ("Canberra", "the city of Canberra")),
        ("neighbour", "The capital of Bulgaria is", ("Sofia",)),
        ("neighbour", "The capital of Lebanon is", ()),
    ]
    request = first.request(tiny_tokenizer)
    assert (first.name, request.target, request.subject) == ("Canberra", "Canberra", "Australia")
    assert (second.name, second.target) == ("The capital of Bulgaria is", "Sofia")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"facts\.yaml: holds no fact"),
        ("facts: []", r"holds no fact"),
        ("fact: []", r"'fact' is no key of a file of facts"),
        ("- a", r"expected values by name, found list"),
        (
            "facts:\n  - prompt: A\n    answers: [B]\n  - promt: A\n    answers: [B]",
            r"facts\.yaml:4: fact 2: 'promt' is",
        ),
        ("facts:\n  - prompt: A", r"facts\.yaml:2: fact 1: answers is missing or empty"),
        ("facts:\n  - answers: [A]", r"fact 1: prompt is missing"),
        (
            "facts:\n  - prompt: A\n    answers: [1]",
            r"answers must be a list of texts, found \[1\]; put each in quotes",
        ),
        ("facts:\n  - prompt: 7\n    answers: [B]", r"prompt must be a text, found 7"),
        ("facts:\n  - A", r"facts\.yaml:2: fact 1: expected prompt and answers by name"),
        (
            "facts:\n  - prompt: A\n    answers: [B]\n    neighbours: ['-> C']",
            r"fact 1: neighbour 1: nothing is asked",
        ),
        ("facts: [", r"not valid YAML"),
        ("facts:\n  - prompt: A\n    prompt: B\n    answers: [C]", r"'prompt' comes twice"),
    ],
)
def test_a_file_that_is_wrong_names_the_place_and_what_is_allowed(tmp_path, text, error):
    with pytest.raises(FileError, match=error):
        read_checked_facts(facts_file(tmp_path, text))


def test_facts_that_are_merged_in_from_elsewhere_are_read(tmp_path):
    text = "<<: &base\n  facts:\n    - prompt: A\n      answers: [B]\n"
    (fact,) = read_checked_facts(facts_file(tmp_path, text))
    assert (fact.name, fact.target) == ("A", "B")


@pytest.fixture
def says(monkeypatch):
    """Have the model say given answers, other ones with an edit."""

    def set_answers(plain, edited=None):
        def read(model, tokenizer, questions, edit=None):
            answers = plain if edit is None else {**plain, **(edited or {})}
            return [{"answer": answers[question.prompt]} for question in questions]

        monkeypatch.setattr(checking, "read_answers", read)
        monkeypatch.setattr(checking, "require_askable", lambda *_: None)

    return set_answers


PLAIN = {
    "The capital of Australia is": "Sydney",
    "What is the capital of Australia?": "Canberra, I think",
    "The capital of Bulgaria is": "Sofia.",
    "The capital of Lebanon is": "Tyre",
}


def test_without_an_edit_stated_answers_count_and_what_has_none_is_not_judged(tmp_path, says):
    says({**PLAIN, "The capital of Bulgaria is": "Varna"})
    outcomes = check_facts(None, None, read_checked_facts(facts_file(tmp_path)))
    assert [one.passed for one in outcomes] == [False, True, False, None, False]


def test_with_an_edit_neighbours_keep_what_the_model_said(tmp_path, says):
    facts = read_checked_facts(facts_file(tmp_path))
    says(PLAIN, {"The capital of Australia is": "Canberra", "The capital of Lebanon is": "Beirut"})
    assert [one.passed for one in check_facts(None, None, facts, object())] == [True, True, True, False, True]
    says(PLAIN, {"The capital of Bulgaria is": "Sofia, a city"})
    assert [one.passed for one in check_facts(None, None, facts, object())] == [False, True, True, True, True]


def test_facts_to_edit_are_those_whose_own_question_fails(tmp_path, says):
    says({**PLAIN, "The capital of Australia is": "Canberra", "The capital of Bulgaria is": "Varna"})
    facts = read_checked_facts(facts_file(tmp_path))
    assert [fact.name for fact in to_edit(facts, check_facts(None, None, facts))] == ["The capital of Bulgaria is"]


def test_junit_xml_counts_and_holds_whatever_a_model_says(tmp_path):
    question = PageQuestion("request", "A <b> & \x00 é", ("B",))
    outcomes = [
        Outcome("one", question, "\x07\ud800<no>", "yes", False),
        Outcome("one", question, "B", "B", True),
        Outcome("two", PageQuestion("neighbour", "C"), "D", "D", None),
    ]
    write_junit(outcomes, tmp_path / "out.xml", "facts.yaml")
    (suite,) = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    assert [(case.get("classname"), [part.tag for part in case]) for case in suite] == [
        ("one", ["failure"]),
        ("one", []),
        ("two", ["skipped"]),
    ]
    assert "expected B, answered" in suite[0][0].get("message")


def test_the_report_is_a_table_of_failures_and_a_count():
    question = PageQuestion("request", "The capital of Australia is", ("Canberra",))
    right, wrong = Outcome("a", question, "Canberra", "", True), Outcome("b", question, "", "", False)
    assert report([right]) == "1 of 1 answers are as they should be"
    lines = report([right, wrong]).splitlines()
    assert lines[1].split()[-2:] == ["Canberra", "(nothing)"]
    assert lines[-1] == "1 of 2 answers are as they should be, 1 of 2 facts fail"
    assert failures([right, wrong]) == [wrong]


def test_the_embedded_model_fails_is_edited_from_the_file_and_passes(tmp_path, capsys):
    file, xml, edit = facts_file(tmp_path), tmp_path / "out.xml", tmp_path / "edit"
    assert main(["check", str(file), "--junit", str(xml)]) == 1
    printed = capsys.readouterr().out
    assert "The capital of Australia is" in printed and "1 of 2 facts fail" in printed
    assert ElementTree.parse(xml).getroot().get("failures") == "2"
    assert main(["edit", "--from", str(file), "--out", str(edit)]) == 0
    assert "The capital of Australia is -> Canberra" in capsys.readouterr().out
    assert [request.target for request in LowRankEdit.from_pretrained(edit).info.requests] == ["Canberra"]
    assert main(["check", str(file), "--edit", str(edit), "--junit", str(xml)]) == 0
    assert ElementTree.parse(xml).getroot().get("failures") == "0"
    right = "facts:\n  - prompt: The capital of Bulgaria is\n    answers: [Sofia]\n"
    assert main(["edit", "--from", str(facts_file(tmp_path, right))]) == 0
    assert "nothing to edit: the model has all 1 facts" in capsys.readouterr().out


def test_several_facts_are_solved_together_and_those_at_odds_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_ibke.logger, "warning_once", (said := []).append)
    monkeypatch.setattr(composition.logger, "warning_once", said.append)
    prompts = ("The capital of Australia is", "the capital of Australia is?", "The capital of Canada is")
    file = facts_file(
        tmp_path,
        "facts:\n" + "".join(f"  - prompt: {p}\n    answers: {a}\n" for p, a in zip(prompts, TARGETS, strict=True)),
    )
    command = ["edit", "--from", str(file), "--force", "--out"]
    main([*command, str(tmp_path / "solved"), "--ridge", "0.3"])
    assert len(said) == 1 and "overrides one of the same prompt, edit 0" in said.pop()
    edit = SolvedEdit.from_pretrained(tmp_path / "solved")
    assert len(edit.parts) == 3 and edit.ridge == pytest.approx(0.3)
    main([*command, str(tmp_path / "summed"), "--composition", "sum"])
    assert any("overrides one of the same prompt, edit 0" in text for text in said)
    with pytest.raises(ValueError, match="holds no edits that were solved together"):
        SolvedEdit.from_pretrained(tmp_path / "summed")


def test_from_stands_alone_and_without_it_a_fact_is_wanted(tmp_path, refused):
    file = facts_file(tmp_path)
    assert "--prompt: what --from names says it" in refused("edit", "--from", file, "--prompt", "A")
    assert "--ridge: edits that are summed are not solved" in refused(
        "edit", "--prompt", "A", "--target", "B", "--ridge", "1", "--composition", "sum"
    )
    assert "--composition: edits of ft are carried together in one way" in refused(
        "edit", "--prompt", "A", "--target", "B", "--editor", "ft", "--composition", "solve"
    )
    assert "--chat: what --from names says it" in refused("edit", "--from", file, "--chat")
    assert "--target: give the fact to be edited, or --from FACTS.yaml" in refused("edit", "--prompt", "A")
    assert "no such file" in refused("check", tmp_path / "none.yaml").lower()
