"""A backbone that is sharded over two processes is edited and trained on as one that each of them has whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from paths import ROOT

from ibke_hf.cli import main
from ibke_hf.training.settings import TrainingSettings
from ibke_hf.training.sharding import shard_backbone

PROGRAM = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import training_runs as t
from small_editors import REQUESTS, make_editor
from transformers import AutoModelForCausalLM, AutoTokenizer
from ibke_hf.core.layers import BackboneError
from ibke_hf.core.shards import is_sharded
from ibke_hf.training.sharding import shard_backbone

folder = sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder + "/backbone")
# one rank has records with hops and locality cases, the other has none
records = [t.record(i, i % 2, 1 - i % 2, 1 - i % 2) for i in range(6)]
IDS = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
result = {}
for name in ("whole", "sharded"):
    backbone = AutoModelForCausalLM.from_pretrained(folder + "/backbone")
    arguments = t.arguments(f"{folder}/{name}", max_steps=3, per_device_train_batch_size=1, edits_per_group=1)
    if name == "sharded":
        shard_backbone(backbone, arguments.device)
        assert is_sharded(backbone)
        weight = backbone.model.layers[0].mlp.down_proj.weight
        assert weight.to_local().numel() * 2 == weight.numel()  # each process holds half
    answers = lambda: [round(float(v), 5) for v in backbone(IDS).logits.detach().flatten()[:50]]
    before, edits = answers(), []
    for composition, mode in (("sum", "joint"), ("solve", "sequential")):
        torch.manual_seed(0)
        editor = make_editor(backbone, tokenizer, layers=[1, 2], composition=composition)
        edit = editor.edit(backbone, tokenizer, REQUESTS, mode=mode)
        with edit.attached(backbone):
            edits.append(answers())
        assert answers() == before and edits[-1] != before
    if name == "sharded":
        try:
            edit.merge_into(backbone)
        except BackboneError as error:
            result["refused"] = str(error)
    trainer = t.IBKETrainer(t.new_editor(backbone), backbone=backbone, args=arguments, processing_class=tokenizer,
                            train_dataset=t.RecordDataset(records), eval_dataset=t.RecordDataset(records[:3]))
    assert arguments.world_size == 2
    trainer.train()
    result[name] = {"before": before, "edits": edits, "evaluation": trainer.evaluate()["eval_loss"],
                    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    state = b"".join(p.detach().numpy().tobytes() for _, p in sorted(trainer.editor.state_dict().items()))
    result[name]["hash"] = hashlib.sha256(state).hexdigest()
json.dump(result, open(f"{folder}/{dist.get_rank()}.json", "w"))
dist.destroy_process_group()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
def test_two_processes_edit_and_train_a_sharded_backbone(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    for part in (tiny_model(), tiny_tokenizer):
        part.save_pretrained(tmp_path / "backbone")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "program.py"), str(ROOT / "tests" / "support"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        whole, sharded = rank["whole"], rank["sharded"]
        assert sharded["before"] == whole["before"]
        for edits in zip(sharded["edits"], whole["edits"], strict=True):
            assert edits[0] == pytest.approx(edits[1], abs=1e-3)
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4) and len(whole["losses"]) == 3
        assert sharded["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-4)
        assert "sharded over processes" in rank["refused"] and "attach the edit" in rank["refused"]
    for name in ("whole", "sharded"):
        assert ranks[0][name]["hash"] == ranks[1][name]["hash"]


@pytest.mark.slow
def test_the_launch_file_trains_in_two_processes(settings: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--launch-file", "cpu"]) == 0
    file = capsys.readouterr().out.strip()
    settings["shard_backbone"], settings["choose_step_size"] = True, True
    settings["training"]["per_device_train_batch_size"] = 1
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "-m", "ibke_hf.cli"]
    command += ["train", "--config", str(tmp_path / "settings.yaml")]
    done = subprocess.run(command, env=environment(), timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    report = json.loads((tmp_path / "editor" / "training.json").read_text())["report"]
    assert report["steps"] == 4 and {"before", "after", "step_sizes"} <= set(report)


def test_what_cannot_be_sharded_is_refused(settings: Any, tiny_model: Any) -> None:
    with pytest.raises(ValueError, match=r"over several processes, and there is one.*torchrun or accelerate launch"):
        shard_backbone(tiny_model(), torch.device("cpu"))
    for name, value, error in (
        ("kind", "serac", "shard_backbone goes with ibke and mend"),
        ("device_map", "auto", "give one of them"),
        ("training", {"activation_cache": "somewhere"}, "activation_cache runs a backbone in parts"),
    ):
        with pytest.raises(ValueError, match=error):
            TrainingSettings.of({**settings, "editor": {}, "shard_backbone": True, name: value})


def test_a_launch_file_of_each_kind_is_there(capsys: Any) -> None:
    for name in ("devices", "cpu"):
        assert main(["train", "--launch-file", name]) == 0
        config = yaml.safe_load(Path(capsys.readouterr().out.strip()).read_text())
        assert config["distributed_type"] == "MULTI_GPU" and config["use_cpu"] == (name == "cpu")
