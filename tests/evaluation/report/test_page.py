"""The page of rows: whole, safe for any text, and what a browser makes of it where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ibke_hf.evaluation import scores
from ibke_hf.evaluation.protocol import Evaluation
from ibke_hf.evaluation.report.page import COLUMNS, render_page, write_page
from ibke_hf.evaluation.results import results_of

BROWSER = shutil.which("chromium")
NASTY = '<script>alert(1)</script></SCRIPT><img src=x onerror="alert(2)"> & "quoted" \u2028 \ud800 日本 <!--'
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--dump-dom",
)


def a_row(index, role="generality", score=1.0, **other):
    match = None if role == "locality" else score == 1
    return {
        "record": f"r{index}",
        "dataset": "made",
        "domain": "art",
        "kind": "unknown",
        "role": role,
        "list": "a",
        "case": index,
        "criteria": ["Rephrase"],
        "hops": 1,
        "prompt": f"question {index}",
        "target": "yes",
        "score": score,
        "top1": score,
        "first_token": score,
        "exact_match": match,
        "before": " no",
        "after": " yes",
        "generated": " yes",
        "js_similarity": 0.87654321 if role == "locality" else None,
        "edited_hops": 0,
    } | other


ROWS = [
    a_row(0, "reliability"),
    a_row(
        1,
        prompt=NASTY,
        target="<b>bold</b>",
        domain="<i>history</i>",
        criteria=["Multi-Hop", "Rephrase"],
        hops=2,
        edited_hops=1,
    ),
    a_row(2, score=0.5, after=" perhaps", generated="", exact_match=True),
    a_row(3, "locality", generated=None),
]


def results(rows=ROWS):
    evaluation = Evaluation(tuple(rows), scores.summarise(rows), {"a collision": 4}, 0.01, 1)
    return results_of(evaluation, {"no target": 2}, {"editor": "ibke", "dataset": NASTY, "limit": None})


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]


def test_page_is_self_contained_and_holds_every_row():
    text = render_page(ROWS, results())
    assert Elements(text).links == []
    assert not re.findall(
        r"https?://|@import|url\(|fetch\(|XMLHttp|innerHTML|insertAdjacent|document\.write|eval\(", text
    )
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    assert data["columns"] == list(COLUMNS)
    prompts = [dict(zip(COLUMNS, row, strict=True))["prompt"] for row in data["rows"]]
    assert prompts == [row["prompt"].replace("\ud800", "?") for row in ROWS]
    assert dict(zip(COLUMNS, data["rows"][3], strict=True))["js_similarity"] == 0.8765
    assert data["results"]["skipped"] == {"no target": 2, "a collision": 4}


def test_no_text_of_a_row_becomes_html():
    plain, nasty = (Elements(render_page(rows, results(rows))).seen for rows in ([ROWS[0]], ROWS))
    assert plain == nasty
    assert render_page(ROWS, results()).count("</script>") == 2


def test_page_of_no_rows_and_of_any_characters_is_written(tmp_path):
    write_page([], results([]), tmp_path / "rows.html")
    write_page(ROWS, results(), tmp_path / "rows.html")
    assert (tmp_path / "rows.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# --- in a browser ---------------------------------------------------------------------------------------------------


def in_browser(folder: Path, rows, script: str = "") -> str:
    """Return the page's content after its scripts, and one more, have run, without data and scripts."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    (folder / "page.html").write_text(
        render_page(rows, results(rows)) + f"<script>{script}</script>", encoding="utf-8"
    )
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *FLAGS, profile, f"file://{folder / 'page.html'}"], check=True, capture_output=True, timeout=120
    )
    return re.sub(r"<script.*?</script>", "", done.stdout.decode(), flags=re.S)


def shown(page: str) -> list[str]:
    body = re.search(r'<tbody id="rows">(.*?)</tbody>', page, re.S).group(1)
    return re.findall(r"r\d+(?= ·)", body)


def test_browser_shows_rows_scores_and_skips(tmp_path):
    page = in_browser(tmp_path, ROWS)
    assert shown(page) == ["r0", "r1", "r2", "r3"]
    assert '<h1 id="title">ibke on &lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert "→ &lt;b&gt;bold&lt;/b&gt;" in page
    assert "1–4 of 4 rows; 3 of 3 generated answers right, 3 rows hit in the top 5" in page
    assert "Skipped: 2 × no target; 4 × a collision; the last group has 1 requests only." in page
    assert "✗ top 1: 50.0 %" in page
    assert "2 hops · 1 taught first" in page
    assert "<th>generality</th><td>100.0</td><td>75.0</td><td>75.0</td><td>2</td>" in page


def test_browser_shows_free_answers_where_there_are_any(tmp_path):
    free = {"answer": "It is yes.", "answered": True, "answer_before": None}
    rows = [
        a_row(0, **free),
        a_row(1, **{**free, "answered": False}),
        a_row(2, "locality", generated=None, answer="It is so.", answered=False, answer_before="It was so."),
    ]
    page = in_browser(tmp_path, rows, "form.verdict.value = 'unanswered'; filter();")
    assert shown(page) == ["r1", "r2"]
    assert "<th>free answer</th>" in page and "It is so." in page and "It was so." in page
    assert "✗ moved, free answer" in page and "✗ wrong, free answer" in page
    assert "<th>generality</th><td>50.0</td><td>100.0</td>" in page
    without = in_browser(tmp_path, ROWS)
    assert "<th>free answer</th>" not in without and 'value="unanswered"' not in without


def test_a_hit_whose_generated_answer_is_wrong_says_so(tmp_path):
    page = in_browser(tmp_path, [a_row(0, score=1.0, top1=0.5, generated=" perhaps", exact_match=False)])
    verdict = re.search(r'<td class="verdict">(.*?)</td>', page, re.S).group(1)
    assert re.findall(r"<div[^>]*>(.*?)</div>", verdict) == [
        "✗ wrong, generated",
        "✗ top 1: 50.0 %",
        "✓ in the top 5: all",
        "a hit by the paper's count, yet the answer is wrong",
    ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("role", "locality", ["r3"]),
        ("criterion", "Multi-Hop", ["r1"]),
        ("domain", "<i>history</i>", ["r1"]),
        ("verdict", "miss", ["r2"]),
        ("verdict", "unsaid", []),
        ("verdict", "apart", ["r2"]),
        ("text", "PERHAPS", ["r2"]),
        ("text", "日本", ["r1"]),
    ],
)
def test_browser_filters(tmp_path, field, value, expected):
    assert shown(in_browser(tmp_path, ROWS, f"form.{field}.value = {json.dumps(value)}; filter();")) == expected


def test_browser_turns_pages_of_many_rows(tmp_path):
    rows = [a_row(i) for i in range(50_000)]
    script = (
        "const began = performance.now(); form.text.value = 'question'; filter(); "
        "document.querySelector('[data-step=\"1\"]').click();"
    )
    page = in_browser(tmp_path, rows, script + "document.title = `${performance.now() - began} ms`;")
    assert shown(page) == [f"r{i}" for i in range(50, 100)]
    assert "51–100 of 50,000 rows" in page
    assert float(re.search(r"<title>([\d.]+) ms", page).group(1)) < 5000  # some 100 where nothing else runs
