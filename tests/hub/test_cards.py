"""Model cards: rendered, not written; metadata that the Hub's client reads; figures of committed files alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from command_runs import documented
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from markdown_tables import body
from paths import ROOT

from ibke_hf.atlas import ASSETS
from ibke_hf.core.configuration_ibke import PRESETS
from ibke_hf.data.sources import read_records
from ibke_hf.hub.cards import BACKBONES, CARDS, REAL, render_card
from ibke_hf.hub.cards.editor import SECTIONS, editor_page
from ibke_hf.hub.cards.presets import PAPERS_LAYERS

FOLDER = ROOT / "model_cards"
REAL_FILES = {"config.json", "model.safetensors", "training.json", "table.json", "chat.json", "bench.json"}


@pytest.fixture(scope="module")
def committed() -> Path:
    if not FOLDER.exists():
        pytest.skip("model_cards is not beside the tests")
    return FOLDER


# --- the committed cards --------------------------------------------------------------------------------------------


def test_there_is_a_card_for_atlas_and_each_preset(committed: Path) -> None:
    assert CARDS == ("atlas", "smollm2-135m-instruct", "gpt2-xl", "gpt-j-6b", "qwen3-1.7b", "qwen3-8b")
    assert {folder.name for folder in committed.iterdir() if folder.is_dir()} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_committed_card_is_what_the_command_renders(name: str, committed: Path) -> None:
    rendered, folder = render_card(name, committed), committed / name
    files = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert {file: files.get(file) for file in rendered} == rendered, f"run `ibke card {name}`"
    table_files = {
        "table.json",
        "sequential.json",
        "trade_off.svg",
        "TABLE.md",
        "CLAIMS.md",
    }  # shown beside the card of Atlas
    of_table = table_files if name == "atlas" else set()
    beside = ("figures/", "sweep.json", "logs.json", "training/", "recipe/", "precision/")
    others = {file for file in files if file not in rendered and not file.startswith(beside)}
    assert others == of_table if name not in REAL else others <= REAL_FILES


@pytest.mark.parametrize("name", CARDS)
def test_metadata_is_read_back_by_the_client_and_valid(name: str, hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(render_card(name)["README.md"], encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    assert "POST /api/validate-yaml" in hub.requests
    data = card.data
    assert data.library_name == "ibke-hf"
    assert data.license == "apache-2.0"
    assert {"knowledge-editing", "model-editing", "ibke"} <= set(data.tags)
    assert ModelCard(str(card)).data.to_dict() == data.to_dict() == yaml.safe_load(str(card).split("---\n")[1])
    if name == "atlas":
        assert data.base_model is None
        assert data.datasets is None  # neither is on the Hub
    elif name in REAL:
        assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    else:
        assert (data.base_model, data.base_model_relation) == (BACKBONES[name], "adapter")
        assert data.datasets == ["qizhou/UniEdit"]


@pytest.mark.parametrize("name", CARDS)
def test_python_of_a_card_compiles_and_its_commands_are_checked(name: str, committed: Path) -> None:
    text = render_card(name)["README.md"]
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, name, "exec")
    commands = re.findall(r"^ibke .*$", text, re.M)
    assert len(commands) >= 3
    assert set(commands) <= set(documented())  # each of which test_cli.py parses


@pytest.mark.parametrize("name", CARDS)
def test_sections_come_in_the_order_of_the_one_template(name: str) -> None:
    titles = re.findall(r"^## (.*)$", body(render_card(name)["README.md"]), re.M)
    assert titles == [title for title in SECTIONS if title in titles]


def test_the_template_has_no_other_sections() -> None:
    with pytest.raises(ValueError, match="not in"):
        editor_page(ModelCard("---\nlicense: mit\n---\n").data, "x", [], {"Use": ["x"], "Nonsense": ["x"]})


# --- editors that are not trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_card_without_weights_says_so_first_and_has_no_result(name: str) -> None:
    (path, text), *others = render_card(name).items()
    assert (path, others) == ("README.md", [])
    assert body(text).splitlines()[0].startswith("**Not published yet: weights do not exist.**")
    assert "model-index" not in ModelCard(text).data.to_dict()
    assert not re.search("## Results|## Where it fails|reliability|locality [0-9]", text)
    assert not re.search(r"\d %|percent", text)
    assert "Estimates, not measurements." in text and "Time is not measured" in text
    commands = [line.split()[1] for line in re.findall(r"^ibke .*$", text, re.M)]
    assert commands == ["train", "eval", "card", "push", "train"]
    assert f"ibke train --backbone {BACKBONES[name]} --records uniedit/train --validation uniedit/validation" in text


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_are_the_papers_where_it_states_them(name: str) -> None:
    text = " ".join(render_card(name)["README.md"].split())
    layers = "layers {}, {} and {},".format(*PRESETS[BACKBONES[name]]["edited_layers"])
    said, ours = text.partition("# What is the paper's and what is ours")[2].split("the choice is ours:")
    assert (layers in said, layers in ours) == ((True, False) if BACKBONES[name] in PAPERS_LAYERS else (False, True))


def test_the_split_of_the_cards_keeps_subjects_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ASSETS / "records" / "test", tmp_path / "hub" / "train")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", render_card("qwen3-8b")["README.md"], re.S)
    exec(compile(code.replace("% 100", "% 10"), "card", "exec"), {})
    train, validation = (list(read_records(tmp_path / "uniedit" / name)) for name in ("train", "validation"))
    assert len(train) + len(validation) == len(list(read_records(tmp_path / "hub" / "train")))
    assert 10 < len(validation) < len(train) / 3
    heads = [{record.edits[0].head for record in part} for part in (train, validation)]
    assert not heads[0] & heads[1]
