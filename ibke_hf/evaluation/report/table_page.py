"""The table of editors as one HTML file: no network, no script, light and dark, readable on a phone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .table import FREE, MISSING, PAPER, STRICT, UNEDITED, Entry, Table, Value
from .table_text import EFFORT_TITLES, TITLES, effort_texts, number_text

PAPERS = (*PAPER, "f1")
MARKS = (
    '<p><span class="key best">best</span> of its column, <span class="key near">within 3 %</span> of the best.</p>'
)
STYLE = """
:root { --ink: #1a1c1f; --paper: #ffffff; --line: #d9dce1; --rule: #8b929c; --faint: #5b616b;
  --best: #1f4e9e; --on-best: #ffffff; --near: #d3e3f8; --on-near: #12325f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15171a; --line: #2f343b; --rule: #5d6570; --faint: #9aa2ad;
    --best: #8ab4f8; --on-best: #0b1a33; --near: #1d3557; --on-near: #cfe1fb; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1rem; color: var(--ink); background: var(--paper); }
body { font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .3rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.faint, .notes { color: var(--faint); }
.notes { margin-top: .7rem; font-size: .88rem; }
.scroll { overflow-x: auto; margin: .8rem 0 .3rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .45rem; white-space: nowrap; text-align: right; }
th { font-weight: 600; }
thead tr:first-child th { border-top: 2px solid var(--rule); }
thead th[colspan] { text-align: center; border-bottom: 1px solid var(--line); }
thead tr:last-child th, thead th[rowspan] {
  font-weight: 400; color: var(--faint); border-bottom: 1px solid var(--rule); }
tbody tr:last-child > *, tbody th[rowspan] { border-bottom: 1px solid var(--rule); }
tbody:last-child tr:last-child > *, tbody:last-child th[rowspan] { border-bottom: 2px solid var(--rule); }
thead th[colspan] span { position: sticky; left: 7.2rem; right: .5rem; }
th.type { text-align: left; vertical-align: top; color: var(--faint); font-weight: 400; }
th.editor { text-align: left; position: sticky; left: 0; z-index: 1; background: var(--paper); padding-right: .8rem; }
thead th[rowspan] { vertical-align: bottom; }
.start { border-left: 1px solid var(--line); }
.best { background: var(--best); color: var(--on-best); font-weight: 650; }
.near { background: var(--near); color: var(--on-near); text-decoration: underline; text-underline-offset: .15em; }
.key { padding: .05rem .35rem; border-radius: .25rem; }
.spread { font-weight: 400; opacity: .8; font-size: .92em; text-align: left;
  display: inline-block; min-width: 2.7rem; }
.none td, .open { color: var(--faint); }
details { margin: 1rem 0; } summary { cursor: pointer; }
figure { margin: 0; max-width: 44rem; }
figure svg { display: block; width: 100%; min-width: 31rem; height: auto; border-radius: .4rem; }
"""


def as_html(table: Table, plot: str | None = None, *, title: str = "Editors compared", about: str = "") -> str:
    """Return the table as a page of its own, the plot in it.

    Args:
        table: Of :func:`~ibke_hf.evaluation.report.table.table_of`.
        plot: Of :func:`~ibke_hf.evaluation.report.trade_off.trade_off_figure`; none is shown without it.
        title: Of the page.
        about: A sentence below it, such as the backbone's name.

    Raises:
        ValueError: If the plot is no SVG.
    """
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(about)}</p>' if about else "",
        f"<h2>Is the answer right?</h2>{_scores(table, (*FREE, *STRICT))}",
        f"<h2>The paper's scores: is the answer among the five likeliest?</h2>{_scores(table, PAPERS, effort=False)}",
        f'<div class="notes">{MARKS}{notes}</div>',
        _figure(plot) if plot else "",
    ]
    body = "\n".join(filter(None, parts))
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates make browsers fail


def _figure(plot: str) -> str:
    """Put an SVG into the page, without the lines that only a file of its own needs."""
    drawing = re.search(r"<svg\b.*</svg>", plot, re.DOTALL)
    if not drawing:
        raise ValueError(
            f"the plot has to be the text of an SVG, and begins with {plot[:40]!r}; pass what trade_off_figure returns"
        )
    return (
        "<h2>Generality and locality, in the top 5</h2><figure>"
        '<div class="scroll" tabindex="0" role="region" aria-label="plot">'
        f'{drawing.group()}</div><figcaption class="faint">Means over single edits; lines join equal F1, the '
        "harmonic mean. "
        "The further to the upper right, the better.</figcaption></figure>"
    )


def _scores(table: Table, metrics: Sequence[str], *, effort: bool = True) -> str:
    """Draw a table: editors below each other, column groups beside each other, at the end what one edit takes."""
    shown = [table.metrics(number, metrics) for number in range(len(table.columns))]
    groups = "".join(
        f'<th class="start" scope="colgroup" colspan="{len(names)}"><span>{escape(column.title)}</span></th>'
        for column, names in zip(table.columns, shown, strict=True)
        if names
    )
    heads = "".join(
        f'<th{_start(i)} scope="col">{TITLES[name]}</th>' for names in shown for i, name in enumerate(names)
    )
    bodies = []
    for kind in dict.fromkeys(row.group for row in table.rows):
        rows = [row for row in table.rows if row.group == kind]
        lines = []
        for i, row in enumerate(rows):
            type_ = f'<th class="type" scope="rowgroup" rowspan="{len(rows)}">{kind}</th>' if i == 0 else ""
            cells = "".join(_entry_cells(entry, names) for entry, names in zip(row.entries, shown, strict=True))
            takes = (
                "".join(f"<td{_start(i)}>{text}</td>" for i, text in enumerate(effort_texts(row))) if effort else ""
            )
            plain = ' class="none"' if row.editor == UNEDITED else ""
            lines.append(
                f'<tr{plain}>{type_}<th class="editor" scope="row">{escape(row.name)}</th>{cells}{takes}</tr>'
            )
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    if effort:
        groups += f'<th class="start" scope="colgroup" colspan="{len(EFFORT_TITLES)}"><span>Edit</span></th>'
        heads += "".join(f'<th{_start(i)} scope="col">{title}</th>' for i, title in enumerate(EFFORT_TITLES))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="scores"><table><thead><tr>'
        '<th class="type" rowspan="2" scope="col">Type</th><th class="editor" rowspan="2" scope="col">Editor</th>'
        f"{groups}</tr><tr>{heads}</tr></thead>{''.join(bodies)}</table></div>"
    )


def _start(number: int) -> str:
    return "" if number else ' class="start"'


def _entry_cells(entry: Entry | None, names: Sequence[str]) -> str:
    if entry is None:
        room = {"avg": '<span class="spread"></span>'}
        return "".join(
            f'<td class="open{"" if i else " start"}">{MISSING}{room.get(name, "")}</td>'
            for i, name in enumerate(names)
        )
    return "".join(_value_cell(entry.values[name], i == 0, name == "avg") for i, name in enumerate(names))


def _value_cell(value: Value, first: bool, spread: bool) -> str:
    kinds = " ".join(filter(None, (value.mark, "start" if first else "")))
    text = number_text(value.mean)
    if spread and value.mean is not None:
        text += f'<span class="spread">\u00a0± {number_text(value.std)}</span>'
    return f'<td class="{kinds}">{text}</td>' if kinds else f"<td>{text}</td>"
