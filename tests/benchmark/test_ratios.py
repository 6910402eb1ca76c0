"""`ibke bench`: what is measured is the same mathematics on both sides, and ours does not grow with the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ibke_hf.benchmark import edit_cost, memory_use, training_cost
from ibke_hf.benchmark.ratios import Ratio, in_turns, table
from ibke_hf.benchmark.subject import Subject, new_subject, random_backbone
from ibke_hf.cli import build_parser, main
from ibke_hf.training.speed import run_step

FACTS = [
    ("The capital of France is", "Rome", "The capital city of France is", "The author of the book is", "Marie Curie"),
    ("An oak is", "a bird", "An oak tree is", "The capital of Poland is", "Warsaw"),
    ("London lies in", "Poland", "London is a city in", "A sparrow is", "a bird"),
]


@pytest.fixture
def subject(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Subject:
    fields = {"latent_dim": 16, "latent_length": 3, "use_information_bottleneck": False}
    return new_subject(tiny_model(), tiny_tokenizer, FACTS, "tiny", layers=[1, 2], editor_fields=fields)


class Counted(TorchDispatchMode):
    """Counts the operations that run, by name, and the floating-point operations of their products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[str(func.overloadpacket)] += 1
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(run: Callable[[], Any]) -> Counted:
    with Counted() as counter:
        run()
    return counter


# --- the command --------------------------------------------------------------------------------------------------


def test_the_list_and_its_page_say_what_was_measured_and_how(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--latent-dim", "16", "--runs", "1", "--rows", "3"]
    expected = {
        "edit": ["edit_b1", "edit_b8"],
        "train": ["train_vs_naive", "train_vs_floor", "train_vs_naive_kept"],
        "attach": ["attached_forward"],
        "mixed": ["mixed_3", "mixed_3_vs_peft", "mixed_3_layers_vs_peft"],
        "memory": ["edit_memory", "edit_memory_b8", "edit_memory_sequential"],
    }
    for what, names in expected.items():
        file = tmp_path / f"{what}.json"
        assert main(["bench", what, *words, "--json", str(file)]) == 0
        rows = json.loads(file.read_text())
        assert [row["name"] for row in rows][: len(names)] == names
        for row in rows:
            assert list(row) == ["name", "shape", "ours", "reference", "unit", "ratio"]
            assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["reference"])
            assert row["unit"] == ("bytes" if what == "memory" else "CPU s")
        page = file.with_suffix(".md").read_text()
        assert "cores" in page and f"torch {torch.__version__}" in page
        command = next(line for line in page.splitlines() if line.startswith("ibke bench"))
        assert build_parser().parse_args(command.split()[1:]).what == what
        assert names[0] in capsys.readouterr().out


def test_without_the_model_there_are_random_weights_of_its_shape() -> None:
    with torch.device("meta"):
        model = random_backbone("smollm2")
    assert model.num_parameters() == 134_515_008
    with pytest.raises(ValueError, match="no shape is known by this name"):
        random_backbone("nothing")


def test_runs_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    medians = in_turns({"one": lambda: order.append("one"), "two": lambda: order.append("two")}, 2)
    assert order == ["one", "two", "one", "two", "two", "one"]
    assert medians.keys() == {"one", "two"}
    assert "≤ 1.10" in table([Ratio("edit_b1", "8", 1.0, 2.0, "CPU s")])


# --- both sides do the same ---------------------------------------------------------------------------------------


def test_the_reference_of_an_edit_computes_its_gradients(subject: Subject) -> None:
    gradients = edit_cost.plain_gradients(subject, subject.batch(3))
    captured = subject.editor.capture(subject.model, subject.batch(3))
    for gradient, factors in zip(gradients, captured, strict=True):
        torch.testing.assert_close(gradient * factors.mask.unsqueeze(-1), factors.output_gradients)


def test_a_naive_step_has_the_loss_of_ours(subject: Subject, tmp_path: Path) -> None:
    records = list(subject.records)
    trainer = training_cost.new_trainer(subject, records, str(tmp_path))
    trainer.optimizer = torch.optim.SGD(subject.editor.parameters(), lr=0.0)
    batch = trainer.data_collator(records)
    ours = run_step(trainer, batch, None)
    torch.testing.assert_close(training_cost.naive_step(subject, trainer, records), ours, rtol=1e-4, atol=1e-5)


def test_peft_gives_the_logits_of_the_same_edits(subject: Subject) -> None:
    edit = edit_cost.mixed_edit(subject, 5)
    with edit_cost.peft_copy(subject.model, edit) as (wrapped, names):
        theirs = edit_cost.peft_forward(wrapped, names, subject.batch(5))
    with edit.attached(subject.model):
        ours = edit_cost.forward(subject.model, subject.batch(5))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, edit_cost.forward(subject.model, subject.batch(5)), atol=1e-3)


# --- what ours costs ----------------------------------------------------------------------------------------------


def test_a_mixed_batch_runs_as_many_operations_whatever_its_rows(subject: Subject) -> None:
    def calls(rows: int) -> Counter[str]:
        edit, run = edit_cost.mixed_edit(subject, rows), partial(edit_cost.forward, subject.model, subject.batch(rows))
        return counted(partial(edit_cost.attached, edit, subject.model, run)).calls

    assert calls(4) == calls(16)


def test_an_edit_costs_no_operation_of_the_backbone_beside_its_passes(subject: Subject) -> None:
    requests = subject.requests(3)
    factors = subject.editor.capture(subject.model, subject.batch(3))
    adapting = counted(lambda: subject.editor(factors, with_variance=False)).flops
    passes = counted(lambda: edit_cost.plain_gradients(subject, subject.batch(3))).flops
    ours = counted(lambda: subject.editor.edit(subject.model, subject.tokenizer, requests, mode="independent")).flops
    assert 0 < ours <= passes + adapting


def test_an_edit_keeps_no_more_alive_than_its_factors_and_keys(subject: Subject) -> None:
    ratios = {ratio.name: ratio.ratio for ratio in memory_use.memory_ratios(subject)}
    assert {name for name, ratio in ratios.items() if name.startswith("edit_") and ratio <= 1.1} == {
        "edit_memory",
        "edit_memory_b8",
        "edit_memory_sequential",
    }


def test_the_peak_of_what_is_allocated_counts_what_is_freed() -> None:
    x = torch.ones(1000)

    def run() -> None:
        for _ in range(3):
            (x + 1).sum()

    assert 4000 <= memory_use.peak_bytes(run, torch.device("cpu")) < 8000
