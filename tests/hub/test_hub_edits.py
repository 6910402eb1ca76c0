"""Edits on the Hub: LoRA adapters with a card, of one rank, that come back bit for bit and stack under PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import READ_TOKEN, LoopbackHub
from safetensors.torch import load_file, save_file
from saved_edits import CONFIG, INFO, WEIGHTS, change, make_edit

from ibke_hf.cli import main
from ibke_hf.core import adapter_files
from ibke_hf.core.adapter_files import AdapterError
from ibke_hf.core.composition import SolvedEdit
from ibke_hf.core.edits import EditInfo, LowRankEdit
from ibke_hf.core.records import EditRequest

ID = "org/zurich"


def pulled(**options: Any) -> LowRankEdit:
    return LowRankEdit.from_pretrained(ID, **options)


def test_an_edit_is_published_in_one_commit_and_comes_back_bit_for_bit(hub: LoopbackHub) -> None:
    edit = make_edit()
    edit.push_to_hub(ID, metadata={"license": "cc0-1.0"})
    assert hub[ID].titles == ["initial commit", "Add the edit"]
    assert set(hub[ID].files()) == {".gitattributes", "README.md", WEIGHTS, CONFIG, INFO}
    assert pulled() == edit.padded(5)
    assert pulled().info == edit.info


def test_the_card_states_requests_backbone_editor_scores_and_how_to_load(hub: LoopbackHub) -> None:
    edit = make_edit()
    edit.push_to_hub(ID, max_rank=2, metadata={"license": "cc0-1.0"})
    card = ModelCard.load(ID)
    assert card.data.library_name == "peft" and card.data.license == "cc0-1.0"
    assert (card.data.base_model, card.data.base_model_relation) == ("tiny", "adapter")
    worst = max(edit.truncate(2).relative_error.values())
    parts = [
        '"Où est Zürich 🏔" -> "Швейцария"',
        "editor: IBKE",
        "backbone: tiny",
        "f1 90.0",
        "rank: 2, alpha 2",
        f"at most {worst:.2g}",
    ]
    calls = [f'PeftModel.from_pretrained(model, "{ID}")', f'LowRankEdit.from_pretrained("{ID}")']
    for part in ("model.layers.1.mlp.down_proj", *parts, *calls):
        assert part in card.text, part
    for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(block, "card", "exec")


def test_odd_requests_and_names_of_folders_leave_the_card_whole(hub: LoopbackHub, tmp_path: Path) -> None:
    requests = tuple(EditRequest(f"```\n# {i}", "---\n````") for i in range(23))
    replace(make_edit(), info=EditInfo(requests, str(tmp_path), str(tmp_path))).push_to_hub(ID)
    text = hub[ID].files()["README.md"].decode()
    assert "base_model" not in text
    assert not [name for name in ("README.md", CONFIG, INFO) if str(tmp_path) in hub[ID].files()[name].decode()]
    assert "\n`````text\n" in text and text.count("# 1") == 11 and "and 3 more, see edit.json" in text
    assert pulled().info.requests == requests
    replace(make_edit(), info=EditInfo()).push_to_hub(ID)
    assert "Not stated." in hub[ID].files()["README.md"].decode()


def test_layers_share_one_rank_at_most_max_rank(hub: LoopbackHub, tmp_path: Path) -> None:
    edit = make_edit(ranks=(3, 5))
    for options, rank in (({}, 5), ({"max_rank": 2}, 2), ({"max_rank": 16}, 5), ({"rank": 16}, 16), ({"rank": 4}, 4)):
        edit.save_pretrained(tmp_path, **options)
        edit.push_to_hub(ID, **options)
        assert set(LowRankEdit.from_pretrained(tmp_path).ranks.values()) == set(pulled().ranks.values()) == {rank}
        config = json.loads((tmp_path / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, rank) and "rank_pattern" not in config
        errors = json.loads((tmp_path / INFO).read_text())["relative_error"]
        assert errors == dict(edit.truncate(rank).relative_error if rank < 5 else {})
        for name, error in errors.items():
            update = edit.weight_update(name)
            distance = (update - LowRankEdit.from_pretrained(tmp_path).weight_update(name)).norm() / update.norm()
            assert error == pytest.approx(float(distance), abs=1e-5)
    with pytest.raises(ValueError, match="max_rank=2 and rank=3 say different things"):
        edit.save_pretrained(tmp_path, max_rank=2, rank=3)
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        edit.push_to_hub(ID, max_rank=0)
    pair = LowRankEdit(*({k: t.repeat(2, 1, 1) for k, t in side.items()} for side in (edit.inputs, edit.outputs)))
    with pytest.raises(ValueError, match="cannot save 2 independent edits"):
        pair.push_to_hub(ID)


def test_private_edits_revisions_and_an_offline_cache(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, other = make_edit(), make_edit(ranks=(1, 1))
    edit.push_to_hub(ID, private=True)
    assert other.push_to_hub(ID, create_pr=True).pr_revision == "refs/pr/1"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match=rf"(?s){ID}: {CONFIG} cannot be downloaded .*pass a token"):
        pulled()
    assert pulled(token=READ_TOKEN) == edit.padded(5)
    assert pulled(token=READ_TOKEN, revision="refs/pr/1", cache_dir=tmp_path / "mine") == other
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pulled() == pulled(local_files_only=True) == edit.padded(5)
    assert pulled(revision="refs/pr/1", cache_dir=tmp_path / "mine") == other
    with pytest.raises(AdapterError, match=f"{CONFIG} cannot be downloaded"):
        LowRankEdit.from_pretrained("org/unseen")
    assert len(hub.requests) == asked


def test_a_push_between_two_files_does_not_mix_commits(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_edit(), make_edit(ranks=(2, 2))
    first.push_to_hub(ID)
    read = adapter_files.read_weights

    def read_late(*arguments: Any) -> Any:
        second.push_to_hub(ID)
        return read(*arguments)

    monkeypatch.setattr(adapter_files, "read_weights", read_late)
    assert pulled() == first.padded(5)


def test_a_description_that_cannot_be_had_is_not_taken_for_none(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_edit().push_to_hub(ID)
    hub.cut = INFO
    with pytest.raises(AdapterError, match=f"{ID}: {INFO} cannot be downloaded"):
        pulled()
    hub.cut = ""
    assert pulled().info == make_edit().info
    make_edit().push_to_hub("org/foreign")
    del hub["org/foreign"].files()[INFO]  # as an adapter of PEFT's
    for offline in (False, True):  # the cache knows that there is none
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert LowRankEdit.from_pretrained("org/foreign").info == EditInfo(backbone="tiny")


def test_several_edits_stack_under_peft(hub: LoopbackHub, tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    first = make_edit(width=48)
    turned = {name: factor.roll(1, -1) for name, factor in first.inputs.items()}
    second = replace(first, inputs=turned, outputs={name: -2 * factor for name, factor in first.outputs.items()})
    first.push_to_hub("org/first")
    second.push_to_hub("org/second", max_rank=5)
    model = tiny_model(initializer_range=0.1)
    ids = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with first.attached(model):
            one = model(ids).logits
        with first.compose(second).attached(model):
            both = model(ids).logits
        stacked = peft.PeftModel.from_pretrained(model, "org/first", adapter_name="first")
        torch.testing.assert_close(stacked(ids).logits, one, rtol=1e-5, atol=1e-5)
        stacked.load_adapter("org/second", adapter_name="second")
        stacked.base_model.set_adapter(["first", "second"])
        torch.testing.assert_close(stacked(ids).logits, both, rtol=1e-5, atol=1e-5)
    assert (one - both).abs().max() > 0.05


def test_layers_of_weights_and_config_must_agree(tmp_path: Path) -> None:
    make_edit().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    renamed = {key.replace("layers.2", "layers.7"): tensor for key, tensor in weights.items()}
    for changed, message in (
        (
            {key: tensor for key, tensor in weights.items() if "layers.1" not in key},
            r"no factors of 'model\.layers\.1\.mlp\.down_proj'",
        ),
        (renamed, r"factors of 'model\.layers\.7\.mlp\.down_proj', not named in adapter_config\.json"),
    ):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=message):
            LowRankEdit.from_pretrained(tmp_path)
    change(tmp_path / CONFIG, target_modules=["down_proj", "c_proj"])  # ends of names, of which a model may lack some
    assert set(LowRankEdit.from_pretrained(tmp_path).layers) == {f"model.layers.{i}.mlp.down_proj" for i in (1, 7)}
    change(tmp_path / CONFIG, target_modules=r".*\.1\.mlp\.down_proj")
    with pytest.raises(AdapterError, match=r"layers\.7"):
        LowRankEdit.from_pretrained(tmp_path)


def test_the_command_pushes_a_saved_edit(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_edit().save_pretrained(tmp_path / "edit")
    assert main(["push", str(tmp_path / "edit"), ID, "--max-rank", "2", "--revision", "small"]) == 0
    assert capsys.readouterr().out == f"edit: {hub.url}/{ID}/commit/{hub[ID].refs['small']}\n"
    small, expected = pulled(revision="small"), make_edit().truncate(2)
    assert small.ranks == expected.ranks
    for name in expected.layers:
        torch.testing.assert_close(small.weight_update(name), expected.weight_update(name), rtol=1e-5, atol=1e-5)
    assert main(["push", str(tmp_path / "edit"), ID, "--results", "somewhere"]) == 2
    assert "--results belongs to an editor" in capsys.readouterr().err


def test_edits_solved_together_are_pulled_with_their_parts(hub: LoopbackHub) -> None:
    first = replace(make_edit(), keys={name: rows + 1 for name, rows in make_edit().inputs.items()})
    second = replace(
        first, outputs={name: rows * 2 for name, rows in first.outputs.items()}, keys={**first.keys, **first.inputs}
    )
    solved = first.compose(second, how="solve")
    solved.push_to_hub(ID)
    assert set(hub[ID].files()) == {".gitattributes", "README.md", WEIGHTS, CONFIG, INFO, "parts.safetensors"}
    back = SolvedEdit.from_pretrained(ID)
    assert [part.info for part in back.parts] == [first.info, second.info]
    for name in back.layers:
        assert torch.equal(pulled().weight_update(name), back.low_rank().weight_update(name))
    assert "SolvedEdit.from_pretrained" in (text := hub[ID].files()["README.md"].decode()) and "without(0)" in text
    first.push_to_hub(ID)
    assert set(hub[ID].files()) == {".gitattributes", "README.md", WEIGHTS, CONFIG, INFO, "keys.safetensors"}
    assert pulled().keys.keys() == first.keys.keys()
