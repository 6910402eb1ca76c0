"""Records, arguments, editors and trainers of the tests that train; programs that tests start import it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibke_hf import IBKEEditor
from ibke_hf.core.records import EditCase, EditRecord, EditRequest, Hop
from ibke_hf.training.trainer import GradientEditorTrainer, IBKETrainer, IBKETrainingArguments, RecordDataset

SMALL = {"latent_dim": 8, "latent_length": 3}
CITIES = ("Paris", "Rome", "Berlin", "Oslo", "Vienna", "Madrid", "Lisbon", "Warsaw")
REQUIRED = {"backbone": "b", "records": ["r"], "out": "o"}  # settings without which there is no training


def fact(head: str, tail: str, prompt: str = "{} is in") -> Hop:
    return Hop(prompt.format(head), tail, head, "P1", tail)


def record(index: int, generality: int = 1, locality: int = 1, hops: int = 0) -> EditRecord:
    """One record with cases of several lengths; `hops` generality cases run through a second fact."""
    city, other = CITIES[index % 8], CITIES[(index + 3) % 8]
    edit = fact(f"{city} tower", f"{other} {index}")
    cases = [EditCase(f"Where is the {city} tower{'?' * i} It is in", f"{other} {index}") for i in range(generality)]
    second = Hop(f"{other} {index} lies in", "Poland" if index % 2 else "England", f"{other} {index}", "P2", "E")
    cases += [
        EditCase(f"The country of the {city} tower is", second.target, hops=2, supporting=(second,))
        for _ in range(hops)
    ]
    local = [
        EditCase(
            f"The capital of France {'and England ' * i}is",
            CITIES[i],
            top_k=1 if i else 5,
            facts=(fact("France", CITIES[i]),),
        )
        for i in range(locality)
    ]
    request = EditRequest(edit.prompt, edit.target)
    return EditRecord(f"r{index}", "test", "places", (request,), tuple(cases), tuple(local), (edit,))


def arguments(folder: Path | str, **options: Any) -> IBKETrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "calibration_requests": 6,
    }
    return IBKETrainingArguments(str(folder), **{**defaults, **options})


def new_editor(backbone: Any, seed: int = 1, kind: Any = IBKEEditor, **config: Any) -> Any:
    torch.manual_seed(seed)
    options = {**(SMALL if kind is IBKEEditor else {"hidden_dim": 8}), "initial_edit_ratio": 0.5, **config}
    return kind.for_backbone(backbone, [1, 2], **options)


@pytest.fixture
def trainer_for(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> Callable[..., GradientEditorTrainer]:
    """Build a trainer: ``trainer_for(records, family=, editor={}, kind=, validation=, callbacks=, **arguments)``."""

    def build(
        records: Sequence[EditRecord],
        *,
        folder: str = "run",
        family: str = "qwen3",
        editor: dict[str, Any] | None = None,
        kind: Any = IBKEEditor,
        validation: Sequence[EditRecord] | None = None,
        callbacks: Any = None,
        **options: Any,
    ) -> GradientEditorTrainer:
        backbone = tiny_model(family)
        trainer: Any = IBKETrainer if kind is IBKEEditor else GradientEditorTrainer
        return trainer(
            new_editor(backbone, kind=kind, **(editor or {})),
            backbone=backbone,
            args=arguments(tmp_path / folder, **options),
            processing_class=tiny_tokenizer,
            train_dataset=RecordDataset(records),
            eval_dataset=RecordDataset(validation) if validation else None,
            callbacks=callbacks,
        )

    return build


def weights(editor: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in editor.state_dict().items()}


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def naive_ids(tokenizer: Any, case: Any) -> tuple[list[int], int]:
    return tokenizer(f"{case.prompt} {case.target}")["input_ids"], len(tokenizer(case.prompt)["input_ids"])
