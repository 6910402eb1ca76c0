"""Rows and arrays -> figures, as HTML that needs nothing but the style sheet; never runs a model.

Every text that comes from outside is escaped. Colours and sizes are in ``app.css``; a figure says what it means, in
words too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

MARKS = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("open", "")}
GROUPS = (
    ("Did it take?", "reliability", ("request",), "the very question that you edited"),
    ("Does it carry over?", "generality", ("rephrase", "consequence"), "the fact in other words, and what it implies"),
    ("Did the rest stay?", "locality", ("neighbour",), "other facts: the answer from before is the right one"),
)
VERBS = {"reliability": "took", "generality": "carried over", "locality": "stayed"}
TAGS = {"rephrase": "in other words", "consequence": "consequence", "neighbour": "another fact"}
BY_ITSELF = "nobody typed this question: the page asks it by itself"
Row = Mapping[str, Any]

# --- before and after ---------------------------------------------------------------------------------------------


def verdict_figure(rows: Sequence[Row]) -> str:
    """Answer the three questions about an edit in a line each: did it take, does it carry over, did the rest stay."""
    lines = [
        f'<li><span title="{score}">{title}</span> {tally(members, score)}</li>'
        for title, score, members, _ in _groups(rows)
    ]
    return f'<ul class="ibke-verdict">{"".join(lines)}</ul>'


def comparison_figure(rows: Sequence[Row]) -> str:
    """Draw the rows of :func:`~ibke_hf.evaluation.comparison.compare_answers` as cards, grouped by what they judge."""
    groups = []
    for title, score, members, meaning in _groups(rows):
        cards = "".join(map(answer_card, members))
        groups.append(
            f'<section class="ibke-group ibke-{score}"><h3 title="{score}">{title} {tally(members, score)}</h3><p '
            f'class="ibke-faint">{meaning}</p>'
            f'<div class="ibke-cards">{cards}</div></section>'
        )
    return f'<div class="ibke-groups">{"".join(groups)}</div>'


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row], str]]:
    """Yield title, score, members and meaning of each group that has any."""
    for title, score, roles, meaning in GROUPS:
        if members := [row for row in rows if row["role"] in roles]:
            yield title, score, members, meaning


def tally(rows: Iterable[Row], score: str, verb: str = "") -> str:
    """Say how many of the judged rows are right, as a coloured word that names the field's score when pointed at.

    Args:
        rows: Of one group.
        score: Its score.
        verb: Put before the numbers, where no title says what is counted.
    """
    judged = [row["right"] for row in rows if row["right"] is not None]
    if not judged:
        return f'<span class="ibke-tally ibke-open" title="{score}">{verb} not judged</span>'
    kind, mark = MARKS[all(judged)]
    number = f"{sum(judged)} of {len(judged)}"
    text = number if verb or len(judged) > 1 else "yes" if all(judged) else "no"
    return f'<span class="ibke-tally ibke-{kind}" title="{score}: {number}">{mark} {verb} {text}</span>'


def answer_card(row: Row) -> str:
    """Draw one question: its mark, what the model answered before and after, and the five best next tokens of both."""
    kind, _ = MARKS[row["right"]]
    before, after = (_shown(row[side]["answer"]) for side in ("before", "after"))
    stays = row["before"]["answer"] == row["after"]["answer"]
    said = (
        f'<b>{after}</b> <span class="ibke-faint">as before</span>' if stays else f"<s>{before}</s> → <b>{after}</b>"
    )
    marked = row["answers"] if row["role"] != "neighbour" else ()
    bars = "".join(f"<div><h5>{side}</h5>{bar_chart(row[side]['top'], marked)}</div>" for side in ("before", "after"))
    return (
        f'<article class="ibke-card ibke-{kind}"><p class="ibke-prompt">{_mark(row)}'
        f'{escape(row["prompt"])}</p><p class="ibke-said">{said}{_right_answer(row)}</p>'
        f'<div class="ibke-pair">{bars}</div>{_tag(row)}</article>'
    )


def _tag(row: Row) -> str:
    names = [TAGS.get(row["role"], ""), "in a chat" if row.get("chat") else ""]
    name = ", ".join(filter(None, names))
    if not name:
        return ""
    hint = f' title="{BY_ITSELF}"' if row.get("automatic") else ""
    return f'<span class="ibke-tag"{hint}>{name}{", asked by itself" if hint else ""}</span>'


def _mark(row: Row) -> str:
    kind, mark = MARKS[row["right"]]
    return f'<span class="ibke-mark" title="{kind}">{mark}</span>' if mark else ""


def _right_answer(row: Row) -> str:
    """Say the right answer where another one was given."""
    if row["right"] is not False:
        return ""
    answer = row["before"]["answer"] if row["role"] == "neighbour" else row["answers"][0]
    return f' <span class="ibke-faint">should be</span> {_shown(answer)}'


def _shown(text: str) -> str:
    return escape(text) if text else '<span class="ibke-faint">(nothing)</span>'


def bar_chart(top: Iterable[tuple[str, float]], marked: Sequence[str] = ()) -> str:
    """Draw tokens with their probabilities as bars; those that begin one of the `marked` texts stand out."""
    return f'<ol class="ibke-bars">{"".join(_bar(token, p, marked) for token, p in top)}</ol>'


def _bar(token: str, probability: float, marked: Sequence[str]) -> str:
    text = token.strip()
    hit = ' class="ibke-hit"' if text and any(name.strip().startswith(text) for name in marked) else ""
    label = escape(text) or '<span class="ibke-faint">␣</span>'
    return (
        f'<li{hit}><span class="ibke-token">{label}</span>'
        f'<span class="ibke-track"><i style="width:{100 * probability:.1f}%"></i></span>'
        f'<span class="ibke-number">{percent(probability)}</span></li>'
    )


def percent(value: float) -> str:
    """Write a fraction of 1 in percent, what rounds to nothing as ``<1``."""
    return "<1 %".replace("<", "&lt;") if 0 < value < 0.005 else f"{100 * value:.0f} %"


# --- scale factors ------------------------------------------------------------------------------------------------


def scale_factor_figure(factors: Mapping[str, Any] | None) -> str:
    """Draw the scale factor of each token at each edited layer as a heat map: one line of text for each layer.

    Args:
        factors: Of :func:`~ibke_hf.analysis.scale_factors.scale_factors`; None where the editor has none.
    """
    if factors is None:
        return '<p class="ibke-faint">This editor has no scale factor.</p>'
    lines = []
    for name, values in factors["layers"].items():
        cells = "".join(_cell(*cell) for cell in zip(factors["tokens"], values, factors["judged"], strict=True))
        title = f'<span class="ibke-layer-name" title="{escape(name)}">{escape(short_layer(name))}</span>'
        lines.append(f'<div class="ibke-layer">{title}<span class="ibke-cells">{cells}</span></div>')
    return (
        '<div class="ibke-heat" role="img" aria-label="scale factor of each token at each edited layer">'
        f"{''.join(lines)}</div>"
        '<p class="ibke-faint ibke-legend">0 <i class="ibke-ramp"></i> 1 &nbsp; '
        "underlined: tokens that predict the new answer</p>"
    )


def _cell(token: str, value: float, judged: bool) -> str:
    kind = " ibke-judged" if judged else ""
    dark = " ibke-dark" if value > 0.55 else ""
    text = escape(token.strip()) or "␣"
    style = f'class="ibke-cell{kind}{dark}" style="--v:{value:.3f}"'
    return f"<span {style}><span>{text}</span><small>{value:.2f}</small></span>"


def short_layer(name: str) -> str:
    """Name a layer by its number where it has just one: ``model.layers.3.mlp.down_proj`` is ``layer 3``."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else name


# --- editors side by side -----------------------------------------------------------------------------------------


def editors_figure(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the same questions under several editors as a table, each answer with its mark, and what each edit took.

    Args:
        columns: By title of the editor ``rows`` (the same questions everywhere), ``seconds`` and ``nbytes``.
    """
    first = next(iter(columns.values()))["rows"]
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    body = []
    for i, row in enumerate(first):
        cells = "".join(_answer_cell(column["rows"][i]) for column in columns.values())
        question = f'<th scope="row">{escape(row["prompt"])} {_tag(row)}</th>'
        body.append(f"<tr>{question}<td>{_shown(row['before']['answer'])}</td>{cells}</tr>")
    sums = "".join(f"<td>{_cost(column)}</td>" for column in columns.values())
    return (
        f'<table class="ibke-editors"><thead><tr><th>question</th><th>untouched</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}"
        f'<tr class="ibke-sum"><th>in total</th><td></td>{sums}</tr></tbody></table>'
    )


def _answer_cell(row: Row) -> str:
    kind, _ = MARKS[row["right"]]
    return f'<td class="ibke-{kind}">{_mark(row)}{_shown(row["after"]["answer"])}</td>'


def _cost(column: Mapping[str, Any]) -> str:
    marks = " ".join(tally(members, score, VERBS[score]) for _, score, members, _ in _groups(column["rows"]))
    return f"{marks}<br>{duration(column['seconds'])}, {column['nbytes'] / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
