"""What a training reached, in plain words: the model before and after, and the command to try next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ..core.records import EditRecord
from ..evaluation.protocol import evaluate_records

RECORDS = 64  # validation records that the model is asked before and after
SCORES = {
    "reliability": "the edit itself (reliability)",
    "generality": "asked otherwise (generality)",
    "locality": "unrelated facts stay (locality)",
}
RELIABLE, LOCAL, GAINED = 80.0, 80.0, 10.0  # percent, from where an editor is called usable


def before_and_after(
    editor: Any, backbone: Any, tokenizer: Any, records: Sequence[EditRecord], number: int = RECORDS
) -> dict[str, dict[str, float | None]]:
    """Score the unedited model and the edited one, a record at a time, on up to `number` records spread over all.

    Returns:
        ``before`` and ``after``, each with the scores of `SCORES` in percent.
    """
    chosen, scores = spread(records, number), {}
    for name, one in (("before", None), ("after", editor)):
        summary = evaluate_records(one, backbone, tokenizer, chosen, generate=False, progress=False).summary
        scores[name] = {score: summary[score] for score in SCORES}
    return scores


def spread(records: Sequence[EditRecord], number: int) -> list[EditRecord]:
    """Return up to `number` records spread evenly over all."""
    return [records[i] for i in range(0, len(records), -(-len(records) // number))]


def prompt_flags(settings: Any) -> list[str]:
    """Return the flags of the commands that put prompts as a training did.

    Args:
        settings: Whatever has ``chat``, ``chat_options`` and ``leading_space``.
    """
    flags = ["--chat"] if settings.chat else []
    flags += ["--chat-options", json.dumps(settings.chat_options)] if settings.chat_options else []
    return [*flags, *(["--leading-space", settings.leading_space] if settings.leading_space else [])]


def in_words(report: Mapping[str, Any], settings: Any) -> str:
    """Return what `ibke train` prints at its end.

    Args:
        report: What :func:`~ibke_hf.training.recipe.train_editor` returns.
        settings: The :class:`~ibke_hf.training.settings.TrainingSettings` that it was called with.
    """
    left_out = report.get("records_left_out", 0)
    lines = [
        f"trained for {report['steps']} steps, loss {report['train_loss']:.4g}"
        + (f"; {left_out} unusable records were left out" if left_out else "")
    ]
    if "before" in report:
        rows = [
            (words, _percent(report["before"][name]), _percent(report["after"][name]))
            for name, words in SCORES.items()
        ]
        head = ("validation records, % of target tokens", "before", "after")
        lines += ["", tabulate(rows, head, disable_numparse=True, colalign=("left", "right", "right")), ""]
        lines += [verdict(report["before"], report["after"])]
    else:
        lines += ["without validation records (--validation) nothing is known of what its edits are worth"]
    if report.get("step_sizes"):
        lines += ["", _tried(report["step_sizes"])]
    model, out = shlex.quote(settings.backbone), shlex.quote(settings.out)
    asked = shlex.join(["", *prompt_flags(settings)]).removeprefix("''")
    lines += ["", f"saved to {settings.out}; try it, and measure it on records that it has not seen:"]
    lines += [
        f'  ibke edit --model {model} --editor {out} --prompt "The capital of Australia is" --target "Sydney"{asked}'
    ]
    dataset = shlex.quote((settings.validation or ["FILE"])[0])
    lines += [f"  ibke eval --model {model} --editor {out} --dataset {dataset} --out results{asked}"]
    return "\n".join(lines)


def _tried(trials: Sequence[Mapping[str, float]]) -> str:
    """Say which step size, or threshold, was chosen among which."""
    chosen = trials[-1]
    name = "threshold" if "threshold" in chosen else "factor"
    what = "threshold" if name == "threshold" else "step size, times what training gave it"
    rows = [
        [trial[name], *(_percent(trial[score]) for score in (*SCORES, "avg")), "chosen" * (trial == chosen)]
        for trial in trials[:-1]
    ]
    head = (what, *SCORES, "Avg", "")
    return str(tabulate(rows, head, disable_numparse=True, colalign=("left", *["right"] * 4, "left")))


def verdict(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> str:
    """Say in one sentence whether an editor is any good yet, and what to do if it is not."""
    reliability, locality = after["reliability"] or 0.0, after["locality"]
    gained = None if after["generality"] is None else after["generality"] - (before["generality"] or 0.0)
    if reliability < RELIABLE:
        return (
            f"not good yet: {reliability:.0f} of 100 target tokens of its own edits come out; train longer "
            "(--resume with more --max-steps), or on more records"
        )
    if locality is not None and locality < LOCAL:
        return (
            f"not good yet: its edits change {100 - locality:.0f} of 100 answers that should stay; train longer, or "
            "with a smaller initial_edit_ratio"
        )
    if gained is not None and gained < GAINED:
        return (
            "not good yet: its edits are learnt by heart and hardly carry over to other words; train longer, or on "
            "records with more generality cases"
        )
    return "good enough to try: its edits take, carry over to other words and leave the rest alone"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
