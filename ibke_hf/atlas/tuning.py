"""`ibke atlas tune-ft`: the learning rate of the fine-tuning baseline, chosen on the validation records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..editors.ft import FineTuningEditor
from ..evaluation.protocol import evaluate_records
from . import load_backbone, load_records
from .training import LAYERS

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_RECORDS = 100


def tune_ft(out: str | Path) -> dict[str, Any]:
    """Try each learning rate on the first validation records; keep the one with the best Avg, and all trials."""
    model, tokenizer = load_backbone()
    records = load_records("validation")[:TUNING_RECORDS]
    trials = []
    for rate in tqdm(LEARNING_RATES, unit="trial"):
        editor = FineTuningEditor.for_backbone(model, LAYERS, learning_rate=rate)
        summary = evaluate_records(editor, model, tokenizer, records, batch_size=50, progress=False, generate=False).summary
        trials.append({"learning_rate": rate, **{name: summary[name] for name in ("reliability", "generality", "locality", "avg")}})
    best = max(trials, key=lambda trial: trial["avg"])
    chosen = {"edited_modules": editor.config.edited_modules, "edited_layers": LAYERS, "learning_rate": best["learning_rate"]}
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    (target / "ft.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    (target / "ft_trials.json").write_text(json.dumps({"records": len(records), "trials": trials}, indent=2) + "\n", encoding="utf-8")
    return {**chosen, "trials": trials}
