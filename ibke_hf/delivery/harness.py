"""Tasks of lm-eval-harness on a model without an edit and with it; the tasks of this package are among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..core.edits import LowRankEdit
from ..loading import gguf_file

TASKS = Path(__file__).parent / "tasks" / "lm_eval"
BATCH = 8


def require_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ImportError: Says how to install it.
    """
    if find_spec("lm_eval") is None:
        raise ImportError('tasks are those of lm-eval-harness, which is not installed: pip install "lm-eval>=0.4.9"')


def task_drift(
    model: Any, tokenizer: Any, edit: Any, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, tuple[float, float]]:
    """Run tasks before and after, and return the scores by ``task/metric``.

    A low-rank edit of a model in a folder is given to the harness as a LoRA adapter (``peft=``); any other edit, and
    any other model, such as one out of a GGUF file, as the model at hand with the edit attached.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        edit: A single edit.
        tasks: Names, of this package (``ibke_common_facts``, ``ibke_edit_quality``) or of the harness.
        limit: Examples of each task, at most.

    Raises:
        ImportError: If the harness is not installed.
        ValueError: If there is no such task.
    """
    require_harness()
    name = str(getattr(model.config, "name_or_path", "") or "")
    plain = {"pretrained": name, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    in_folder = bool(name) and Path(name).is_dir() and gguf_file(name) is None  # an empty name would be this folder
    if isinstance(edit, LowRankEdit) and in_folder and find_spec("peft"):
        with TemporaryDirectory() as folder:
            edit.save_pretrained(folder)
            before = _run(plain, None, tasks, limit)
            after = _run({**plain, "peft": folder}, None, tasks, limit)
    else:
        before = _run(plain, (model, tokenizer, None), tasks, limit)
        after = _run(plain, (model, tokenizer, edit), tasks, limit)
    return {key: (before[key], after[key]) for key in before if key in after}


def _run(
    arguments: Mapping[str, str], loaded: tuple[Any, Any, Any] | None, tasks: Sequence[str], limit: int | None
) -> dict[str, float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"--tasks {unknown[0]}: lm-eval-harness has no such task; `lm-eval ls tasks` lists them")
    model, tokenizer, edit = loaded or (None, None, None)
    options: dict[str, Any] = {"tasks": list(tasks), "task_manager": manager, "limit": limit, "batch_size": BATCH}
    options |= {"bootstrap_iters": 0, "log_samples": False}
    if model is None:
        model_arguments = {key: value for key, value in arguments.items() if key != "device"}
        results: Any = lm_eval.simple_evaluate(
            model="hf", model_args=model_arguments, device=arguments["device"], **options
        )
    else:
        with nullcontext() if edit is None else edit.attached(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            results = lm_eval.simple_evaluate(model=wrapped, **options)
    scores = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric = key.partition(",")[0]
            if isinstance(value, (int, float)) and "," in key and not metric.endswith("_stderr"):
                scores[f"{task}/{metric}"] = float(value)
    return scores
