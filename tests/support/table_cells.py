"""Cells for tests of the table and its plot: the paper's rows, and a larger made-up set with unfinished runs."""

from __future__ import annotations

from html.parser import HTMLParser

from ibke_hf.evaluation.report.table import EDITORS
from ibke_hf.evaluation.scores import f1

NASTY = '</title><script>alert(1)</script>|*bold*_[x](y)& "q" \' 日本'
GPT2_XL = {  # rows of the paper's Table II: reliability, generality, locality, average
    "uniedit": {
        "none": (20.32, 27.53, 100.0, 49.28),
        "ft": (99.10, 60.43, 89.68, 83.07),
        "rome": (96.76, 58.16, 96.76, 83.90),
        "grace": (99.64, 46.58, 98.75, 81.66),
        "ibke": (97.80, 96.89, 97.48, 97.39),
    },
    "mquake": {
        "none": (32.42, 25.10, None, 28.76),
        "ft": (99.80, 44.08, None, 71.94),
        "rome": (89.61, 22.90, None, 56.26),
        "grace": (99.95, 24.99, None, 62.47),
        "ibke": (97.34, 56.09, None, 76.72),
    },
    "zsre": {
        "none": (19.26, 27.41, 100.0, 48.89),
        "ft": (99.47, 96.75, 97.89, 98.04),
        "rome": (99.58, 85.49, 99.14, 94.74),
        "grace": (99.11, 27.52, 99.80, 75.48),
        "ibke": (95.79, 97.69, 96.36, 96.61),
    },
}


def a_cell(editor="ibke", split="test", scores=(90.0, 80.0, 70.0, 80.0), **other):
    reliability, generality, locality, average = scores
    cell = {
        "editor": editor,
        "split": split,
        "edits": "all",
        "seed": 0,
        "records": 40,
        "reliability": reliability,
        "generality": generality,
        "locality": locality,
        "avg": average,
        "f1": f1(generality, locality),
        "generality_top1": 50.0,
        "locality_top1": None if locality is None else 60.0,
        "exact_match": 25.0,
        "edit_seconds": None if editor == "none" else 0.25,
        "edit_bytes": None if editor == "none" else 2048,
    }
    return cell | other


def paper_cells():
    return [a_cell(editor, split, row) for split, rows in GPT2_XL.items() for editor, row in rows.items()]


def many_cells():
    """Five column groups, three seeds, some runs unfinished."""
    groups = [
        {"edits": "counterfactual"},
        {"edits": "unknown"},
        {"split": "held_out"},
        {"sequential": 10},
        {"split": NASTY},
    ]
    cells = []
    for i, editor in enumerate(EDITORS):
        for j, group in enumerate(groups):
            for seed in range(3):
                if (editor, j) in {("serac", 3), ("lemoe", 4)} or (editor, j, seed) == ("mend", 1, 2):
                    continue
                local = 100.0 if editor == "none" else 99.0 - 3 * i + seed
                row = (95.0 - j, 30.0 + 6 * i + seed, local, (125.0 - j + 6 * i + seed + local) / 3)
                cells.append(a_cell(editor, scores=row, seed=seed) | group)
    return cells


class Page(HTMLParser):
    """Tables as lists of rows of texts, tags balanced, addresses collected."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.seen, self.open, self.classes = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.classes.append(dict(attributes).get("class", ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
