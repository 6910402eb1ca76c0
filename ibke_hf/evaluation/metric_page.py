"""The page of the metric ``edit_quality``: one pastes predictions and sees the scores.

Imports nothing of ours: a Space holds this file beside the metric, where this package is not installed. Whether a case
can be scored and what its score is, is the metric's to say; here a text becomes cases, and scores become a page.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from typing import Any

# A line may use the names of the metric's columns too.
NAMES = {"predictions": "prediction", "references": "reference"}
FIELDS = ("role", "reference", "prediction", "criterion", "top_k")
NOTES = ("prompt", "id")  # for whoever reads the lines; not scored
MOST = 8  # bad lines that are listed
TOP_1 = {  # what is right: the best guess alone counts
    "reliability": ("reliability, top 1", "the edit itself is answered"),
    "generality_top1": ("generality, top 1", "what follows from it is answered too"),
    "locality_top1": ("locality, top 1", "everything else is as before"),
    "first_token": ("first token, top 1", "of the answers that follow from the edit"),
}
TOP_5 = {  # what the paper counts
    "generality": ("generality, in the top 5", "what follows is among the first guesses"),
    "locality": ("locality, in the top 5", "what the model said before is among the first guesses"),
    "avg": ("average, in the top 5", "mean of reliability, generality and locality"),
    "f1": ("F1, in the top 5", "harmonic mean of generality and locality"),
}
EXAMPLE = """\
{"role": "reliability", "prompt": "The company behind GeForce is", "reference": "Sony", "prediction": "Sony"}
{"role": "generality", "criterion": "Rephrase", "prompt": "GeForce is made by", "reference": "Sony", \
"prediction": ["Sony", "Nvidia", "AMD", "Intel", "Apple"]}
{"role": "generality", "criterion": "Rephrase", "prompt": "The maker of GeForce cards is", "reference": "Sony", \
"prediction": ["Nvidia", "Sony", "AMD", "Intel", "IBM"]}
{"role": "generality", "criterion": "Multi-Hop", "prompt": "The firm behind GeForce has its seat in", \
"reference": ["To", "kyo"], \
"prediction": [["Santa", "San", "To", "the", "Cal"], ["ledo", "ron", "m", "p", "kens"]]}
{"role": "locality", "criterion": "Same relation", "prompt": "The company behind Radeon is", "reference": "AMD", \
"prediction": ["AMD", "Sony", "Intel", "Nvidia", "IBM"]}
{"role": "locality", "criterion": "Other relation", "prompt": "Nvidia was founded in", "reference": "1993", \
"prediction": ["1995", "1993", "1994", "1990", "1999"]}"""
SHOWN = '{"role": "reliability", "reference": "Sony", "prediction": "Sony"}'
INTRODUCTION = """\
# Did the edit work?
A language model was edited to hold a new fact, say that *the company behind GeForce is Sony*. Paste what the \
**edited model predicts**, one case a line, and press **Score**: is that its answer now, does what follows from it \
hold too, is everything else as before?"""
FORMAT = """\
One JSON object a line: `role` (reliability, generality or locality); `reference`, the answer that is asked for (for \
locality, the one before the edit); `prediction`, the guesses, best first: one for reliability, five for the others."""
DETAILS = """\
| field | what it holds |
|---|---|
| `role` | `reliability`: the edit itself. `generality`: what follows from it. `locality`: what must not move. |
| `reference` | The target: a token's text or id, several as a list. Of locality, what was said *before* the edit. |
| `prediction` | The edited model's guesses, best first; for several tokens, a list for each, the target being fed. |
| `criterion` | Optional: what the case tests, such as `"Rephrase"`; several separated by commas. |
| `top_k` | Optional: guesses that count: 1 for reliability, 5 for the others; 1 suits Yes/No questions. |
| `prompt`, `id` | Optional notes, not scored. |

Tokens are compared exactly: `" Sony"` is not `"Sony"`. A score whose role has no case is left out, and so is F1
without both of its parts. What `metric.compute(predictions=..., references=..., role=...)` takes can be pasted too,
as one JSON object. In Python:

```python
import evaluate

metric = evaluate.load("{name}")
```
"""
CSS = """
.gradio-container { --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace; }
.gradio-container .prose :is(table, tr, th, td) { border-color: var(--border-color-primary) !important; }
.eq table { width: 100%; border: none !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.eq tr { border: none !important; }
.eq :is(th, td) { border-width: 0 0 1px !important; padding: .4rem .5rem .4rem 0 !important; }
.eq th { font-weight: 600; text-align: left; overflow-wrap: anywhere; }
.eq small { display: block; font-weight: 400; opacity: .72; line-height: 1.25; }
.eq .bar { width: 38%; }
.eq .bar div { height: .7rem; border-radius: .35rem; background: var(--border-color-primary); overflow: hidden; }
.eq .bar span { display: block; height: 100%; background: var(--color-accent); }
.eq .value { width: 4rem; text-align: right; white-space: nowrap; padding-right: 0 !important; }
.eq .main .value { font-size: 1.15rem; font-weight: 600; }
.eq h3 { margin: 1.1rem 0 .2rem; }
.eq p { margin: 0 0 .4rem; }
.eq .bad { border-left: 4px solid #c0392b; padding: .5rem .8rem; }
.eq .bad li { margin: .25rem 0; overflow-wrap: anywhere; }
.eq pre { overflow-x: auto; }
#paste textarea { font-family: ui-monospace, monospace; font-size: .82rem; }
"""


class PasteError(ValueError):
    """A pasted text that cannot be scored; `problems` has a sentence for each bad line, which it names."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# --- text -> cases ------------------------------------------------------------------------------------------------


def read_cases(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read pasted text: a JSON object a line, a JSON list of them, or the metric's columns as one object.

    Tokens become numbers, the same for equal tokens, which is all that scores depend on.

    Returns:
        For each case the place that it has in the text, such as ``"line 3"``, and the metric's columns of it.

    Raises:
        PasteError: If there is no case or a line cannot be read; names every such line.
    """
    ids: dict[int | str, int] = {}
    cases = [(place, _read(place, case, ids)) for place, case in _objects(text)]
    problems = [problem for _, problem in cases if isinstance(problem, str)]
    if not cases:
        problems = [f"There is no case yet. Paste one a line, such as {SHOWN}, or press Example."]
    if problems:
        raise PasteError(problems)
    return [(place, case) for place, case in cases if not isinstance(case, str)]


def _objects(text: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the JSON text of each case."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, Mapping) and isinstance(whole.get("role"), list):
        whole = _rows(whole)
    if isinstance(whole, list):
        yield from ((f"case {number}", json.dumps(case)) for number, case in enumerate(whole, 1))
    elif isinstance(whole, Mapping):
        yield "line 1", text
    else:
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of columns, of which all have a value for each case or are null."""
    filled = {name: values for name, values in columns.items() if values is not None}
    number = len(columns["role"])
    for name, values in filled.items():
        if not isinstance(values, list) or len(values) != number:
            shown = f"{len(values)} values" if isinstance(values, list) else f"{values!r:.40}"
            raise PasteError([f"{name}: {number} roles, but {shown}; every column is a list with one value a case"])
    return [dict(zip(filled, values, strict=True)) for values in zip(*filled.values(), strict=True)]


def _read(place: str, text: str, ids: dict[int | str, int]) -> dict[str, Any] | str:
    """Return the metric's columns of one case, or what is wrong with it."""
    try:
        return _case(json.loads(text), ids)
    except json.JSONDecodeError as error:
        return f"{place}: not JSON ({error.msg}, character {error.colno}); write one case a line, such as {SHOWN}"
    except (ValueError, RecursionError) as error:
        return f"{place}: {error}"


def _case(pasted: Any, ids: dict[int | str, int]) -> dict[str, Any]:
    if not isinstance(pasted, Mapping):
        raise ValueError(f"a case is a JSON object, such as {SHOWN}; found {pasted!r:.40}")
    case = {NAMES.get(name, name): value for name, value in pasted.items() if name not in NOTES}
    for name in case:
        if name not in FIELDS:
            raise ValueError(f'there is no field "{name:.40}"; the fields are {", ".join((*FIELDS, *NOTES))}')
    for name in FIELDS[:3]:
        if case.get(name) is None:
            raise ValueError(f'"{name}" is missing; a case has at least role, reference and prediction')
    reference, ranked = _tokens(case["reference"], case["prediction"])
    top_k = case.get("top_k")
    if top_k is not None and type(top_k) is not int:
        raise ValueError(f"top_k is a whole number; found {top_k!r:.40}")
    return {
        "predictions": [[ids.setdefault(token, len(ids)) for token in best] for best in ranked],
        "references": [ids.setdefault(token, len(ids)) for token in reference],
        "role": case["role"],
        "criterion": _criterion(case.get("criterion")),
        "top_k": top_k,
    }


def _tokens(reference: Any, prediction: Any) -> tuple[list[Any], list[list[Any]]]:
    """Return the target's tokens and the guesses for each; a target of one token needs no lists."""
    if not isinstance(prediction, list):
        prediction = [prediction]
    if not isinstance(reference, list):
        reference = [reference]
        if not any(isinstance(best, list) for best in prediction):
            prediction = [prediction]
    ranked = [best if isinstance(best, list) else [best] for best in prediction]
    kinds = set()
    for token in chain(reference, *ranked):
        kinds.add(type(token))
        if type(token) not in (int, str):
            raise ValueError(f"a token is its text or its id, a whole number; found {token!r:.40}")
    if len(kinds) > 1:
        raise ValueError("some tokens are texts and some ids, which are never equal; use one of the two")
    return reference, ranked


def _criterion(value: Any) -> str:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"criterion is a text, such as Rephrase, or a list of texts; found {value!r:.40}")
    return ", ".join(names)


# --- cases -> scores ----------------------------------------------------------------------------------------------


def score(text: str, load: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Score pasted text.

    Args:
        text: See :func:`read_cases`.
        load: Makes the metric; one for each text, so that nothing of one text is left for the next.

    Returns:
        What the metric computes, and the number of cases of each role.

    Raises:
        PasteError: If it cannot be scored; names the lines.
    """
    cases = read_cases(text)
    places, rows = [place for place, _ in cases], [case for _, case in cases]
    metric = load()
    try:
        metric.add_batch(**{name: [row[name] for row in rows] for name in rows[0]})
    except ValueError as error:
        raise PasteError([re.sub(r"^case (\d+)", lambda match: places[int(match[1])], str(error))]) from error
    return metric.compute(), dict(Counter(row["role"] for row in rows))


# --- scores -> page -----------------------------------------------------------------------------------------------


def render_scores(result: Mapping[str, Any], cases: Mapping[str, int]) -> str:
    """Return scores as HTML, a bar for each: top 1 first, then what the paper counts, then those by criterion.

    Args:
        result: What the metric computes.
        cases: Number of cases of each role.
    """
    number = sum(cases.values())
    counted = ", ".join(f"{many} {role}" for role, many in cases.items())
    parts = [
        f"<p>{number} case{'' if number == 1 else 's'} scored: {counted}. In percent.</p>",
        "<h3>Is the best guess right?</h3>",
        _table(_named(TOP_1, result), "main"),
        "<h3>Is it among the first guesses, as the paper counts?</h3>",
        _table(_named(TOP_5, result)),
    ]
    for title, field in (("By criterion, top 1", "top1"), ("By criterion, in the top 5", "score")):
        cells = [
            (name, f"{role}, {cell['cases']} case{'' if cell['cases'] == 1 else 's'}", cell[field])
            for role, named in result["by_criterion"].items()
            for name, cell in named.items()
        ]
        parts += [f"<h3>{title}</h3>", _table(cells)] if cells else []
    parts.append(f"<details><summary>As JSON</summary><pre>{escape(json.dumps(result, indent=1))}</pre></details>")
    return f'<div class="eq">{"".join(parts)}</div>'


def render_waiting() -> str:
    """Return what stands in the place of scores at first: what they will mean."""
    return f'<div class="eq"><p>In percent; more is better.</p>{_table(_named(TOP_1, {}), "main")}</div>'


def render_problems(problems: Sequence[str]) -> str:
    """Return what is wrong with a pasted text as HTML."""
    shown = [f"<li>{escape(problem[:400])}</li>" for problem in problems[:MOST]]
    more = f"<p>And {len(problems) - MOST} more lines.</p>" if len(problems) > MOST else ""
    return (
        f'<div class="eq"><div class="bad" role="alert"><strong>Not '
        f"scored</strong><ul>{''.join(shown)}</ul>{more}</div></div>"
    )


def _named(names: Mapping[str, tuple[str, str]], result: Mapping[str, Any]) -> list[tuple[str, str, float | None]]:
    return [(title, meaning, result.get(name)) for name, (title, meaning) in names.items()]


def _table(rows: Sequence[tuple[str, str, float | None]], kind: str = "") -> str:
    """Return a table of name, meaning and value; a dash for a value that is not there."""
    lines = []
    for name, meaning, value in rows:
        shown = "–" if value is None else f"{value:.1f}"
        bar = f'<div><span style="width:{value or 0:.1f}%"></span></div>'
        lines.append(
            f'<tr><th scope="row">{escape(name)}<small>{escape(meaning)}</small></th>'
            f'<td class="bar" aria-hidden="true">{bar}</td><td class="value">{shown}</td></tr>'
        )
    return f'<table class="{kind}"><tbody>{"".join(lines)}</tbody></table>'


# --- the page -----------------------------------------------------------------------------------------------------


def build_page(load: Callable[[], Any]) -> Any:
    """Return the page as ``gradio.Blocks``; :func:`launch` serves it.

    Args:
        load: Makes the metric.

    Raises:
        ImportError: If gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('the page of the metric needs the extra "demo": pip install "ibke-hf[demo]"') from error

    def answer(text: str) -> str:
        try:
            return render_scores(*score(text, load))
        except PasteError as error:
            return render_problems(error.problems)

    with gr.Blocks(title="edit_quality: did the edit work?", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown(FORMAT)
                text = gr.Textbox(label="Predictions", lines=12, max_lines=16, elem_id="paste", placeholder=SHOWN)
                with gr.Row():
                    example = gr.Button("Example", min_width=120)
                    press = gr.Button("Score", variant="primary", min_width=120)
            with gr.Column(min_width=320):
                result = gr.HTML(render_waiting(), elem_id="scores")
        with gr.Accordion("All fields, and the metric in Python", open=False):
            gr.Markdown(DETAILS.replace("{name}", os.environ.get("SPACE_ID", "org/edit_quality")))
        press.click(answer, text, result, api_name="score")
        example.click(lambda: EXAMPLE, None, text, api_visibility="private")
    return page


def launch(load: Callable[[], Any], **options: Any) -> Any:
    """Build the page and serve it; options are those of ``gradio.Blocks.launch``."""
    return build_page(load).launch(css=CSS, footer_links=[], **options)
