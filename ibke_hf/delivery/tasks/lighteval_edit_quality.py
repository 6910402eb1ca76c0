"""Tasks of edit quality for LightEval: ``lighteval accelerate MODEL "ibke:reliability|0" --custom-tasks FILE``.

LightEval loads this file by its path; its data sets are folders, which are written for it out of the file of facts.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

from ibke_hf.delivery.tasks.questions import ROLES, TOKENS, questions, said


class Said(SampleLevelComputation):  # type: ignore[misc]
    """Whether a model says an accepted answer."""

    def compute(self, doc: Doc, model_response: ModelResponse, **_: Any) -> float:
        """Judge the first generated text of a question."""
        text = str(model_response.final_text[0]).splitlines()
        return float(said({"prompt": doc.query, "answers": doc.choices}, text[0] if text else ""))


SAID = SampleLevelMetric(
    metric_name="said",
    sample_level_fn=Said(),
    category=SamplingMethod.GENERATIVE,
    corpus_level_fn=np.mean,
    higher_is_better=True,
)


def question(line: dict[str, Any], task_name: str = "") -> Doc:
    """Return a row as LightEval asks it: the prompt, with all accepted answers as gold."""
    answers = list(line["answers"])
    return Doc(task_name=task_name, query=line["prompt"], choices=answers, gold_index=list(range(len(answers))))


def _written() -> Path:
    """Write the questions as data sets in a folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="ibke-lighteval-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for kind in ROLES:
        (folder / kind).mkdir()
        lines = [json.dumps(row, ensure_ascii=False) for row in questions(kind)]
        (folder / kind / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


_FOLDER = _written()
TASKS_TABLE = [
    LightevalTaskConfig(
        name=f"ibke:{kind}",
        prompt_function=question,
        hf_repo=str(_FOLDER / kind),
        hf_subset="default",
        metrics=[SAID],
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=TOKENS,
        stop_sequence=["\n"],
        version=1,
    )
    for kind in ROLES
]
