"""The table of editors: the paper's own rows are marked as its rule says, and every form of it reads back."""

from __future__ import annotations

import csv
import io
import re

import pytest
from browser import DESKTOP, PHONE, chromium, keep, overflow
from markdown_tables import markdown_rows
from table_cells import GPT2_XL, NASTY, Page, a_cell, many_cells, paper_cells

from ibke_hf.evaluation.report.table import BEST, METRICS, NEAR, PAPER, STRICT, CellError, Column, mark_of, table_of
from ibke_hf.evaluation.report.table_page import as_html
from ibke_hf.evaluation.report.table_text import (
    EFFORT_TITLES,
    as_csv,
    as_markdown,
    as_text,
    bytes_text,
    markdown_escape,
    seconds_text,
)
from ibke_hf.evaluation.report.trade_off import trade_off_figure

BESTS = {  # by hand
    "uniedit": {"reliability": "grace", "generality": "ibke", "locality": "grace", "avg": "ibke"},
    "mquake": {"reliability": "grace", "generality": "ibke", "avg": "ibke"},
    "zsre": {"reliability": "rome", "generality": "ibke", "locality": "grace", "avg": "ft"},
}
NEARS = {  # by hand: from 0.97 times the best on, such as 96.6508 for UniEdit's reliability
    "uniedit": {
        "reliability": {"ft", "rome", "ibke"},
        "generality": set(),
        "locality": {"rome", "ibke"},
        "avg": set(),
    },
    "mquake": {"reliability": {"ft", "ibke"}, "generality": set(), "avg": set()},
    "zsre": {"reliability": {"ft", "grace"}, "generality": {"ft"}, "locality": {"ft", "rome"}, "avg": {"ibke"}},
}


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", GPT2_XL)
def test_the_papers_rows_are_marked_by_its_rule(split):
    table = table_of(paper_cells())
    entries = {row.editor: table.entry(row.editor, Column(split)) for row in table.rows}
    for name, best in BESTS[split].items():
        marks = {editor: entry.values[name].mark for editor, entry in entries.items()}
        assert {editor for editor, mark in marks.items() if mark == BEST} == {best}
        assert {editor for editor, mark in marks.items() if mark == NEAR} == NEARS[split][name]
        assert marks["none"] == ""
        assert {editor: entry.values[name].mean for editor, entry in entries.items()} == {
            editor: row[PAPER.index(name)] for editor, row in GPT2_XL[split].items()
        }


def test_rows_have_the_papers_order_and_groups():
    table = table_of(reversed(many_cells()))
    names = [row.name for row in table.rows]
    assert names == [
        "W/O",
        "FT",
        "ROME",
        "T-Patcher",
        "LEMoE",
        "GRACE",
        "AlphaEdit",
        "true request in front",
        "SERAC",
        "MEND",
        "IBKE (paper)",
        "IBKE (ours)",
        "IBKE solved",
        "MEND solved",
        "IBKE routed",
        "MEND routed",
        "nearest request in front",
    ]
    assert [row.group for row in table.rows] == ["DE"] * 8 + ["ET"] * 9


def test_the_edge_of_three_percent_counts_and_ties_share_the_best():
    assert mark_of(97.0, 100.0) == mark_of(0.97 * 99.9, 99.9) == NEAR
    assert mark_of(96.99, 100.0) == mark_of(None, 100.0) == mark_of(None, None) == ""
    assert mark_of(0.0, 0.0) == ""
    table = table_of([a_cell("ft"), a_cell("ibke")])
    assert [row.entries[0].values["avg"].mark for row in table.rows] == [BEST, BEST]


def test_the_unedited_model_alone_has_no_marks():
    (row,) = table_of([a_cell("none")]).rows
    assert {value.mark for value in row.entries[0].values.values()} == {""}


def test_means_and_sample_std_over_seeds():
    cells = [
        a_cell(scores=(90.0 + seed, 50.0, None, average), seed=seed, edit_seconds=seconds, edit_bytes=size)
        for seed, average, seconds, size in ((0, 10.0, 0.1, 100), (1, 12.0, 0.2, 300), (2, 14.0, 9.0, 200))
    ]
    ((entry,),) = [row.entries for row in table_of(cells).rows]
    assert (entry.values["avg"].mean, entry.values["avg"].std) == (12.0, 2.0)  # 1.63 were the population's
    assert entry.values["reliability"].mean == 91.0
    assert (entry.values["locality"].mean, entry.values["locality"].std) == (None, None)
    assert entry.seeds == (0, 1, 2)
    assert (entry.edit_seconds, entry.edit_bytes) == (0.2, 200)
    (alone,) = table_of(cells[:1]).rows
    assert alone.entries[0].values["avg"].std is None


def test_columns_come_in_order_of_appearance_with_readable_titles():
    cells = [
        a_cell(edits="counterfactual"),
        a_cell(split="held_out", edits="unknown"),
        a_cell(split="a\n b", sequential=10),
        a_cell("ft"),
        a_cell("ft", edits="counterfactual", sequential=1),
    ]
    columns = table_of(cells).columns
    assert [column.title for column in columns] == [
        "test, counterfactual",
        "held out, unknown",
        "a b, 10 sequential edits",
        "test",
    ]
    assert columns[0] == Column("test", "counterfactual", 1)
    assert table_of(cells).columns == columns
    assert Column("/a/very/long/way/to/the/records.json").title == "…/records.json"
    assert Column("owner/dataset:test").title == "owner/dataset:test"


def test_sequential_edits_are_a_group_of_their_own_and_do_not_count_as_what_one_edit_takes():
    table = table_of(
        [a_cell(), a_cell(sequential=10, scores=(50.0, 40.0, 30.0, 40.0), edit_seconds=9.0, edit_bytes=10_000)]
    )
    (row,) = table.rows
    assert [entry.values["avg"].mean for entry in row.entries] == [80.0, 40.0]
    assert (row.edit_seconds, row.edit_bytes) == (0.25, 2048)
    (only,) = table_of([a_cell(sequential=10, edit_seconds=9.0)]).rows
    assert only.edit_seconds == 9.0


def test_a_metric_that_nobody_has_has_no_column():
    table = table_of(paper_cells())
    assert table.metrics(1, PAPER) == ("reliability", "generality", "avg")
    assert table.metrics(0, PAPER) == PAPER
    assert table_of([], editors=["ft"], columns=[Column("test")]).metrics(0, PAPER) == PAPER


def test_notes_name_what_is_missing_unequal_or_of_other_records():
    notes = "\n".join(table_of(many_cells()).notes)
    assert "2 of 85 cells are missing (…)" in notes
    assert 'Seeds are unequal: 3 seeds, but 2 for MEND in "test, unknown".' in notes
    assert "W/O is the unedited model" in notes
    whole = "\n".join(table_of([a_cell(), a_cell("ft")]).notes)
    assert "Each value is of 1 seed." in whole
    assert 'Records: 40 in "test".' in whole
    assert "missing" not in whole
    assert "W/O" not in whole
    other = "\n".join(table_of([a_cell(), a_cell("ft", records=20)]).notes)
    assert '"test": not all values are of the same number of records (FT 20, IBKE (ours) 40)' in other
    often = [a_cell(editor, seed=seed) for editor in ("mend", "ibke", "serac") for seed in range(3)]
    assert "3 seeds, but 1 for W/O, FT." in "\n".join(table_of([a_cell("none"), a_cell("ft"), *often]).notes)


def test_a_note_says_at_how_many_edits_each_editor_was_tuned():
    cells = [
        a_cell(editor, sequential=sequential, tuned_at=tuned_at)
        for editor, sequential, tuned_at in (("ft", 1, 1), ("ft", 100, 100), ("mend", 1, 1), ("mend", 100, 1))
    ]
    chosen = "Hyper-parameters were chosen on validation records, with as many edits at once as the column has"
    assert table_of(cells).notes[-1] == f'{chosen}, but in "test, 100 sequential edits" at 1 for MEND.'
    assert table_of(cells[:2]).notes[-1] == f"{chosen}."
    assert "Hyper-parameters" not in "\n".join(table_of([a_cell("ft")]).notes)


def test_editors_and_columns_that_are_planned_show_before_they_are_finished():
    table = table_of([a_cell()], editors=["mend", "none"], columns=[Column("zsre"), Column("test")])
    assert [row.editor for row in table.rows] == ["none", "mend", "ibke"]
    assert [column.split for column in table.columns] == ["zsre", "test"]
    assert table.entry("ibke", Column("zsre")) is None
    assert any("5 of 6 cells are missing" in note for note in table.notes)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([a_cell("nobody")], r"no row for the editor 'nobody'; it knows none, ft"),
        ([a_cell(), a_cell()], r"2 cells of ibke \(test\) have the seed 0"),
        ([a_cell(avg=float("nan"))], r"ibke \(test, seed 0\) has avg = nan"),
        ([a_cell(f1="12")], r"has f1 = '12'"),
        ([{k: v for k, v in a_cell().items() if k != "locality"}], r"has no 'locality'; write None"),
        ([{k: v for k, v in a_cell().items() if k != "seed"}], r"has no 'seed'"),
        ([{"editor": "ft"}], r"a cell of ft has no 'split'"),
    ],
)
def test_cells_that_make_no_table_are_named(cells, message):
    with pytest.raises(CellError, match=message):
        table_of(cells)
    with pytest.raises(CellError, match="nobody"):
        table_of([], editors=["nobody"])


# --- text, Markdown, CSV ------------------------------------------------------------------------------------------


def test_text_is_aligned_marked_and_fits_the_terminal():
    text = as_text(table_of(paper_cells()), width=100)
    body = text.split("\n\n* best")[0].split("\n\n")
    assert len(body) == 6  # each column group in two, what is right first
    assert all(len(line) <= 119 for line in text.splitlines())
    strict, paper = body[:2]
    assert re.split("  +", strict.splitlines()[1].strip()) == ["Type", "Editor", *(METRICS[name] for name in STRICT)]
    row = next(line for line in paper.splitlines() if "IBKE" in line)
    assert re.split("  +", row.strip())[1:5] == ["IBKE (ours)", "*96.9", "~97.5", "*97.4 ±"]
    for block in (strict, paper):
        columns = [
            tuple(match.end() for match in re.finditer(r"\d\.\d(?= |$)", line)) for line in block.splitlines()[3:]
        ]
        assert len({ends[0] for ends in columns}) == 1  # decimals stand below each other
    assert "Loc." not in body[2].splitlines()[1].replace("Loc. top 1", "")


def test_time_alone_is_a_column_and_old_cells_have_none():
    old, new = a_cell("ft"), a_cell("ibke", edit_seconds_alone=0.044, edit_seconds=0.007)
    table = table_of([old, new])
    head, *_, line = markdown_rows(as_markdown(table))
    texts = dict(zip(head, line, strict=True))
    assert (texts["Time alone"], texts["Time at once"]) == ("44 ms", "7.0 ms")
    assert [row.edit_seconds_alone for row in table.rows] == [None, 0.044]
    assert "250 ms" in as_text(table) and "–" in as_text(table)


def test_free_answers_have_columns_where_there_are_any():
    free = {"answered_reliability": 70.0, "answered_generality": 40.5, "answered_locality": None}
    table = table_of([a_cell("ft"), a_cell("ibke", **free), a_cell("ft", "zsre")])
    blocks = as_text(table, width=300).split("\n\n")
    heads = [re.split("  +", block.splitlines()[1].strip()) for block in blocks[:2]]
    assert heads[0][2:5] == ["Free rel.", "Free gen.", "Exact match"]
    assert "Free rel." not in heads[1]
    assert "without the target or its length" in " ".join(blocks[-1].split())
    assert markdown_rows(as_markdown(table).split("\n\n")[1])[0][2:4] == ["Free rel.", "Free gen."]
    page = Page(as_html(table))
    assert page.tables[0][1][:3] == ["Free rel.", "Free gen.", "Exact match"]
    (line,) = [
        line for line in csv.DictReader(io.StringIO(as_csv(table))) if line["editor"] == "ibke" and line["avg_mean"]
    ]
    assert (line["answered_generality_mean"], line["answered_locality_mean"]) == ("40.5", "")
    plain = table_of([a_cell("ft")])
    assert "Free" not in as_text(plain) + as_markdown(plain) + as_html(plain)


def test_text_shows_what_is_missing_and_what_is_not_there():
    cells = [a_cell("ft"), a_cell("ibke"), a_cell("ibke", "zsre", (90.0, None, 80.0, 85.0)), a_cell("mend", "zsre")]
    _, zsre, *_ = as_text(table_of(cells), width=200).split("\n\n")
    lines = zsre.splitlines()
    assert set(next(line for line in lines if " FT " in line).split()[2:]) == {"…"}
    ibke = re.split("  +", next(line for line in lines if "IBKE" in line).strip())
    assert ibke[1:8] == ["*25.0", "*90.0", "*50.0", "*60.0", "–", "*80.0", "*85.0 ±"]
    assert as_text(table_of([]))


def test_markdown_reads_back():
    table = table_of(many_cells())
    parts = as_markdown(table).split("\n\n")
    tables = [part.splitlines() for part in parts if part.startswith("|")]
    assert len(tables) == len(table.columns)
    for number, (head, rule, *lines) in enumerate(tables):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *lines)}) == 1
        for row, line in zip(table.rows, lines, strict=True):
            ((_, name, *shown),) = markdown_rows(line)
            assert name == row.name
            entry = row.entries[number]
            if entry is None:
                assert set(shown) == {"…"}
                continue
            for metric, text in zip(METRICS, shown, strict=False):
                value = entry.values[metric]
                around = {BEST: "**", NEAR: "*", "": ""}[value.mark]
                assert text.startswith(f"{around}{value.mean:.1f}{around}")
            assert shown[6].endswith(f"± {entry.values['avg'].std:.1f}")
    title = f"**{markdown_escape(table.columns[4].title)}**"
    assert title in parts
    assert "<script" not in title.replace("\\<", "")


def test_csv_reads_back_in_full_precision():
    table = table_of(many_cells())
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(lines) == len(table.rows) * len(table.columns)
    for line in lines:
        entry = table.entry(line["editor"], Column(line["split"], line["edits"], int(line["sequential"])))
        assert int(line["seeds"]) == (len(entry.seeds) if entry else 0)
        for name in METRICS:
            for part in ("mean", "std"):
                value = getattr(entry.values[name], part) if entry else None
                assert line[f"{name}_{part}"] == ("" if value is None else str(value))
        if entry and line["editor"] != "none":
            assert float(line["edit_seconds"]) == 0.25
            assert line["records"] == "40"
    assert {line["split"] for line in lines} == {"test", "held_out", NASTY}


def test_times_and_sizes_have_fitting_units():
    assert [seconds_text(s) for s in (None, 0.0042, 0.0123, 0.9999, 61.0)] == [
        "–",
        "4.2 ms",
        "12 ms",
        "1.0 s",
        "61.0 s",
    ]
    assert [bytes_text(b) for b in (None, 12, 98_304, 999_900, 4_100_000, 2e9)] == [
        "–",
        "12 B",
        "98 kB",
        "1.0 MB",
        "4.1 MB",
        "2.0 GB",
    ]


# --- HTML ---------------------------------------------------------------------------------------------------------


def test_html_reads_back():
    table = table_of(many_cells())
    page = Page(as_html(table, title=NASTY, about=NASTY))
    assert "script" not in page.seen
    assert page.links == []
    strict, scores = page.tables  # what is right comes first
    assert strict[0] == ["Type", "Editor", *(column.title for column in table.columns), "Edit"]
    assert strict[1] == ["Exact match", "Rel. top 1", "Gen. top 1", "Loc. top 1"] * 5 + list(EFFORT_TITLES)
    assert scores[1] == ["Rel. top 1", "Gen. in top 5", "Loc. in top 5", "Average", "F1"] * 5
    for names, lines, efforts in ((STRICT, strict[2:], 3), ((*PAPER, "f1"), scores[2:], 0)):
        for row, line in zip(table.rows, lines, strict=True):
            values = [
                value
                for entry in row.entries
                for value in ([entry.values[name] for name in names] if entry else [None] * len(names))
            ]
            shown = line[line.index(row.name) + 1 :]
            for value, text in zip(values, shown[: len(shown) - efforts], strict=True):
                assert text.startswith("…" if value is None else f"{value.mean:.1f}")
    marks = [v.mark for row in table.rows for entry in row.entries if entry for v in entry.values.values()]
    for row in table.rows:  # reliability is in both tables
        marks += [entry.values["reliability"].mark for entry in row.entries if entry]
    for mark in (BEST, NEAR):
        assert sum(mark in kinds.split() for kinds in page.classes) == marks.count(mark) > 0


def test_html_refuses_a_plot_that_is_none():
    with pytest.raises(ValueError, match=r"has to be the text of an SVG, and begins with 'plot\.png'"):
        as_html(table_of([a_cell()]), "plot.png")


@pytest.mark.slow
def test_page_fits_a_desktop_and_a_phone_and_asks_for_nothing(tmp_path):
    table = table_of(many_cells())
    try:
        plot = trade_off_figure(many_cells())
    except ImportError:
        plot = None
    file = tmp_path / "table.html"
    file.write_text(as_html(table, plot), encoding="utf-8")
    with chromium() as browser:
        for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
            page = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme).new_page()
            asked = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            assert overflow(page) == 0
            assert asked == [file.as_uri()]
            assert page.locator("table").nth(1).is_visible()
            keep(page, f"table-{scheme}")
