"""The plot of editors: means of the right runs, labels apart, an SVG that is whole and the same each time."""

from __future__ import annotations

import re
import statistics
import sys
import xml.etree.ElementTree as ET

import pytest
from table_cells import Page, a_cell, many_cells, paper_cells

from ibke_hf.evaluation.report import trade_off
from ibke_hf.evaluation.report.drawing import require_plots
from ibke_hf.evaluation.report.table import EDITORS, CellError, table_of
from ibke_hf.evaluation.report.table_page import as_html
from ibke_hf.evaluation.report.trade_off import (
    label_offsets,
    levels_of,
    limits_of,
    partner,
    points_of,
    trade_off_figure,
)
from ibke_hf.evaluation.scores import f1


def test_points_are_means_over_single_edits_that_have_both_scores():
    points = {
        point.label: point
        for point in points_of([*paper_cells(), a_cell("ft", "uniedit", (0.0, 0.0, 0.0, 0.0), sequential=10)])
    }
    assert set(points) == {"W/O", "FT", "ROME", "GRACE", "IBKE (ours)"}
    assert points["IBKE (ours)"].generality == pytest.approx(
        statistics.fmean([96.89, 97.69])
    )  # MQuAKE has no locality
    assert points["FT"].locality == pytest.approx(statistics.fmean([89.68, 97.89]))
    assert [points[name].style for name in ("W/O", "FT", "IBKE (ours)")] == ["W/O", "DE", "ET"]
    partial = points_of([a_cell("ft"), a_cell("ibke"), a_cell("ibke", "zsre")])
    assert [point.label for point in partial] == ["FT (1 of 2)", "IBKE (ours)"]


def test_nothing_to_draw_is_an_error_that_says_so():
    for cells in ([], [a_cell(sequential=10)], [a_cell("ft", "mquake", (99.8, 44.0, None, 71.9))]):
        with pytest.raises(CellError, match="no cell of single edits has both generality and locality"):
            trade_off_figure(cells)


@pytest.mark.parametrize("values", [(50.0,), (0.0,), (100.0,), (0.0, 100.0), (97.0, 97.5), (20.0, 96.0)])
def test_axes_hold_the_points_with_room_and_lines_of_f1_cross_them(values):
    low, high = limits_of(values)
    assert low < min(values)
    assert high > max(values)
    assert high - low >= 2.5
    assert low >= -6
    assert high <= 106
    levels = levels_of((low, high), (low, high))
    assert len(levels) <= 6
    assert all(0 < level < 100 and f1(max(low, 0), max(low, 0)) < level < f1(high, high) for level in levels)
    for level in levels:
        assert f1(high, partner(level, high)) == pytest.approx(level)


def test_labels_do_not_cover_each_other():
    places = [(200.0, 150.0), (203.0, 152.0), (206.0, 149.0), (260.0, 150.0), (395.0, 290.0), (3.0, 3.0)]
    labels = ["T-Patcher", "AlphaEdit", "LEMoE", "GRACE", "SERAC", "IBKE"]
    bounds = (0.0, 0.0, 400.0, 300.0)
    offsets = label_offsets(labels, places, bounds)
    boxes = [
        trade_off._box(label, x + dx, y + dy, trade_off.TEXT, side)
        for label, (x, y), (dx, dy, side) in zip(labels, places, offsets, strict=True)
    ]
    for i, box in enumerate(boxes):
        assert trade_off._outside(box, bounds) < 25
        assert all(trade_off._overlap(box, other) == 0 for other in boxes[:i])
        assert all(not (box[0] < x < box[2] and box[1] < y < box[3]) for x, y in places)


def test_figure_is_valid_svg_that_holds_each_label_and_comes_out_the_same():
    matplotlib = pytest.importorskip("matplotlib")
    text = trade_off_figure(many_cells())
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert 680 < float(root.get("width").removesuffix("pt")) * 96 / 72 < 710
    words = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "W/O",
        "FT",
        "ROME",
        "T-Patcher",
        "LEMoE (3 of 4)",
        "GRACE",
        "AlphaEdit",
        "SERAC",
        "MEND",
        "IBKE (ours)",
    } <= words
    assert {
        "Generality, in the top 5 (%)",
        "Locality, in the top 5 (%)",
        "direct editing (DE)",
        "edit training (ET)",
    } <= words
    assert sum(word.startswith("F1 ") for word in words) >= 2
    assert "<dc:date>" not in text
    assert "DOCTYPE" not in text
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        assert trade_off_figure(many_cells()) == text
        assert matplotlib.rcParams["font.size"] == 30
    page = Page(as_html(table_of(many_cells()), text))
    assert page.seen.count("svg") == 1
    assert page.links == []


@pytest.mark.parametrize(
    "pairs", [[(0.0, 0.0)], [(100.0, 100.0)], [(0.0, 100.0)], [(0.0, 100.0), (100.0, 0.0)], [(97.0, 98.0)] * 10]
)
def test_figure_of_extreme_scores(pairs):
    pytest.importorskip("matplotlib")
    cells = [a_cell(editor, scores=(90.0, *pair, 80.0)) for editor, pair in zip(EDITORS, pairs, strict=False)]
    text = trade_off_figure(cells)
    ET.fromstring(text)
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_missing_extra_names_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for need in (require_plots, lambda: trade_off_figure([a_cell()])):
        with pytest.raises(ImportError, match=r'pip install "ibke-hf\[plots\]"'):
            need()
