"""The page in a real browser: two visitors apart, a desktop's width and a phone's, what a visitor sees and can do.

With SCREENSHOTS set to a folder, pictures of every stage are left there; with SCREENSHOT set to a file, the picture
for the Space's README is taken anew: ``SCREENSHOT=spaces/ibke-editor/screenshot.png pytest -m slow
tests/app/test_app_browser.py -k picture``.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, chromium, find_chromium, keep, overflow, served, session
from paths import ROOT

from ibke_hf.app.workbench import load_workbench

SPACE = ROOT / "spaces" / "ibke-editor"
ASK, ANSWER = "The model is asked", "and shall answer"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    find_chromium()
    folder = tmp_path_factory.mktemp("space") / "ibke-editor"
    folder.mkdir()
    for file in SPACE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


def press_edit(page, prompt=None, answer=None, button=None):
    """Press the button for the first edit, or for another beside it; wait until the page can be used again."""
    ready(page)
    before = page.locator("#active label").count()
    if prompt is not None:
        page.get_by_label(ASK).fill(prompt)
    if answer is not None:
        page.get_by_label(ANSWER).fill(answer)
    button = button or ("#add" if before else "#edit")
    page.click(button)
    after = 1 if button == "#replace" else before + 1
    page.wait_for_function(f"document.querySelectorAll('#active label').length === {after}")
    page.wait_for_function("document.querySelectorAll('#results .ibke-card').length > 0")
    ready(page)
    page.wait_for_timeout(300)


def ready(page):
    """Wait until nothing runs that changes the edits."""
    page.wait_for_function("[...document.querySelectorAll('#edit, #replace')].some(one => !one.disabled)")


def top(page, selector):
    """Where an element begins on the page, in pixels from its top."""
    return page.locator(selector).first.bounding_box()["y"] + page.evaluate("window.scrollY")


def active(page):
    return [text.strip() for text in page.locator("#active label").all_inner_texts()]


def ask(page, prompt):
    page.locator("#question").locator("input, textarea").fill(prompt)
    page.click("#ask")
    page.wait_for_function(f"document.querySelector('#asked .ibke-prompt')?.innerText === {prompt!r}")
    return page.locator("#asked .ibke-said").inner_text()


def test_two_visitors_do_not_see_each_other(url, browser):
    one, other = session(browser, url, DESKTOP), session(browser, url, PHONE)
    fact = load_workbench().knowledge.examples[0].form.fact()
    request = fact.request
    press_edit(one)  # the fact that is filled in
    assert active(one) == [f"1. {request.prompt} → {request.target}"]
    assert one.locator("#results .ibke-card").count() == len(fact.questions)
    assert [text.split("?")[0] for text in one.locator("#verdict li").all_inner_texts()] == [
        "Did it take",
        "Does it carry over",
        "Did the rest stay",
    ]
    assert one.locator("#results .ibke-layer").count() > 0
    assert active(other) == []
    assert "untouched" in other.locator(".ibke-none").inner_text()
    cards = one.locator(".ibke-groups").inner_text()  # made while nobody else had an edit
    press_edit(other, "The capital of Turkey is", "Sony")
    third = session(browser, url, DESKTOP)
    for prompt in ("The capital of Turkey is", request.prompt):
        assert ask(third, prompt).endswith("as before")
    press_edit(third)
    assert active(one) == active(third) == [f"1. {request.prompt} → {request.target}"]
    assert active(other) == ["1. The capital of Turkey is → Sony"]
    assert third.locator(".ibke-groups").inner_text() == cards
    assert ask(one, "The capital of Turkey is") == ask(third, "The capital of Turkey is")
    for page, name in ((one, "editor-desktop"), (other, "editor-phone")):
        keep(page, name)
        assert overflow(page) == 0
        assert page.errors == []
        assert page.outside == []


def test_a_visitor_can_undo_compare_and_download(url, browser, tmp_path):
    page = session(browser, url, PHONE, accept_downloads=True)
    press_edit(page)
    assert "One edit is active" in page.locator("#warning").inner_text()
    page.locator("button", has_text="The capital of Turkey is").click()  # another example
    page.wait_for_function("document.querySelector('textarea, input[type=text]') !== null")
    page.wait_for_timeout(500)
    press_edit(page)
    first, _ = (text[3:] for text in active(page))
    page.click("#compare")
    page.wait_for_selector("#comparison .ibke-sum")
    assert page.locator("#comparison thead th").all_inner_texts()[-2:] == ["IBKE", "fine-tuning"]
    page.click("#rank label:has-text('1')")
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('cut to rank 1')")
    ready(page)
    page.click("#save")
    link = page.wait_for_selector("a[download]")
    ready(page)
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "edit.zip")
    with zipfile.ZipFile(tmp_path / "edit.zip") as archive:
        assert "ibke-edit/adapter_model.safetensors" in archive.namelist()
    keep(page, "editor-phone-all")
    assert overflow(page) == 0
    page.click("#undo")
    page.wait_for_function("document.querySelectorAll('#active label').length === 1")
    assert active(page) == [f"1. {first}"]
    ready(page)
    page.click("#clear")
    page.wait_for_selector(".ibke-none")
    assert page.locator("#results .ibke-card").count() == 0
    assert page.errors == []


def test_another_fact_can_take_the_place_of_the_first(url, browser):
    page = session(browser, url, DESKTOP)
    assert page.locator("#replace").count() == 0 or not page.locator("#replace").is_visible()
    press_edit(page)
    press_edit(page, "The capital of Turkey is", "Rome", button="#replace")
    assert active(page) == ["1. The capital of Turkey is → Rome"]
    tags = page.locator("#results .ibke-tag").all_inner_texts()
    assert tags.count("in other words, asked by itself") == 3  # nobody typed any
    assert ask(page, load_workbench().knowledge.examples[0].form.prompt).endswith("as before")


def test_a_reload_keeps_the_edits(url, browser):
    page = session(browser, url, PHONE)
    press_edit(page)
    press_edit(page, "The capital of Turkey is", "Rome")
    kept, cards = active(page), page.locator(".ibke-groups").inner_text()
    page.reload()
    page.wait_for_function("document.querySelectorAll('#active label').length === 2")
    ready(page)
    assert active(page) == kept
    assert page.locator(".ibke-groups").inner_text() == cards
    stranger = session(browser, url, PHONE)
    ready(stranger)
    assert active(stranger) == []
    page.click("#clear")
    page.wait_for_selector("#edit", state="visible")
    ready(page)
    page.reload()
    ready(page)
    page.wait_for_timeout(500)
    assert active(page) == []
    assert page.errors == []


def test_nothing_can_be_pressed_while_an_edit_runs(url, browser):
    page = session(browser, url, DESKTOP)
    ready(page)
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => window.seen.push(document.querySelector("#edit")?.disabled)).observe(
        document.querySelector("#edit"), {attributes: true});
    }""")
    page.click("#edit")
    page.keyboard.press("Enter")
    page.wait_for_function("window.seen.includes(true)")
    page.wait_for_function("document.querySelectorAll('#active label').length > 0")
    ready(page)
    assert len(active(page)) == 1


def test_a_phone_shows_undo_and_ask_before_the_cards(url, browser):
    page = session(browser, url, PHONE)
    press_edit(page)
    places = [top(page, one) for one in ("#verdict", "#undo", "#ask", "#results .ibke-card")]
    assert places == sorted(places)
    wide = session(browser, url, DESKTOP)
    press_edit(wide)
    assert top(wide, "#undo") < top(wide, "#verdict")  # beside, where there is room


def test_bad_input_is_said_in_the_page(url, browser):
    page = session(browser, url, PHONE)
    press_edit(page)
    kept = active(page)
    page.get_by_label(ANSWER).fill("  ")
    page.click("#add")
    page.wait_for_selector("text=the target is empty")
    keep(page, "editor-phone-error")
    assert active(page) == kept
    assert page.locator("#results .ibke-card").first.is_visible()
    assert "Traceback" not in page.content()
    ready(page)
    assert overflow(page) == 0


def test_any_text_stays_text_and_fits_a_phone(url, browser):
    page = session(browser, url, PHONE)
    text = "<img src=x onerror=document.title='hacked'> 富士山🏔️ ${1+1} {{value}} " + "x" * 120
    press_edit(page, text, "東京 🗼 " + "W" * 60)
    assert text in active(page)[0]
    assert page.locator("#results img").count() == 0
    assert page.title() != "hacked"
    assert overflow(page) == 0
    keep(page, "editor-phone-any-text")


def test_picture_for_the_readme(url, browser):
    page = session(browser, url, (1280, 1500))
    press_edit(page)
    page.mouse.move(5, 5)
    picture = page.screenshot()
    assert len(picture) < 300_000
    if target := os.environ.get("SCREENSHOT"):
        Path(target).write_bytes(picture)
