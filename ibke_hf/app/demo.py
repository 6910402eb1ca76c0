"""`ibke demo`: two edits of the embedded language model before and after, then a small comparison of editors."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..atlas import load_backbone, load_records, load_split
from ..atlas.report import SPLITS, atlas_editors, compare_editors
from ..core.records import EditRecord
from ..core.tokens import RequestError
from ..data.build import RecordBuilder
from ..data.uniedit import YES_NO, parse_record
from ..evaluation.inspection import answer
from ..evaluation.scores import REPORTED, exact_match
from ..io import write_json

EXAMPLES = {"counterfactual": "city_country", "unknown": "author_birth_country"}


def run_demo(*, json_file: str | Path | None = None, records: int = 100) -> dict[str, Any]:
    """Show the edits, time one, score the editors on the first records of each split; return what `--json` writes.

    Args:
        json_file: Written to, if given.
        records: Records of each split; 0 for all.
    """
    if records < 0:
        raise RequestError(f"--records must be at least 0, found {records}")
    started = time.monotonic()
    model, tokenizer = load_backbone()
    editors = atlas_editors()
    for kind, record in example_records(lambda prompt: answer(model, tokenizer, prompt)).items():
        show_example(kind, record, model, tokenizer, editors["ibke"])
    report: dict[str, Any] = measure_cost(model, tokenizer, editors["ibke"])
    print(
        f"one edit takes {report['edit_seconds'] * 1e3:.0f} ms, one plain forward of the same text "
        f"{report['forward_seconds'] * 1e3:.0f} ms; the saved edit has {report['edit_bytes'] / 1e3:.0f} kB\n"
    )
    sets = {split: load_records(split)[: records or None] for split in SPLITS}
    report["records"] = {split: len(chosen) for split, chosen in sets.items()}
    report["editors"] = compare_editors(editors, model, tokenizer, sets)
    for split in SPLITS:
        print_table(
            f"{split}: {report['records'][split]} records, percent",
            {name: report["editors"][name][split] for name in editors},
        )
    print(f"{time.monotonic() - started:.0f} s in total")
    if json_file:
        write_json(json_file, report, indent=2)
    return report


def example_records(ask: Callable[[str], str], generality: int = 6, locality: int = 4) -> dict[str, EditRecord]:
    """Build one counterfactual and one unknown-fact record with many cases, from subjects unseen in training.

    The unknown fact is one that the model, asked through `ask`, does not guess.
    """
    split = load_split()
    made = {}
    for kind, relation in EXAMPLES.items():
        builder = RecordBuilder(split.taught, split.world, seed=0, generality=generality, locality=locality)
        triples = (split.counterfactual if kind == "counterfactual" else split.unknown)["test"]
        triples = sorted(
            triples, key=lambda t: (t.relation != relation, -len(split.taught.by_object.get(t.subject, ())))
        )
        make = builder.counterfactual if kind == "counterfactual" else builder.unknown
        rich = (record for t in triples if (record := make(t)) is not None and len(record["generality"]) >= 4)
        chosen = next(record for record in rich if ask(record["edit"]["prompt"]) != record["edit"]["target"])
        made[kind] = parse_record(chosen, kind, relation, Counter())
    return {kind: record for kind, record in made.items() if record is not None}


def show_example(kind: str, record: EditRecord, model: Any, tokenizer: Any, editor: Any) -> None:
    """Print greedy answers before and after one edit, to the request, its consequences and its neighbours."""
    request = record.requests[0]
    edit = editor.edit(model, tokenizer, [request])
    print(
        f"{'a counterfactual edit' if kind == 'counterfactual' else 'an edit that states an unknown fact'}: "
        f"{request.prompt} -> {request.target}"
    )
    cases: list[tuple[str, str, tuple[str, ...]]] = [("edit", request.prompt, (request.target,))]
    cases += [("should follow", case.prompt, (case.target, *case.aliases)) for case in record.generality]
    cases += [("should stay", case.prompt, ()) for case in record.locality]
    for role, prompt, names in cases:
        before = answer(model, tokenizer, prompt)
        with edit.attached(model):
            after = answer(model, tokenizer, prompt)
        right = exact_match(after, names) if names else after == before
        print(f"  {'✓' if right else '✗'} {role:<14}{prompt.removesuffix(YES_NO)}\n{'':<18}{before} -> {after}")
    print()


def measure_cost(model: Any, tokenizer: Any, editor: Any, repeats: int = 9) -> dict[str, float]:
    """Median seconds of one edit and of one plain forward of the same text, and the bytes of the saved edit."""
    request = load_records("test")[0].requests[0]
    ids = tokenizer(f"{request.prompt} {request.target}", return_tensors="pt")["input_ids"].to(model.device)
    edit = editor.edit(model, tokenizer, [request])
    with tempfile.TemporaryDirectory() as folder:
        edit.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids)

    return {
        "edit_seconds": _median(lambda: editor.edit(model, tokenizer, [request]), repeats),
        "forward_seconds": _median(forward, repeats),
        "edit_bytes": size,
    }


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of each editor, then the top-5 and top-1 generality of each criterion."""
    print(title)
    print(f"  {'':<24}" + "".join(f"{name:>9}" for name in rows))
    for score in REPORTED:
        _print_row(score, [row[score] for row in rows.values()])
    for role in ("generality", "locality"):
        for criterion in dict.fromkeys(c for row in rows.values() for c in row["by_criterion"].get(role, {})):
            cells = [row["by_criterion"].get(role, {}).get(criterion, {}) for row in rows.values()]
            _print_row(f"{role[:3]} {criterion}", [cell.get("score") for cell in cells])
            if role == "generality":
                _print_row("    top 1", [cell.get("top1") for cell in cells])
    print()


def _print_row(name: str, values: list[float | None]) -> None:
    print(f"  {name:<24}" + "".join("        –" if value is None else f"{value:9.1f}" for value in values))


def _median(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
