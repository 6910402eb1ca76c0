"""Figures: every text is text, every row is there, numbers are the rows' own."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ibke_hf.app import drawings as figures

NASTY = '<script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted" \' ${1+1} {{value}} \u2028 日本'
TOP = [(" Rome", 0.75), (NASTY, 0.2), ("\n", 0.049), ("x", 0.001), ("y", 0.0)]


def a_row(role="request", right=True, **other):
    return {
        "role": role,
        "prompt": NASTY,
        "answers": [NASTY, "Rome"],
        "right": right,
        "before": {"answer": "Paris", "top": TOP},
        "after": {"answer": NASTY, "top": TOP},
    } | other


ROWS = [
    a_row(),
    a_row("rephrase", False),
    a_row("consequence", None, answers=[]),
    a_row("neighbour", False),
    a_row("neighbour"),
    a_row("question", None, answers=[]),
]
FACTORS = {
    "tokens": ["The", NASTY, " is"],
    "judged": [False, False, True],
    "layers": {"model.layers.3.mlp.down_proj": [0.25, 1.0, 0.0], NASTY: [0.1, 0.2, 0.3]},
}


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += [name for name, _ in attributes]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.comparison_figure(ROWS),
        lambda: figures.comparison_figure(ROWS) + figures.verdict_figure(ROWS),
        lambda: figures.answer_card(ROWS[-1]),
        lambda: figures.scale_factor_figure(FACTORS),
        lambda: figures.editors_figure(
            {name: {"rows": ROWS, "seconds": 0.02, "nbytes": 2000} for name in (NASTY, "b")}
        ),
    ],
)
def test_texts_stay_texts(figure):
    elements = Elements(figure())
    assert not {"script", "img"} & set(elements.seen)
    assert set(elements.attributes) <= {"class", "style", "title", "role", "aria-label", "scope"}
    assert any("alert(1)" in text for text in elements.texts)


def test_groups_count_what_is_right():
    text = figures.comparison_figure(ROWS)
    marks = [
        ("reliability: 1 of 1", "✓", "yes"),
        ("generality: 0 of 1", "✗", "no"),
        ("locality: 1 of 2", "✗", "1 of 2"),
    ]
    tally = r'title="(\w+: \d of \d)">([✓✗])  ?(\d of \d|yes|no)<'
    assert re.findall(tally, text) == re.findall(tally, figures.verdict_figure(ROWS)) == marks
    titles = ["Did it take?", "Does it carry over?", "Did the rest stay?"]
    assert re.findall(r"<h3[^>]*>([^<]*\?)", text) == titles
    assert text.count("<article") == 5  # questions without a role belong to no group
    assert text.count('title="wrong">✗') == 2
    assert re.search(r'title="generality"> not judged', figures.comparison_figure([ROWS[2]]))


def test_questions_of_the_page_itself_are_told_from_typed_ones():
    assert "asked by itself" in figures.answer_card(a_row("rephrase", automatic=True))
    assert "asked by itself" not in figures.answer_card(a_row("rephrase"))


def test_wrong_answers_say_what_is_right():
    assert "should be</span> Rome</p>" in figures.answer_card(a_row(right=False, answers=["Rome"]))
    assert "should be</span> Paris</p>" in figures.answer_card(a_row("neighbour", False))
    assert "should be" not in figures.answer_card(a_row("consequence", None, answers=[]))
    assert "as before" in figures.answer_card(a_row(after={"answer": "Paris", "top": TOP}))
    assert "(nothing)" in figures.answer_card(a_row(after={"answer": "", "top": []}))


def test_bars_have_the_lengths_of_their_numbers():
    text = figures.bar_chart(TOP, marked=["Rome is"])
    assert re.findall(r"width:([\d.]+)%", text) == ["75.0", "20.0", "4.9", "0.1", "0.0"]
    assert re.findall(r">([^>]+) %<", text) == ["75", "20", "5", "&lt;1", "0"]
    assert text.count("ibke-hit") == 1


def test_heat_map_has_a_cell_for_each_token_and_layer():
    text = figures.scale_factor_figure(FACTORS)
    assert re.findall(r"--v:([\d.]+)", text) == ["0.250", "1.000", "0.000", "0.100", "0.200", "0.300"]
    assert text.count("ibke-judged") == 2
    assert ">layer 3<" in text
    assert "no scale factor" in figures.scale_factor_figure(None)


def test_editors_stand_side_by_side():
    rows = [a_row(), a_row("neighbour", False)]
    one, two = (
        {"rows": rows, "seconds": 0.0214, "nbytes": 79_300},
        {"rows": rows[:1] * 2, "seconds": 3.21, "nbytes": 1},
    )
    text = figures.editors_figure({"one": one, "two": two})
    assert text.count("<tr") == 1 + 2 + 1
    assert "21 ms, 79 kB" in text
    assert "3.2 s, 0 kB" in text
    assert 'title="locality: 0 of 1">✗ stayed 0 of 1<' in text
