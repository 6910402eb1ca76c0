"""The metric's Space in a real browser, assembled and without this package: desktop, phone, sessions side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import DESKTOP, PHONE, chromium, find_chromium, keep, overflow, served, session
from paths import ROOT

from ibke_hf.evaluation.metric_page import EXAMPLE
from ibke_hf.hub.spaces import assemble

pytestmark = pytest.mark.slow
SPACE = ROOT / "spaces" / "edit_quality"
SCORES = {  # of the example: what is right first, then what the paper counts, then the criteria in the top 5
    "reliability, top 1": "100.0",
    "generality, top 1": "33.3",
    "locality, top 1": "50.0",
    "first token, top 1": "33.3",
    "generality, in the top 5": "83.3",
    "locality, in the top 5": "100.0",
    "average, in the top 5": "94.4",
    "F1, in the top 5": "90.9",
    "Multi-Hop": "50.0",
    "Rephrase": "100.0",
}
LONG = "Averylongcriterion" * 12


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    find_chromium()
    folder = assemble(SPACE, tmp_path_factory.mktemp("space") / "app")
    home = str(folder.with_name("home"))
    places = {"HF_HOME": home, "HF_MODULES_CACHE": home, "SPACE_ID": "someone/edit_quality"}
    with served(folder, before="sys.modules['ibke_hf'] = None", **places) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def paste(page: Any, text: str) -> None:
    page.get_by_label("Predictions").fill(text)
    page.get_by_role("button", name="Score", exact=True).click()


def shown(page: Any, text: str) -> dict[str, str]:
    """Wait for a text among the scores; return the value beside each name."""
    page.locator("#scores").get_by_text(text).first.wait_for()
    rows = page.locator("#scores tr").all()
    return {row.locator("th").inner_text().split("\n")[0]: row.locator(".value").inner_text() for row in rows}


def case(reference: str, prediction: str, criterion: str = "") -> str:
    fields = {"role": "reliability", "reference": reference, "prediction": prediction, "criterion": criterion}
    return json.dumps(fields)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_example_is_filled_in_and_scored(url: str, browser: Any, size: tuple[int, int]) -> None:
    page = session(browser, url, size)
    name = f"edit_quality_{size[0]}"
    assert set(shown(page, "In percent").values()) == {"–"}
    keep(page, f"{name}_first")
    assert overflow(page) == 0
    page.get_by_role("button", name="Example").click()
    page.wait_for_function("text => document.querySelector('#paste textarea').value === text", arg=EXAMPLE)
    page.get_by_role("button", name="Score", exact=True).click()
    scores = shown(page, "6 cases scored: 1 reliability, 3 generality, 2 locality.")
    assert {title: scores[title] for title in SCORES} == SCORES
    bars = [bar.bounding_box()["width"] for bar in page.locator("#scores .main .bar span").all()]
    assert bars[0] > bars[2] > bars[1] == bars[3] > 0
    keep(page, f"{name}_scored")
    page.get_by_text("As JSON").click()
    page.get_by_text("All fields, and the metric in Python").click()
    page.get_by_text('evaluate.load("someone/edit_quality")').wait_for()
    keep(page, f"{name}_open")
    assert overflow(page) == 0
    assert (page.outside, page.errors) == ([], [])
    page.context.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_bad_lines_are_named_and_text_stays_text(url: str, browser: Any, size: tuple[int, int]) -> None:
    page = session(browser, url, size)
    paste(page, f"{case('a', 'a')}\n<img src=x onerror=alert(1)>\n{case('a', 'a', LONG).replace('role', LONG)}")
    shown(page, "Not scored")
    problems = page.locator("#scores li").all_inner_texts()
    assert [problem.partition(":")[0] for problem in problems] == ["line 2", "line 3"]
    assert page.locator("#scores img").count() == 0
    keep(page, f"edit_quality_{size[0]}_bad")
    assert overflow(page) == 0
    paste(page, case("a", "a", "<b>bold</b>"))
    assert shown(page, "1 case scored")["reliability, top 1"] == "100.0"
    paste(
        page,
        case("a", "a", LONG)
        .replace("reliability", "generality")
        .replace('"prediction": "a"', '"top_k": 1, "prediction": "b"'),
    )
    assert shown(page, "1 case scored: 1 generality")[LONG] == "0.0"
    assert overflow(page) == 0
    assert (page.outside, page.errors) == ([], [])
    page.context.close()


def test_one_session_does_not_see_what_another_pasted(url: str, browser: Any) -> None:
    one, two = session(browser, url), session(browser, url, PHONE)
    paste(one, f"{case('secret', 'secret')}\n{case('secret', 'other')}")
    paste(two, case("mine", "wrong"))
    assert shown(two, "1 case scored")["reliability, top 1"] == "0.0"
    assert shown(one, "2 cases scored")["reliability, top 1"] == "50.0"
    assert "secret" not in two.content() + two.get_by_label("Predictions").input_value()
    two.reload()
    two.wait_for_selector("button")
    assert set(shown(two, "In percent").values()) == {"–"}
    assert two.get_by_label("Predictions").input_value() == ""
    assert shown(one, "2 cases scored")["reliability, top 1"] == "50.0"
    for page in (one, two):
        page.context.close()
