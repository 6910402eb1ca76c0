"""Editors on the Hub, by the real client against a stand-in: one commit, the same edit bit for bit, no pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_clients import CODE, without_waiting
from huggingface_hub import ModelCard, model_info
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import READ_TOKEN, LoopbackHub
from markdown_tables import markdown_rows
from small_editors import REQUESTS, make_editor
from training_runs import assert_equal_weights, new_editor, record, weights
from transformers import AutoModel

from ibke_hf import IBKEEditor, LowRankEdit
from ibke_hf.cli import main
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.editors.serac import SERACEditor
from ibke_hf.hub.upload import PICKLES, PickleError, UploadError, upload

ID = "org/ibke-tiny"
RESULTS = {
    "overall": {
        "reliability": 99.123,
        "generality": 80.0,
        "locality": 95.5,
        "f1": 87.0,
        "avg": 91.5,
        "exact_match": None,
    },
    "settings": {"dataset": "qizhou/UniEdit", "split": "test", "sequential": 1},
    "records": 7,
}


def edit_of(editor: Any, world: tuple[Any, Any, Any, Any]) -> LowRankEdit:
    model, tokenizer, *_ = world
    edit: LowRankEdit = editor.eval().edit(model, tokenizer, REQUESTS)
    return edit


# --- push and pull --------------------------------------------------------------------------------------------------


def test_an_editor_comes_back_with_the_same_edit_bit_for_bit(hub: LoopbackHub, world: Any) -> None:
    editor, expected = world[2:]
    commit = editor.push_to_hub(ID, results=RESULTS, metadata={"license": "apache-2.0"})
    assert hub[ID].titles == ["initial commit", "Add the editor"]  # one commit for all of it
    assert set(hub[ID].files()) == CODE | {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "results.json",
        ".eval_results/UniEdit.yaml",
    }
    assert commit.oid == hub[ID].refs["main"]
    for loader in (IBKEEditor, AutoModel):
        loaded = loader.from_pretrained(ID)
        assert type(loaded) is IBKEEditor
        assert edit_of(loaded, world) == expected


def test_the_card_states_backbone_results_and_how_to_load(hub: LoopbackHub, world: Any) -> None:
    editor = world[2]
    editor.config.base_model_name_or_path = "openai-community/gpt2"
    editor.push_to_hub(ID, results=RESULTS, metadata={"license": "apache-2.0"})
    card = ModelCard.load(ID)
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.license == "apache-2.0"
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {
        "reliability": 99.12,
        "generality": 80.0,
        "locality": 95.5,
        "f1": 87.0,
        "avg": 91.5,
    }  # what is None is left out
    assert ["reliability, top 1", "99.1"] in markdown_rows(card.text)
    assert "7 records, one edit at a time" in card.text
    assert f'IBKEEditor.from_pretrained("{ID}")' in card.text and "trust_remote_code=True" in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(block, "card", "exec")
    entries = yaml.safe_load(hub[ID].files()[".eval_results/UniEdit.yaml"])
    assert entries[0] == {
        "dataset": {"id": "qizhou/UniEdit", "task_id": "reliability"},
        "value": 99.12,
        "notes": "7 records, one edit at a time, teacher-forced",
    }
    assert json.loads(hub[ID].files()["results.json"]) == RESULTS


def test_card_and_config_name_no_folder(hub: LoopbackHub, world: Any, tmp_path: Path) -> None:
    world[2].config.base_model_name_or_path = str(tmp_path)
    world[2].push_to_hub(ID, results={**RESULTS, "settings": {"dataset": str(tmp_path / "mine.json")}})
    files = hub[ID].files()
    assert not [name for name in ("README.md", "config.json") if str(tmp_path) in files[name].decode()]
    assert "mine.json" in files["README.md"].decode()
    assert not any(name.startswith(".eval_results") for name in files)


def test_revisions_and_pull_requests(hub: LoopbackHub, world: Any, tiny_model: Any) -> None:
    model, tokenizer, editor, expected = world
    editor.push_to_hub(ID)
    other = make_editor(model, tokenizer, latent_length=5)
    first = hub[ID].refs["main"]
    assert other.push_to_hub(ID, revision="larger").pr_url is None
    pull = other.push_to_hub(ID, create_pr=True, commit_message="Larger latents")
    assert pull.pr_revision == "refs/pr/1"
    assert hub[ID].refs["main"] == first
    assert (
        edit_of(IBKEEditor.from_pretrained(ID), world)
        == edit_of(IBKEEditor.from_pretrained(ID, revision=first), world)
        == expected
    )
    for revision in ("larger", "refs/pr/1", pull.oid):
        assert edit_of(IBKEEditor.from_pretrained(ID, revision=revision), world) == edit_of(other, world) != expected
    with pytest.raises(OSError, match="nowhere is not a valid git identifier"):
        IBKEEditor.from_pretrained(ID, revision="nowhere")


def test_private_repositories_need_a_token(hub: LoopbackHub, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world[2].push_to_hub(ID, private=True)
    assert model_info(ID).private
    monkeypatch.delenv("HF_TOKEN")
    assert edit_of(IBKEEditor.from_pretrained(ID, token=READ_TOKEN), world) == world[3]
    with pytest.raises(HfHubHTTPError, match="write access"):
        world[2].push_to_hub(ID, token=READ_TOKEN)
    with pytest.raises(OSError, match="pass a token"):
        IBKEEditor.from_pretrained("org/other", token=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "empty")
    with pytest.raises(OSError, match="pass a token"):
        IBKEEditor.from_pretrained(ID, token=False)


def test_a_filled_cache_is_all_that_is_needed(
    hub: LoopbackHub, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world[2].push_to_hub(ID)
    with pytest.raises(OSError, match="cached files"):
        IBKEEditor.from_pretrained(ID, local_files_only=True)
    IBKEEditor.from_pretrained(ID, cache_dir=tmp_path / "mine")
    asked = len(hub.requests)
    assert (
        edit_of(IBKEEditor.from_pretrained(ID, cache_dir=tmp_path / "mine", local_files_only=True), world) == world[3]
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert edit_of(IBKEEditor.from_pretrained(ID, cache_dir=tmp_path / "mine"), world) == world[3]
    assert len(hub.requests) == asked


@pytest.mark.parametrize("cut", ["lfs", "commit"])
def test_a_cut_upload_leaves_the_old_revision_and_a_retry_finishes(
    cut: str, hub: LoopbackHub, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waiting(monkeypatch)
    model, tokenizer, editor, expected = world
    editor.push_to_hub(ID)
    old, hub.cut = hub[ID].refs["main"], cut
    other = make_editor(model, tokenizer, latent_length=5)
    with pytest.raises(UploadError, match=f"{ID}: the upload was cut .* push again to finish"):
        other.push_to_hub(ID)
    assert hub[ID].refs["main"] == old
    assert edit_of(IBKEEditor.from_pretrained(ID), world) == expected
    hub.cut = ""
    other.push_to_hub(ID)
    assert edit_of(IBKEEditor.from_pretrained(ID), world) == edit_of(other, world)
    assert len(hub[ID].commits) == 3


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub: LoopbackHub, world: Any) -> None:
    editor, expected = world[2:]
    editor.push_to_hub(ID)
    editor.push_to_hub(ID, max_shard_size="20KB")
    names = [name for name in hub[ID].files() if "safetensors" in name]
    assert "model.safetensors" not in names and len(names) > 2
    assert edit_of(IBKEEditor.from_pretrained(ID), world) == expected
    editor.push_to_hub(ID)
    assert [name for name in hub[ID].files() if "safetensors" in name] == ["model.safetensors"]


# --- no pickle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["training_args.bin", "deep/er/optimizer.PT", "rng_state.pth"])
def test_a_pickle_is_refused_before_anything_is_sent(name: str, hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"x")
    with pytest.raises(PickleError, match=f"{Path(name).name}: may hold a pickle"):
        upload(tmp_path / "out", ID)
    assert hub.requests == []


def test_the_trainer_publishes_no_pickle(hub: LoopbackHub, trainer_for: Any, tmp_path: Path) -> None:
    records = [record(i) for i in range(3)]
    options = {
        "push_to_hub": True,
        "hub_model_id": ID,
        "hub_strategy": "every_save",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = trainer_for(records, validation=records, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.push_to_hub(license="apache-2.0")
    assert hub[ID].titles == [
        "initial commit",
        *(f"Training in progress, step {step}" for step in (2, 4)),
        "Model save",
        "Add the editor",
    ]
    assert not [name for name in hub.every_file() if name.endswith(PICKLES)]
    assert set(hub[ID].files()) == CODE | {".gitattributes", "README.md", "config.json", "model.safetensors"}
    card = hub[ID].files()["README.md"].decode()
    assert "license: apache-2.0" in card and "model.layers.1.mlp.down_proj" in card and "Last validation: loss" in card
    assert not list(Path(trainer.args.output_dir).rglob("training_args*"))
    loaded = IBKEEditor.from_pretrained(ID)
    assert all(tensor.equal(trainer.editor.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_pushes_a_saved_editor_with_what_lies_beside_it(
    hub: LoopbackHub, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world[2].save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "out" / "checkpoints" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "out" / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    assert main(["push", str(tmp_path / "out"), ID, "--private", "--create-pr", "--message", "Mine"]) == 0
    assert capsys.readouterr().out == f"editor: {hub.url}/{ID}/discussions/1\n"
    assert hub[ID].private and hub[ID].titles[-1] == "Mine"
    files = hub[ID].files("refs/pr/1")
    assert "# Mine" in files["README.md"].decode() and "results.json" in files
    assert not [name for name in files if name.endswith(PICKLES)]
    assert edit_of(IBKEEditor.from_pretrained(ID, revision="refs/pr/1"), world) == world[3]


def test_mend_is_pushed_without_code(hub: LoopbackHub, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    editor = new_editor(tiny_model(), kind=MENDEditor)
    editor.save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), ID]) == 0
    assert set(hub[ID].files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert "from ibke_hf.editors.mend import MENDEditor" in hub[ID].files()["README.md"].decode()
    assert isinstance(AutoModel.from_pretrained(ID), MENDEditor)


def test_an_untrained_serac_comes_back_with_equal_weights(hub: LoopbackHub, tiny_model: Any, tmp_path: Path) -> None:
    editor = SERACEditor.for_backbone(tiny_model(num_hidden_layers=1), embedding_dim=8)
    editor.save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), ID]) == 0
    assert set(hub[ID].files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    card = hub[ID].files()["README.md"].decode()
    assert "from ibke_hf.editors.serac import SERACEditor" in card
    assert f"`SERACEditor`: {SERACEditor.card_summary}" in card and "low-rank" not in card  # it edits no layer
    loaded = AutoModel.from_pretrained(ID)
    assert isinstance(loaded, SERACEditor)
    assert_equal_weights(weights(editor), weights(loaded))


def test_the_command_says_that_an_upload_was_cut(
    hub: LoopbackHub, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world[2].save_pretrained(tmp_path / "out")
    hub.cut = "commit"
    assert main(["push", str(tmp_path / "out"), ID]) == 2
    assert re.search(rf"^ibke push: {ID}: the upload was cut .*push again to finish$", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither an editor, an edit nor records; found nothing"),
        ({"a.txt": "x"}, "found a.txt"),
        ({"config.json": '{"model_type": "gpt2"}'}, "a model of type 'gpt2', not an editor"),
        ({"config.json": "{"}, "config.json: not valid"),
        ({"edit.json": "{}"}, "a dense edit"),
        ({"edit.json": '{"kind": "grace"}'}, "a grace edit, a memory beside the model that no weight can hold"),
        ({"config.json": '{"model_type": "ibke"}'}, "no file named model.safetensors"),
    ],
)
def test_what_cannot_be_pushed_is_named(
    files: dict[str, str], message: str, hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    assert main(["push", str(tmp_path / "out"), ID]) == 2
    assert message in capsys.readouterr().err
    assert main(["push", str(tmp_path / "nowhere"), ID]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert hub.repositories == {}


def test_results_of_something_else_are_refused(hub: LoopbackHub, world: Any, tmp_path: Path) -> None:
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"overall": {}}', "no `overall`"),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=f"results.json: .*{message}"):
            world[2].push_to_hub(ID, results=tmp_path)
    with pytest.raises(TypeError, match="licence"):
        world[2].push_to_hub(ID, licence="mit")
    assert hub.repositories == {}
