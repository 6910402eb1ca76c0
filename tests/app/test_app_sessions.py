"""Visitors at the same time, over HTTP: each sees its own edits, all of them, in order, and nobody else's.

All of them edit the same prompts, each to targets of its own, so that an edit of another would change an answer. What
the server says is held against the same session done alone on a workbench of its own.
"""

from __future__ import annotations

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import sleep

import pytest
import torch

pytest.importorskip("gradio", reason="the extra demo is not installed")

from gradio_client import Client
from gradio_client.exceptions import AppError
from small_workbench import FORM, PROMPTS, TARGETS, small_workbench

from ibke_hf import LowRankEdit
from ibke_hf.app import page as app
from ibke_hf.app.forms import Form
from ibke_hf.app.knowledge import Example
from ibke_hf.app.session import Session

NONE = ("", "", "")
EDITS = 8 if os.environ.get("CI") else 50  # of each of eight visitors: all fifty take four minutes on idle cores


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_visitor():
    """Visitors fill the machine by themselves; threads within an operation would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def benches(tiny_model, tiny_tokenizer):
    """The server's and that of the test, equal and apart."""
    return small_workbench(tiny_model, tiny_tokenizer), small_workbench(tiny_model, tiny_tokenizer)


@contextmanager
def served(bench):
    blocks = app.build_app(bench, [Example(FORM, "Paris", knows=True)])
    try:
        yield blocks.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())[1]
    finally:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def url(benches):
    with served(benches[0]) as address:
        yield address


def visit(url):
    return Client(url, verbose=False, httpx_kwargs={"timeout": 300})


def a_fact(visitor, number):
    """Facts of a visitor: no two visitors ever have the same at the same place, and no visitor a prompt twice."""
    prompt = f"{PROMPTS[number % len(PROMPTS)]}{' not' * (number // len(PROMPTS))}"
    return prompt, f"{TARGETS[(visitor + number) % len(TARGETS)]} {visitor}"


def active(answer):
    """The list of active edits, among all that the page shows."""
    return next(one for one in answer if isinstance(one, dict) and "choices" in one)


def labels(answer):
    return [label.removesuffix(" (lost)") for label, _ in active(answer)["choices"]]


def rows(answer):
    return next(one for one in answer if isinstance(one, list))


def same_rows(one, other):
    return len(one) == len(other) and all(
        all(a[field] == b[field] for field in ("prompt", "right"))
        and all(same_reading(a[side], b[side]) for side in ("before", "after"))
        for a, b in zip(one, other, strict=True)
    )


def same_reading(one, other):
    return one["answer"] == other["answer"] and [p for _, p in one["top"]] == pytest.approx(
        [p for _, p in other["top"]], abs=1e-5
    )


def a_visit(url, bench, visitor, edits):
    """Edit after edit, each answer held against a session that no other can have touched."""
    client, alone, mine = visit(url), Session(), []
    for number in range(edits):
        prompt, target = a_fact(visitor, number)
        answer = client.predict(prompt, target, *NONE, api_name="/edit")
        alone = bench.add(alone, Form(prompt, target).fact())
        mine.append(f"{number + 1}. {prompt} → {target}")
        assert labels(answer) == mine, f"visitor {visitor} sees {labels(answer)}"
        assert active(answer)["value"] == number
        assert same_rows(rows(answer), bench.look(alone, number)), (
            f"visitor {visitor}, edit {number}: not the answers of its own edits"
        )
    return client, alone


@pytest.mark.parametrize(("visitors", "edits"), [(3, 4), pytest.param(8, EDITS, marks=pytest.mark.slow)])
def test_no_edit_is_seen_by_another_visitor(url, benches, visitors, edits):
    plain = benches[1].ask(Session(), PROMPTS[0])
    onlooker = visit(url)
    with ThreadPoolExecutor(visitors) as pool:
        running = [pool.submit(a_visit, url, benches[1], visitor, edits) for visitor in range(visitors)]
        while not all(one.done() for one in running):
            assert same_rows(onlooker.predict(PROMPTS[0], api_name="/ask")[1], plain), (
                "a visitor without edits sees one"
            )
            sleep(1)
        ended = [one.result() for one in running]
    for client, alone in ended:
        assert same_rows(client.predict(PROMPTS[1], api_name="/ask")[1], benches[1].ask(alone, PROMPTS[1]))
    answers = {str(client.predict(PROMPTS[1], api_name="/ask")[1]) for client, _ in ended}
    assert len(answers) == visitors  # or the comparison above would show nothing


def test_undo_and_download_are_a_visitors_own(url, benches, tmp_path):
    clients, alone = [], []
    for visitor in range(2):
        client, session = a_visit(url, benches[1], visitor, 3)
        clients.append(client)
        alone.append(session)
    answer = clients[0].predict(0, api_name="/undo")
    alone[0] = benches[1].remove(alone[0], 0)
    assert labels(answer) == ["1. {} → {}".format(*a_fact(0, 1)), "2. {} → {}".format(*a_fact(0, 2))]
    answer = clients[1].predict(*a_fact(1, 7), *NONE, api_name="/replace")
    alone[1] = benches[1].add(alone[1], Form(*a_fact(1, 7)).fact(), instead=True)
    assert labels(answer) == ["1. {} → {}".format(*a_fact(1, 7))]
    assert same_rows(rows(answer), benches[1].look(alone[1], 0))
    for visitor, client in enumerate(clients):
        file = client.predict(api_name="/save")["value"]
        with zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path / str(visitor))
        saved = LowRankEdit.from_pretrained(tmp_path / str(visitor) / "ibke-edit")
        assert saved.info.requests == tuple(fact.request for fact in alone[visitor].facts)
        made = alone[visitor].edit  # several are solved together, and saved as one adapter
        for name in saved.layers:
            torch.testing.assert_close(saved.weight_updates(name), made.weight_updates(name), rtol=1e-3, atol=1e-5)
    assert labels(clients[0].predict(api_name="/undo_all")) == []
    assert same_rows(clients[0].predict(PROMPTS[0], api_name="/ask")[1], benches[1].ask(Session(), PROMPTS[0]))
    assert same_rows(clients[1].predict(PROMPTS[0], api_name="/ask")[1], benches[1].ask(alone[1], PROMPTS[0]))


def test_bad_input_is_said_over_http_and_changes_nothing(url):
    client = visit(url)
    kept = client.predict("Iron is a", "metal", *NONE, api_name="/edit")
    bad = {
        ("Iron is a", " "): "the target is empty",
        ("", "x"): "the prompt is empty",
        ("Iron is a", "long " * 200): "the fact",
    }
    for form, message in bad.items():
        with pytest.raises(AppError, match=message) as raised:
            client.predict(*form, *NONE, api_name="/edit")
        assert "Traceback" not in str(raised.value)
    again = client.predict(0, api_name="/show")
    assert labels(again) == labels(kept) == ["1. Iron is a → metal"]
    assert same_rows(rows(again), rows(kept))


def test_fine_tuning_is_compared_over_http(url):
    client = visit(url)
    client.predict(FORM.prompt, FORM.target, FORM.rephrasings, FORM.consequences, FORM.neighbours, api_name="/edit")
    table = client.predict(0, api_name="/compare")
    assert table.count("<tr") == 1 + 5 + 1
    assert "fine-tuning" in table
