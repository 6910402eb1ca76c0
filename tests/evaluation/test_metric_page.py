"""The metric's page without a browser: pasted text -> cases -> scores -> HTML; every bad line is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from judged_columns import GOOD

from ibke_hf.evaluation import load_metric, metric_page
from ibke_hf.evaluation.metric_page import (
    EXAMPLE,
    MOST,
    PasteError,
    read_cases,
    render_problems,
    render_scores,
    render_waiting,
    score,
)

pytest.importorskip("evaluate", reason="the extra eval is not installed")
load = partial(load_metric, keep_in_memory=True)
FIVE = ["a", "b", "c", "d", "e"]
FINE = '{"role": "reliability", "reference": "a", "prediction": "a"}'


def problems(text: str) -> list[str]:
    with pytest.raises(PasteError) as caught:
        score(text, load)
    return caught.value.problems


def lines(columns: dict) -> str:
    return "\n".join(
        json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
    )


# --- the metric's own scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        lines(GOOD),
        json.dumps(GOOD),
        json.dumps(GOOD, indent=2),
        f"\n{lines(GOOD)}\n\n",
        json.dumps([json.loads(line) for line in lines(GOOD).splitlines()]),
    ],
)
def test_gives_the_scores_of_the_metric(text):
    assert score(text, load) == (load().compute(**GOOD), {"generality": 1, "reliability": 1})


def test_columns_without_the_optional_ones_and_with_null():
    columns = {
        "predictions": [[[1]], [[1, 2, 3, 4, 5]]],
        "references": [[1], [5]],
        "role": ["reliability", "locality"],
        "criterion": None,
    }
    assert score(json.dumps(columns), load)[0] == load().compute(**columns)


def test_texts_score_as_ids_do():
    texts = {
        **GOOD,
        "predictions": [[[f"<{i}>" for i in best] for best in case] for case in GOOD["predictions"]],
        "references": [[f"<{i}>" for i in case] for case in GOOD["references"]],
    }
    assert score(lines(texts), load) == score(lines(GOOD), load)


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        ("e", FIVE),
        (["e"], [FIVE]),
        ("e", [FIVE]),
        (7, [1, 2, 3, 4, 7]),
        (["e", "b"], [FIVE, FIVE]),
        (["日本", " "], [["日本", *FIVE], [" ", *FIVE]]),
    ],
)
def test_a_target_of_one_token_needs_no_lists(reference, prediction):
    line = json.dumps({"role": "generality", "reference": reference, "prediction": prediction})
    assert score(line, load)[0]["generality"] == 100


def test_one_guess_for_each_of_several_tokens():
    assert (
        score('{"role": "reliability", "reference": ["a", "b"], "prediction": ["a", "c"]}', load)[0]["reliability"]
        == 50
    )


def test_space_before_a_token_and_its_case_count():
    assert score('{"role": "reliability", "reference": " a", "prediction": "a"}', load)[0]["reliability"] == 0


def test_one_text_leaves_nothing_for_the_next():
    assert score(FINE, load)[1] == {"reliability": 1}
    problems('{"role": "locality", "reference": "a", "prediction": "a"}')
    assert score(FINE, load) == score(FINE, load)


def test_the_example_is_scored():
    result, cases = score(EXAMPLE, load)
    assert cases == {"reliability": 1, "generality": 3, "locality": 2}
    assert (result["reliability"], result["locality"], result["locality_top1"]) == (100, 100, 50)
    assert 0 < result["generality_top1"] < result["generality"] < 100
    assert set(result["by_criterion"]["generality"]) == {"Rephrase", "Multi-Hop"}


def test_criteria_as_text_as_list_and_none():
    pasted = [
        {"role": "reliability", "reference": 1, "prediction": 1, "criterion": criterion}
        for criterion in (None, "", "A, B", ["A", "B"], [])
    ]
    assert [case["criterion"] for _, case in read_cases(json.dumps(pasted))] == ["", "", "A, B", "A, B", ""]


# --- bad text -------------------------------------------------------------------------------------------------------


def line(**fields) -> str:
    return json.dumps({"role": "reliability", "reference": "a", "prediction": "a"} | fields)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("hello", "line 2: not JSON (Expecting value, character 1); write one case a line, such as {"),
        ('{"role": "reliability",', "line 2: not JSON ("),
        ("role,reference,prediction", "line 2: not JSON ("),
        ("[1]", "line 2: a case is a JSON object"),
        ("3", "line 2: a case is a JSON object"),
        ("null", "line 2: a case is a JSON object"),
        (line(role=None), 'line 2: "role" is missing'),
        (line(reference=None), 'line 2: "reference" is missing'),
        ('{"role": "locality", "reference": 1}', 'line 2: "prediction" is missing'),
        (line(role="rephrase"), "line 2: role must be one of reliability, generality, locality, found 'rephrase'"),
        (line(role=["reliability"]), "line 2: role must be one of"),
        (line(role={}), "line 2: role must be one of"),
        (line(target="a"), 'line 2: there is no field "target"; the fields are role,'),
        (line(reference=1.5), "line 2: a token is its text or its id"),
        (line(reference=True), "line 2: a token is its text or its id"),
        (line(prediction=[None]), "line 2: a token is its text"),
        (line(prediction=[[["a"]]]), "line 2: a token is its text"),
        ('{"role": "reliability", "reference": NaN, "prediction": 1}', "line 2: a token is its text"),
        (line(reference={"a": 1}), "line 2: a token is its text"),
        (line(prediction=[1]), "line 2: some tokens are texts and some ids"),
        (line(reference=[]), "line 2: no reference id"),
        (line(prediction=[]), "target token 0: 0 predicted ids make no top 1"),
        (line(reference=["a", "b"]), "line 2: predictions for 1 target tokens but 2 reference ids"),
        (
            line(role="generality"),
            "line 2, target token 0: 1 predicted ids make no top 5; give at least 5, or a smaller top_k",
        ),
        (line(top_k=0), "line 2: top_k must be at least 1"),
        (line(top_k="1"), "line 2: top_k is a whole number"),
        (line(top_k=True), "line 2: top_k is a whole number"),
        (line(top_k=1.0), "line 2: top_k is a whole number"),
        (line(criterion=5), "line 2: criterion is a text"),
        (line(criterion=["A", 1]), "line 2: criterion is a text"),
        ('{"role": "reliability", "reference": ' + "9" * 5000 + ', "prediction": 1}', "line 2: "),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_bad_line_is_named(bad, message):
    (problem,) = problems(f"{FINE}\n{bad}\n{FINE}")
    assert message in problem
    assert problem.startswith("line 2")
    assert len(problem) < 300


def test_every_line_that_cannot_be_read_is_named():
    assert [problem.partition(":")[0] for problem in problems(f"a\n{FINE}\n\nb\n{FINE}\n{{}}")] == [
        "line 1",
        "line 4",
        "line 6",
    ]


def test_cases_of_a_list_and_of_columns_are_named():
    assert problems(f"[{FINE},\n 3, {FINE}, {line(role='x')}]") == [
        (
            'case 2: a case is a JSON object, such as {"role": "reliability", "reference": "Sony", "prediction": '
            '"Sony"}; found 3'
        )
    ]
    assert problems(json.dumps({**GOOD, "top_k": [5, 9]}))[0].startswith(
        "case 2, target token 0: 1 predicted ids make no top 9"
    )
    assert problems(json.dumps({**GOOD, "references": [[3, 8]]})) == [
        "references: 2 roles, but 1 values; every column is a list with one value a case"
    ]
    assert "references: 2 roles, but 'a'" in problems(json.dumps({**GOOD, "references": "a"}))[0]
    assert problems(json.dumps({**GOOD, "extra": [1, 2]}))[0].startswith('case 1: there is no field "extra"')


@pytest.mark.parametrize("text", ["", " \n\t\n", "[]", '{"role": [], "predictions": [], "references": []}'])
def test_no_case_at_all(text):
    assert problems(text)[0].startswith("There is no case yet. Paste one a line")


# --- the page -------------------------------------------------------------------------------------------------------


def test_scores_become_bars_and_absent_ones_dashes():
    page = render_scores(*score(f"{FINE}\n{line(prediction='b')}", load))
    assert "2 cases scored: 2 reliability. In percent." in page
    assert re.findall(r'class="value">([^<]+)<', page) == [
        "50.0",
        *"–––––",
        "50.0",
        "–",
    ]  # reliability, and the average
    assert 'style="width:50.0%"' in page
    assert "By criterion" not in page
    assert "By criterion" in render_scores(*score(EXAMPLE, load))
    assert set(re.findall(r'class="value">([^<]+)<', render_waiting())) == {"–"}


def test_no_pasted_text_becomes_html():
    nasty = "<img src=x onerror=alert(1)>"
    page = render_scores(*score(line(role="generality", prediction=FIVE, criterion=nasty), load))
    assert "<img" not in page
    assert "&lt;img" in page
    for bad in (nasty, line(**{nasty: 1}), line(role=nasty), line(criterion={nasty: 1})):
        assert "<img" not in render_problems(problems(bad))


def test_not_every_one_of_many_problems_is_listed():
    page = render_problems(problems("x\n" * 50))
    assert page.count("<li>") == MOST
    assert f"And {50 - MOST} more lines." in page


def test_the_page_needs_gradio_and_nothing_of_ours(tmp_path):
    hidden = (
        "import sys; sys.modules['gradio'] = sys.modules['ibke_hf'] = None; sys.path.insert(0, "
        "sys.argv[1]); import metric_page as m\n"
    )
    (tmp_path / "metric_page.py").write_text(Path(metric_page.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    code = hidden + "try: m.build_page(None)\nexcept ImportError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == 'the page of the metric needs the extra "demo": pip install "ibke-hf[demo]"\n'
