"""How the page looks and what it says: its theme, its style sheet and its fixed texts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.conflicts import Conflict
from ..evaluation.comparison import Row
from .drawings import comparison_figure, duration, scale_factor_figure, verdict_figure
from .knowledge import Knowledge
from .session import Session

STYLE = Path(__file__).with_name("app.css")
TITLE = "Change one fact inside a language model"
WAITING = """<div class="ibke-waiting"><p>Press <b>Edit</b>: the model is asked before and after, and you see</p><ul>
<li><b>Did it take?</b> Does it answer what you said?</li>
<li><b>Does it carry over?</b> The same in other words, and what the fact implies.</li>
<li><b>Did the rest stay?</b> Other facts must not change.</li></ul></div>"""
NO_EDITS = '<p class="ibke-faint ibke-none">None yet: the model is untouched.</p>'
EACH = "one question a line; the right answer after an arrow: question -> answer | other spelling"
BY_ITSELF = "Without questions here, the page asks some of its own: the same in other words, and facts that must stay."
SCROLL = """() => {
  const verdict = document.getElementById("verdict");
  if (verdict.getBoundingClientRect().top > 0.7 * window.innerHeight) verdict.scrollIntoView({behavior: "smooth"});
}"""


def heading(name: str, parameters: int, knowledge: Knowledge) -> str:
    """Say what the page does, which model it edits, and what that knows."""
    about = knowledge.about or f"a language model of {parameters / 1e6:,.1f} million parameters"
    asked = f" Asked {knowledge.asked} facts before you came, it answered {len(knowledge.known)} right."
    return (
        f'<header class="ibke-head"><h1>{TITLE}</h1>'
        "<p>Type a fact and press <b>Edit</b>: the model gives the new answer, however you ask, and what follows from "
        "it changes too. Everything else should stay as it was.</p>"
        f'<p class="ibke-faint"><b>{escape(name)}</b> is {escape(about)}.{asked if knowledge.asked else ""} '
        "No weight is touched: every edit is undone exactly, and nobody else sees yours.</p></header>"
    )


def warning(number: int) -> str:
    """Say what another edit on top of `number` active ones does."""
    active, undone = ("One edit is active.", "it") if number == 1 else (f"{number} edits are active.", "them")
    return (
        f'<p class="ibke-warning" role="note"><b>{active}</b> Several at once disturb one another: answers get lost, '
        f"and other facts change. <b>Replace</b> undoes {undone} first, <b>Add</b> keeps {undone}.</p>"
    )


def summary(session: Session, index: int, rows: Sequence[Row], holding: Sequence[bool]) -> str:
    """Answer the three questions about one active edit; with several, say how many of them are still answered."""
    number, together = len(session.steps), ""
    if number > 1:
        kept = sum(holding)
        text = f"Of your {number} edits the model answers {kept if kept < number else 'all'} as you edited them."
        kind = "ibke-faint" if kept == number else "ibke-warning"
        cure = "" if kept == number else " They disturb one another: undo some of them."
        together = f'<p class="{kind}">{text}{cure}</p>'
    request = session.facts[index].request
    title = f"{escape(request.prompt)} → <b>{escape(request.target)}</b>"
    cut = f", cut to rank {session.rank}" if session.rank else ""
    took = f'<span class="ibke-tally ibke-open">edited in {duration(session.steps[index].seconds)}{cut}</span>'
    return f'<div class="ibke-summary"><p>{title} {took}</p>{verdict_figure(rows)}{together}</div>'


def details(session: Session, index: int, rows: Sequence[Row]) -> str:
    """Show every answer before and after, and how strongly each token was edited."""
    number = len(session.steps)
    carried = "this edit" if number == 1 else f"all of your {number} edits"
    return (
        f'<p class="ibke-faint">Before: the untouched model. After: with {carried}. Bars: the most probable next '
        f"tokens.</p>{comparison_figure(rows)}"
        '<section class="ibke-group ibke-inside"><h3>How strongly each token is edited</h3>'
        '<p class="ibke-faint">the scale factor, by edited layer</p>'
        f"{scale_factor_figure(session.steps[index].factors)}</section>"
    )


def launch_options() -> dict[str, Any]:
    """Return the look of the page, which gradio takes when it is launched: fonts of the system, no other's."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    ).set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        block_title_text_weight="600",
        block_label_background_fill="none",
        button_secondary_border_color="*border_color_primary",
        button_border_width="1px",
        input_border_width="1px",
        checkbox_border_color="*neutral_400",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_100",
        checkbox_label_text_color_selected="*body_text_color",
        checkbox_label_background_fill_selected_dark="*primary_900",
    )
    return {"theme": theme, "css_paths": STYLE, "ssr_mode": False, "footer_links": ["api"]}


def choices(session: Session, holding: Sequence[bool], at_odds: Sequence[Conflict]) -> list[tuple[str, int]]:
    """Name the active edits, and say which the model does not answer any more, and which are at odds with others."""
    named = []
    for place, (fact, holds) in enumerate(zip(session.facts, holding, strict=True)):
        others = sorted({one.first + one.second - place for one in at_odds if place in (one.first, one.second)})
        marks = [] if holds else ["lost"]
        marks += [f"at odds with {', '.join(str(other + 1) for other in others)}"] if others else []
        text = f"{place + 1}. {fact.request.prompt} → {fact.request.target}"
        named.append((f"{text} ({'; '.join(marks)})" if marks else text, place))
    return named
