"""`ibke atlas report`: the committed results of all four editors, and the table that the README quotes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.records import EditRecord
from ..editors.catalogue import KINDS, OF_ATLAS, set_composition
from ..evaluation.editing import clock, edit_alone
from ..evaluation.protocol import evaluate_records
from ..evaluation.report import tabular
from ..evaluation.report.table import METRICS
from ..evaluation.scores import REPORTED
from ..io import write_json
from . import load_backbone, load_editor, load_records, load_rival, load_split
from .near import near_records

SPLITS = ("test", "held_out")
NAMES = ("none", "ft", "mend", "ibke")
TITLES = {name: KINDS[name].title for name in NAMES}


def atlas_editors() -> dict[str, Any]:
    """Return the editors that Atlas is compared with, by name; None is the unedited model."""
    trained = {name: load_editor(name) for name in OF_ATLAS}
    for editor in trained.values():
        set_composition(editor, "sum")  # of supporting hops, as in the paper's table
    return {"none": None, "ft": load_rival("ft"), "mend": trained["mend"], "ibke": trained["ibke"]}


def compare_editors(
    editors: dict[str, Any], model: Any, tokenizer: Any, records: dict[str, list[Any]]
) -> dict[str, Any]:
    """Score every editor on every set of records by PROTOCOL's procedure, in percent."""
    report: dict[str, Any] = {}
    for name, editor in editors.items():
        for split, chosen in records.items():
            summary = evaluate_records(editor, model, tokenizer, chosen, batch_size=100).summary
            report.setdefault(name, {})[split] = scores_of(summary)
    return report


def scores_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report keeps of the summary of an evaluation."""
    return {score: summary[score] for score in (*REPORTED, "by_criterion", "by_hops")}


def keep_near(editors: dict[str, Any], model: Any, tokenizer: Any, records: list[EditRecord]) -> dict[str, Any]:
    """Return how many of the nearest subjects keep their answer under each editor, in percent."""
    near = near_records(load_split(), records)
    report: dict[str, Any] = {
        "records": len(near),
        "cases": sum(len(record.locality) for record in near),
        "editors": {},
    }
    for name, editor in editors.items():
        summary = evaluate_records(editor, model, tokenizer, near, batch_size=100, generate=False).summary
        report["editors"][name] = {score: summary[score] for score in ("locality", "locality_top1")}
    return report


def edit_times(
    editors: dict[str, Any], model: Any, tokenizer: Any, records: list[EditRecord]
) -> dict[str, dict[str, float | None]]:
    """Return the seconds of one edit by editor: ``alone``, and its share of a batch made ``at_once``."""
    times: dict[str, dict[str, float | None]] = {}
    for name, editor in editors.items():
        if editor is None:
            continue
        requests = [record.requests[0] for record in records[:100]]
        alone, _ = edit_alone(editor, model, tokenizer, requests)
        started = clock()
        editor.edit(model, tokenizer, requests, mode="independent")
        times[name] = {"alone": alone, "at_once": (clock() - started) / len(requests)}
    return times


def write_report(out: str | Path) -> dict[str, Any]:
    """Score the committed weights on all test and held-out records; write ``results.json``."""
    model, tokenizer = load_backbone()
    records = {split: load_records(split) for split in SPLITS}
    editors = atlas_editors()
    results = {
        "records": {split: len(chosen) for split, chosen in records.items()},
        "editors": compare_editors(editors, model, tokenizer, records),
        "times": edit_times(editors, model, tokenizer, records["test"]),
        "near": keep_near(editors, model, tokenizer, records["test"]),
    }
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "results.json", results)
    return results


def markdown_table(results: dict[str, Any]) -> str:
    """Return the overall scores of a report as a Markdown table."""
    rows = [
        [TITLES.get(name, name), split, *(f"{results['editors'][name][split][score]:.1f}" for score in REPORTED)]
        for split in SPLITS
        for name in NAMES
    ]
    return tabular.markdown_table(["Editor", "Records", *(METRICS[score] for score in REPORTED)], rows, left=2)
