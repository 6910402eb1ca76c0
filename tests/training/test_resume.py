"""Training that was interrupted, and training in several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from training_runs import assert_equal_weights, record, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from ibke_hf import IBKEEditor
from ibke_hf.training.checkpoints import last_complete_checkpoint


class StopAt(TrainerCallback):
    """Ends the process's work after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resume_equals_an_uninterrupted_run_bitwise(trainer_for: Any) -> None:
    records = [record(i, hops=i % 2) for i in range(7)]
    options = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "validation": records,
        "load_best_model_at_end": True,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    whole = trainer_for(records, folder="whole", callbacks=[EarlyStoppingCallback(100)], **options)
    whole.train()
    cut = trainer_for(records, folder="cut", callbacks=[EarlyStoppingCallback(100), StopAt(5)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    half = Path(cut.args.output_dir) / "checkpoint-6"  # as a run killed while it saved leaves it
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(cut.args.output_dir) == str(half.with_name("checkpoint-3"))
    resumed = trainer_for(records, folder="cut", editor={}, callbacks=[EarlyStoppingCallback(100)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(whole.model), weights(resumed.model))
    assert_equal_weights(
        *(weights(IBKEEditor.from_pretrained(f"{t.args.output_dir}/checkpoint-9")) for t in (whole, resumed))
    )
    for name in ("best_metric", "best_global_step"):
        assert getattr(whole.state, name) == getattr(resumed.state, name)
    states = [
        json.loads(Path(t.args.output_dir, "checkpoint-9/trainer_state.json").read_text()) for t in (whole, resumed)
    ]
    assert (
        states[0]["stateful_callbacks"]["EarlyStoppingCallback"]
        == states[1]["stateful_callbacks"]["EarlyStoppingCallback"]
    )
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e][-3:] for t in (whole, resumed)]
    assert losses[0] == losses[1]


class StopRequest(TrainerCallback):
    """Asks a trainer to stop at the beginning of a step, or in an evaluation, as a signal would."""

    def __init__(self, step: int, event: str = "step") -> None:
        self.step, self.event, self.trainer = step, event, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "step" and state.global_step == self.step:
            self.trainer.request_stop()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "evaluation" and state.global_step == self.step:
            self.trainer.request_stop()


@pytest.mark.parametrize(("event", "asked", "saved"), [("step", 4, 5), ("evaluation", 3, 3)])
def test_a_run_that_is_told_to_stop_saves_and_resumes_bitwise(
    event: str, asked: int, saved: int, trainer_for: Any
) -> None:
    records = [record(i, hops=i % 2) for i in range(7)]
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 100, "validation": records}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "cosine"}
    whole = trainer_for(records, folder="whole", **options)
    whole.train()
    assert not whole.stopped
    stop = StopRequest(asked, event)
    cut = trainer_for(records, folder="cut", callbacks=[stop], **options)
    stop.trainer = cut
    cut.train()
    assert cut.stopped and cut.state.global_step == saved
    assert last_complete_checkpoint(cut.args.output_dir) == f"{cut.args.output_dir}/checkpoint-{saved}"
    resumed = trainer_for(records, folder="cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.stopped and resumed.state.global_step == 8
    assert_equal_weights(weights(whole.model), weights(resumed.model))
    assert resumed.model.config.trained_edits_per_group == 2


def test_resume_without_a_checkpoint_says_so(trainer_for: Any) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*start from the beginning"):
        trainer_for([record(0)]).train(resume_from_checkpoint=True)


def test_early_stopping_keeps_the_best_checkpoint(trainer_for: Any) -> None:
    records = [record(i) for i in range(4)]
    trainer = trainer_for(
        records,
        validation=[record(5), record(6)],
        max_steps=60,
        learning_rate=0.3,
        callbacks=[EarlyStoppingCallback(2)],
        save_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) < 60
    assert losses.index(min(losses)) == len(losses) - 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


# --- other processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., list[str]]:
    """Write a training program to disk; ``worker(options)`` returns its command, which takes the run's folder."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")

    def write(options: dict[str, Any], editor: dict[str, Any], records: int, after: str = "") -> list[str]:
        program = tmp_path / "program.py"
        program.write_text(
            f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import hashlib, json, torch
import training_runs as t
from transformers import AutoModelForCausalLM, AutoTokenizer
backbone = AutoModelForCausalLM.from_pretrained({str(tmp_path / "backbone")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "backbone")!r})
arguments = t.arguments(sys.argv[1], **json.loads({json.dumps(options)!r}))
records = [t.record(i, 1 + i % 3, (0, 2, 1, 1)[i % 4], i % 2) for i in range({records})]
trainer = t.IBKETrainer(t.new_editor(backbone, **json.loads({json.dumps(editor)!r})), backbone=backbone,
                        args=arguments, processing_class=tokenizer,
                        train_dataset=t.RecordDataset(records), eval_dataset=t.RecordDataset(records[:5]))
trainer.train(resume_from_checkpoint="resume" in sys.argv)
{after}
"""
        )
        return [sys.executable, str(program)]

    return write


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(worker: Any, tmp_path: Path) -> None:
    options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    command = worker(options, {}, 9, 'trainer.save_model(sys.argv[1] + "/final")')
    subprocess.run(
        [*command, str(tmp_path / "whole")], check=True, env=environment(), timeout=900, capture_output=True
    )
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [*command, str(cut)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while last_complete_checkpoint(cut) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "final").exists()
    subprocess.run([*command, str(cut), "resume"], check=True, env=environment(), timeout=900, capture_output=True)
    assert_equal_weights(
        *(weights(IBKEEditor.from_pretrained(tmp_path / name / "final")) for name in ("whole", "cut"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", [True, False])
def test_two_ranks_stay_equal_and_train_as_one_process_with_both_batches(
    bottleneck: bool, worker: Any, tmp_path: Path
) -> None:
    """Parameters agree across ranks; without a bottleneck the losses are those of one process with both batches.

    With it every rank draws its own ε, so that later steps differ; the information term of the first step does not
    depend on ε, nor do the scores of an evaluation depend on the rank.
    """
    after = """
assert trainer.args.world_size == expected, trainer.args.world_size
metrics = trainer.evaluate()
state = b"".join(p.detach().numpy().tobytes() for _, p in sorted(trainer.editor.state_dict().items()))
noise = float(torch.randn(()))
result = {"hash": hashlib.sha256(state).hexdigest(), "history": trainer.state.log_history}
json.dump({**result, "metrics": metrics, "noise": noise},
          open(f"{sys.argv[1]}-{trainer.args.process_index}.json", "w"))
trainer.save_model(sys.argv[1] + "/final")
if expected == 2:
    torch.distributed.destroy_process_group()
"""
    options = {
        "max_steps": 4,
        "edits_per_group": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "step_size_learning_rate": 0.1,
    }
    editor = {"use_information_bottleneck": bottleneck}
    command = worker(options, editor, 16, after.replace("expected", "2"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command[1]]
    done = subprocess.run(
        [*launch, str(tmp_path / "two")], env=environment(), timeout=900, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert ranks[0]["noise"] != ranks[1]["noise"]
    command = worker({**options, "per_device_train_batch_size": 4}, editor, 16, after.replace("expected", "1"))
    subprocess.run([*command, str(tmp_path / "one")], check=True, env=environment(), timeout=900, capture_output=True)
    alone = json.loads((tmp_path / "one-0.json").read_text())
    if bottleneck:
        first = [next(entry["loss_itm"] for entry in run["history"] if "loss" in entry) for run in (ranks[0], alone)]
        assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] > 0
        assert all(entry["loss_itm"] > 0 for entry in ranks[0]["history"] if "loss" in entry)
    for name in () if bottleneck else ("loss", "loss_sg", "loss_il", "grad_norm"):
        values = [[entry[name] for entry in run["history"] if "loss" in entry] for run in (ranks[0], alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
    for name in ("eval_reliability", "eval_generality", "eval_locality"):
        assert ranks[0]["metrics"][name] == ranks[1]["metrics"][name]
    one, two = (weights(IBKEEditor.from_pretrained(tmp_path / name / "final")) for name in ("one", "two"))
    for name, tensor in one.items():
        if bottleneck and "statistics" not in name:
            continue
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


TOGETHER = {
    "max_steps": 4,
    "edits_per_group": 1,
    "per_device_train_batch_size": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "step_size_learning_rate": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
}
IN_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
AFTER = """
json.dump(trainer.state.log_history, open(f"{sys.argv[1]}-{trainer.args.process_index}.json", "w"))
if trainer.args.world_size > 1:
    torch.distributed.destroy_process_group()
"""


def losses(file: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads(file.read_text()) if "loss" in entry]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(worker: Any, tmp_path: Path) -> None:
    editor = {"use_information_bottleneck": False}
    alone = {**TOGETHER, "per_device_train_batch_size": 4}
    command = worker(alone, editor, 16, AFTER)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment(), timeout=900)
    command = worker({**TOGETHER, "max_steps": 2}, editor, 16, AFTER)
    subprocess.run([*IN_TWO, command[1], str(tmp_path / "cut")], check=True, env=environment(), timeout=900)
    command = worker(alone, editor, 16, AFTER)
    subprocess.run([*command, str(tmp_path / "cut"), "resume"], check=True, env=environment(), timeout=900)
    assert losses(tmp_path / "cut-0.json") == pytest.approx(losses(tmp_path / "whole-0.json"), rel=1e-4)
    whole, cut = (weights(IBKEEditor.from_pretrained(tmp_path / name / "checkpoint-4")) for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, cut[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_run_and_says_so(worker: Any, tmp_path: Path) -> None:
    dying = """
class Dies(t.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if args.process_index == 1 and state.global_step == 3:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
"""
    command = worker({**TOGETHER, "max_steps": 50}, {}, 16)
    program = Path(command[1])
    text = program.read_text().replace(
        "import training_runs as t\n", "import training_runs as t\nimport transformers\n"
    )
    text = text.replace(
        "trainer.train(",
        f"{dying.replace('t.Trainer', 'transformers.Trainer')}\ntrainer.add_callback(Dies())\ntrainer.train(",
    )
    program.write_text(text)
    run = [*IN_TWO, command[1], str(tmp_path / "run")]
    done = subprocess.run(run, env=environment(), timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr and "local_rank: 1" in done.stderr, done.stderr[-2000:]
    assert last_complete_checkpoint(tmp_path / "run") is not None
