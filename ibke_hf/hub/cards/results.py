"""Results of `ibke eval` as cards and the Hub show them: a table, a model-index, and ``.eval_results``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ...evaluation.report.table_text import seconds_text
from ...evaluation.report.tabular import markdown_table
from ...evaluation.scores import ANSWERED, REPORTED, TITLES
from ...io import read_json, write_json, write_text
from .text import public_name

RESULTS, EVAL_RESULTS = "results.json", ".eval_results"


def read_results(results: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    """Return what ``results.json`` of `ibke eval` holds.

    Args:
        results: The folder, the file or what it holds; None stays None.

    Raises:
        ValueError: If it is something else; names the file.
    """
    if results is None:
        return None
    where, content = "results", results
    if not isinstance(results, Mapping):
        file = Path(results) / RESULTS if Path(results).is_dir() else Path(results)
        where = str(file)
        content = read_json(file, cure="evaluate again")
    parts = [content.get(name) for name in ("overall", "settings")] if isinstance(content, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            f"{where}: holds no `overall` and `settings`, as `ibke eval` writes them; give its --out folder"
        )
    return dict(content)  # type: ignore[arg-type]


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and, for a dataset of the Hub, ``.eval_results``, which the Hub's pages show."""
    write_json(folder / RESULTS, results)
    dataset = str(results["settings"].get("dataset"))
    if "/" not in public_name(dataset):
        return
    target = folder / EVAL_RESULTS / f"{dataset.rpartition('/')[2]}.yaml"
    target.parent.mkdir()
    write_text(target, eval_results_text({"": results}))


def eval_results_text(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return evaluations on a dataset of the Hub in the form of ``.eval_results/*.yaml``.

    Args:
        evaluations: What ``results.json`` of each holds, by what its tasks are called before the score, such as
            ``"test_"``.
    """
    entries = [
        EvalResultEntry(
            dataset_id=str(results["settings"]["dataset"]),
            task_id=f"{prefix}{name}",
            value=value,
            notes=_notes(results, name),
        )
        for prefix, results in evaluations.items()
        for name, value in _scores(results)
    ]
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _scores(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the scores that are there, as plain numbers: NumPy's would become Python objects in YAML."""
    values = [(name, results["overall"].get(name)) for name in (*REPORTED, *ANSWERED)]
    return [(name, round(float(value), 2)) for name, value in values if value is not None and math.isfinite(value)]


def model_index(results: Mapping[str, Any]) -> list[EvalResult]:
    """Return the scores as entries of a card's model-index."""
    dataset = _dataset_of(results)
    split = results["settings"].get("split")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in _scores(results)
    ]


def _dataset_of(results: Mapping[str, Any]) -> str:
    """Return the dataset's name; of a path, its last part."""
    name = str(results["settings"].get("dataset") or "records")
    return public_name(name) or Path(name).name


def _notes(results: Mapping[str, Any], score: str = "") -> str:
    settings = results["settings"]
    number, mode = settings.get("sequential", 1), settings.get("mode", "sequential")
    carried = "one edit at a time" if number == 1 else f"{number} edits at once, {mode}"
    place = "in a chat" if settings.get("chat") else "of plain text"
    how = f"free generation {place}" if score in ANSWERED else "teacher-forced"
    return (
        f"{results.get('records', '?')} records, {carried}, {'greedy generation' if score == 'exact_match' else how}"
    )


def results_table(results: Mapping[str, Any]) -> list[str]:
    """Return what a card says of its results, and their Markdown table, as paragraphs."""
    table = markdown_table(["score", "percent"], [[TITLES[name], f"{value:.1f}"] for name, value in _scores(results)])
    about = f"{_dataset_of(results)}: {_notes(results)}; exact match is of greedy generation."
    if any(results["overall"].get(name) is not None for name in ANSWERED):
        place = "in a chat" if results["settings"].get("chat") else "of plain text"
        about += f" Free answers are the model's own continuation {place}, without the target or its length."
    if results.get("edit_seconds") is not None:
        alone, at_once = (seconds_text(results.get(name)) for name in ("edit_seconds_alone", "edit_seconds"))
        about += f" One edit took {alone} alone, and {at_once} of its batch where many were made at once."
    return [f"{about} By criterion and hop count in `{RESULTS}`.", table]
