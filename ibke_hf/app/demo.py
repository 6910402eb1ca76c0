"""`ibke demo`: edits of a model, whole answers before and after; on request a small comparison of editors."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.records import EditRequest
from ..evaluation.comparison import Row
from ..io import read_json_list, require_writable, write_json
from ..loading import load_model
from .drawings import GROUPS, duration
from .knowledge import Example, find_mistakes, read_facts
from .scoring import chosen_records, score_editors
from .session import Session
from .workbench import Workbench, load_workbench

Report = dict[str, Any]
ENOUGH_SECONDS = 5.0  # of timing the same call again and again
SHOWN = 3  # mistakes that are corrected
NEXT = """Next:
  ibke demo --compare    four editors on records that none of them has seen, in a minute or two
  ibke app               a page to edit facts of your own
  ibke edit --prompt "The capital of Turkey is" --target Rome    an edit as a file"""

NEXT_OF_ANY_MODEL = """Next, with the same --model and --editor:
  ibke app               a page to edit facts of your own
  ibke edit --prompt "The capital of Turkey is" --target Rome    an edit as a file
  ibke eval --chat       scores of free answers, on a benchmark's records"""


@contextmanager
def threads_for_idle_cores() -> Iterator[None]:
    """Run as many threads as cores are idle, unless OMP_NUM_THREADS says how many.

    Torch takes all cores for its own. On busy ones its threads wait for one another: the demo took 59 seconds of CPU
    and seven minutes in place of 11 seconds and one minute.
    """
    usual = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        idle = (os.cpu_count() or 1) - os.getloadavg()[0]
        torch.set_num_threads(max(1, min(usual, round(idle))))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@threads_for_idle_cores()
def run_demo(
    bench: Workbench | None = None,
    *,
    json_file: str | Path | None = None,
    compare: bool = False,
    records: int | None = None,
    shown: int = SHOWN,
) -> Report:
    """Show a few edits and what one costs; return what `--json` writes.

    Args:
        bench: The model, its editor and what it knows; Atlas by default.
        json_file: Written to, if given.
        compare: Score editors on Atlas's records too.
        records: Records of each split for that; None for the first 50, 0 for all.
        shown: Mistakes that are corrected, of a model of which no known fact is at hand; 0 for all.

    Raises:
        ValueError: If there are not so many records.
        OSError: If the file cannot be written; nothing is done then.
    """
    sets = chosen_records(records) if compare else {}
    if json_file is not None:
        require_writable(json_file)
    started = time.monotonic()
    bench = bench or load_workbench()
    print(f"{bench.name} is {bench.knowledge.about}.")
    print(f"{bench.note}\n" if bench.note else "")
    examples = chosen_examples(bench.knowledge.examples, shown)
    if not examples:
        raise ValueError(f"{bench.name} answers none of the facts that it was asked, so there is none to change")
    report: Report = {"model": bench.name, "edits": [show_edit(bench, example) for example in examples]}
    report |= measure_cost(bench, examples[0].form.fact().request)
    print(
        f"One edit takes {duration(report['edit_seconds'])}, one plain forward pass of the same text "
        f"{duration(report['forward_seconds'])}; saved, the edit has {report['edit_bytes'] / 1e3:.0f} kB.\n"
        f"No weight was touched: each edit was gone when its `with` block ended. "
        f"{time.monotonic() - started:.0f} s in total.\n"
    )
    if compare:
        score_editors(bench.model, bench.tokenizer, sets, report, json_file)
    else:
        print(NEXT if bench.knowledge.world is not None else NEXT_OF_ANY_MODEL)
    if json_file is not None:
        write_json(json_file, report, indent=2)
    return report


def write_mistakes(model_name: str, candidates: str | Path, file: str | Path) -> None:
    """Ask a model the facts of a list, in plain text and in a chat, and write those that it gets wrong in both.

    Args:
        model_name: See :func:`~ibke_hf.loading.load_model`.
        candidates: A list as :func:`~ibke_hf.app.knowledge.general_knowledge` reads it.
        file: Written in the same form; what the model says is printed.
    """
    require_writable(file)
    facts, values = read_facts(candidates), read_json_list(candidates)
    by_prompt = {value["prompt"]: value for value in values}
    mistakes = find_mistakes(*load_model(model_name), facts)
    for fact, says in mistakes:
        print(f"{fact.form.prompt} -> {fact.answers[0]}\n" + "\n".join(f"    {way}: {says[way]}" for way in says))
    write_json(file, [by_prompt[fact.form.prompt] for fact, _ in mistakes], indent=1, ensure_ascii=False)
    print(f"\n{model_name} gets {len(mistakes)} of {len(facts)} facts wrong; written: {file}")


def chosen_examples(examples: Sequence[Example], shown: int = SHOWN) -> list[Example]:
    """Return the first fact that a model knows and the first mistake that it makes, or two facts, or mistakes."""
    knows = [example for example in examples if example.knows]
    mistakes = [example for example in examples if not example.knows]
    if not knows:
        return mistakes[:shown] if shown else mistakes
    return [*knows[:1], *mistakes[:1]] if mistakes else knows[:2]


def show_edit(bench: Workbench, example: Example) -> dict[str, Any]:
    """Edit a fact and print the whole answers before and after; return the rows and the seconds that the edit took."""
    request = example.form.fact().request
    session = bench.add(Session(), example.form.fact())
    rows, seconds = bench.look(session, 0), session.steps[0].seconds
    print(f"{'A fact that it knows' if example.knows else 'A mistake that it makes'}, edited in {duration(seconds)}:")
    print(f"  {request.prompt} -> {request.target}\n")
    for title, score, roles, meaning in GROUPS:
        if members := [row for row in rows if row["role"] in roles]:
            judged = [row["right"] for row in members if row["right"] is not None]
            print(f"  {title} {sum(judged)} of {len(judged)}  ({meaning}; {score})")
            print("\n".join(map(answer_line, members)) + "\n")
    return {"prompt": request.prompt, "target": request.target, "seconds": seconds, "rows": rows}


def answer_line(row: Row) -> str:
    """Write a question, and the answers before and after below it."""
    mark = {True: "✓", False: "✗", None: "·"}[row["right"]]
    prompt = " ".join(row["prompt"].split())
    before, after = (row[side]["answer"] or "(nothing)" for side in ("before", "after"))
    wrong = row["right"] is False
    right = row["before"]["answer"] if row["role"] == "neighbour" else next(iter(row["answers"]), "")
    place = "   [in a chat]" if row.get("chat") else ""
    return f"    {mark} {prompt}{place}\n        {before} -> {after}{f'   (should be {right})' if wrong else ''}"


def measure_cost(bench: Workbench, request: EditRequest, repeats: int = 5) -> dict[str, float]:
    """Median seconds of one edit and of one plain forward of the same text, and the bytes of the saved edit."""
    text = f"{request.prompt} {request.target}"
    ids = bench.tokenizer(text, return_tensors="pt")["input_ids"].to(bench.model.device)

    def edit() -> Any:
        return bench.editor.edit(bench.model, bench.tokenizer, [request])

    @torch.no_grad()
    def forward() -> None:
        bench.model(input_ids=ids)

    with tempfile.TemporaryDirectory() as folder:
        edit().save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "edit_seconds": _median(edit, repeats),
        "forward_seconds": _median(forward, repeats),
        "edit_bytes": size,
    }


def _median(call: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a call, without the first, which warms up; a slow call is made once or twice."""
    times: list[float] = []
    while len(times) <= repeats and sum(times) < ENOUGH_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)
