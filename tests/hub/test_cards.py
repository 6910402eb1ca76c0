"""Model cards: rendered, not written; metadata that the Hub's client reads; figures of committed files alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_runs import documented
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import LoopbackHub
from markdown_tables import markdown_rows
from paths import ROOT
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ibke_hf.atlas import ASSETS
from ibke_hf.atlas.datasets import TRAINING_OPTIONS
from ibke_hf.atlas.editors import LOCALITY_FLOOR, STEP_FACTORS, TRAINING
from ibke_hf.atlas.report import SPLITS, markdown_table
from ibke_hf.cli import main
from ibke_hf.core.attachment import hooked
from ibke_hf.core.configuration_ibke import PRESETS
from ibke_hf.core.layers import modules_to_edit
from ibke_hf.core.modeling_ibke import IBKEEditor
from ibke_hf.data.build import GENERALITY, LOCALITY
from ibke_hf.data.sources import read_records
from ibke_hf.evaluation.scores import REPORTED, TITLES
from ibke_hf.hub.cards import BACKBONES, CARDS, render_card, stale_files
from ibke_hf.hub.cards import atlas as atlas_module
from ibke_hf.hub.cards.editor import SECTIONS, editor_page
from ibke_hf.hub.cards.needs import CASES, ROW_TOKENS, SHAPES, training_needs
from ibke_hf.hub.cards.presets import PAPERS_LAYERS

FOLDER = ROOT / "model_cards"
RESULTS = {
    "overall": {"reliability": 99.123, "generality": 80.0, "exact_match": 61.0},
    "records": 7,
    "settings": {"dataset": "qizhou/UniEdit", "split": "test", "sequential": 1},
}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def committed() -> Path:
    if not FOLDER.exists():
        pytest.skip("model_cards is not beside the tests")
    return FOLDER


def body(text: str) -> str:
    """Return a card without its metadata."""
    return text.split("---\n", 2)[2].strip()


# --- the committed cards --------------------------------------------------------------------------------------------


def test_there_is_a_card_for_atlas_and_each_preset(committed: Path) -> None:
    assert CARDS == ("atlas", "gpt2-xl", "gpt-j-6b", "qwen3-1.7b", "qwen3-8b")
    assert {folder.name for folder in committed.iterdir() if folder.is_dir()} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_committed_card_is_what_the_command_renders(name: str, committed: Path) -> None:
    rendered, folder = render_card(name), committed / name
    files = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert {file: files.get(file) for file in rendered} == rendered, f"run `ibke card {name}`"
    table_files = {"table.json", "sequential.json", "trade_off.svg", "TABLE.md"}  # shown beside the card of Atlas
    of_table = table_files if name == "atlas" else set()
    assert {file for file in files if file not in rendered and not file.startswith("training/")} == of_table


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


# --- Atlas ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> Json:
    return json.loads((ASSETS / "results.json").read_text())


def test_both_forms_of_atlas_results_are_those_of_the_result_file(results: Json) -> None:
    files = render_card("atlas")
    expected = {
        (split, name): round(results["editors"]["ibke"][split][name], 2) for split in SPLITS for name in REPORTED
    }
    index = ModelCard(files["README.md"]).data.eval_results
    assert {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in index} == expected
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/atlas.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == {
        f"{split}_{name}": value for (split, name), value in expected.items()
    }
    for entry in entries:
        number = results["records"]["held_out" if entry.task_id.startswith("held_out") else "test"]
        how = "greedy generation" if entry.task_id.endswith("exact_match") else "teacher-forced"
        assert entry.notes == f"{number} records, one edit at a time, {how}"


def numbers_in(value: Any) -> set[str]:
    """Return every number of a JSON value, as a card may print it."""
    if isinstance(value, dict | list):
        return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    return {f"{value:g}", f"{value:,}", f"{value:.1f}", f"{value:.0f}"}


def test_every_figure_of_the_atlas_card_is_in_a_committed_file(results: Json) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", body(render_card("atlas")["README.md"]), flags=re.S)  # without code
    files = ["ibke/log.json", "ibke/config.json", "mend/log.json", "mend/config.json", "backbone/config.json"]
    known = numbers_in([results, *(json.loads((ASSETS / name).read_text()) for name in files)])
    known |= numbers_in(
        [list(STEP_FACTORS), LOCALITY_FLOOR, TRAINING_OPTIONS["shares"], 16, 1, 0]
    )  # 16 domains, weight 1, from 0
    known |= {f"{100 * value:g}" for value in TRAINING_OPTIONS.values() if isinstance(value, float)}
    text = re.sub(r"F1|f1|top1|top 1|1-N|_top1", "", text)
    figures = set(re.findall(r"\d[\d,]*(?:\.\d+)?(?<!,)", text))
    assert figures - known == set()
    assert markdown_table(results) in render_card("atlas")["README.md"]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the JSON of Atlas's assets, which the card is then made of."""
    for name in (
        "results.json",
        "ibke/log.json",
        "ibke/config.json",
        "mend/log.json",
        "mend/config.json",
        "backbone/config.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ASSETS / name, tmp_path / name)
    monkeypatch.setattr(atlas_module, "ASSETS", tmp_path)
    return tmp_path


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_atlas_card_follows_its_files(assets: Path, results: Json) -> None:
    test = results["editors"]["ibke"]["test"]
    test["reliability"] = 12.34
    test["by_criterion"]["locality"]["Same-Entity Reasoning"] |= {"score": 23.45, "top1": 23.45, "cases": 777}
    del test["by_criterion"]["generality"]["Relation Reverse"]
    change(assets / "results.json", **results)
    log = json.loads((assets / "ibke/log.json").read_text())
    settings = {**log["training"], "max_steps": 4321, "edits_per_group": 0, "sg_includes_edit": False}
    trials = [{"factor": 0.7, "reliability": 1.0, "generality": 1.0, "locality": 80.0, "avg": 1.0}]
    change(
        assets / "ibke/log.json", training=settings, step_size_trials=trials, report={**log["report"], "minutes": 12.3}
    )
    change(
        assets / "ibke/config.json",
        edited_layers=[2, 5],
        second_stage_heads=1,
        second_stage_mlp=0,
        second_stage_skip=False,
    )
    files = render_card("atlas")
    text = " ".join(files["README.md"].split())
    assert "value: 12.34" in text and "value: 12.34" in files[".eval_results/atlas.yaml"]
    heads, *rows = (row for row in markdown_rows(files["README.md"]) if len(row) == len(REPORTED) + 2)
    (row,) = (row for row in rows if row[:2] == ["IBKE (ours)", "test"])
    assert row[heads.index("Rel. top 1")] == "12.3"
    assert "keep their answer in 23.4 % of 777 cases" in text and "backwards" not in text
    assert "layers 2 and 5 of 6" in text and "4,321 steps" in text and "in 12 minutes" in text
    assert (
        f"{TRAINING['per_device_train_batch_size']} records edited jointly." in text
        and "one more generality case" not in text
    )
    assert "none of 1, 0.95" in text and "multiplied by 0.7" in text
    assert "So is the second stage." in text


def test_the_atlas_card_says_whether_mend_is_a_fair_rival(assets: Path) -> None:
    log, config = (json.loads((assets / "ibke" / name).read_text()) for name in ("log.json", "config.json"))
    change(assets / "mend/log.json", training=log["training"], records=log["records"])
    change(assets / "mend/config.json", edited_layers=config["edited_layers"])
    assert "MEND was trained by the same recipe" in " ".join(render_card("atlas")["README.md"].split())
    change(assets / "mend/log.json", training={**log["training"], "max_steps": 7})
    assert "another run (7 steps" in " ".join(render_card("atlas")["README.md"].split())


def test_a_recipe_of_the_records_without_words_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"generality": {"reverse": 0.25}, "locality": {"same_entity": 6.5}}
    monkeypatch.setattr(atlas_module, "TRAINING_OPTIONS", {"near_rate": 0.25, "shares": shares})
    text = " ".join(render_card("atlas")["README.md"].split())
    assert "25 % of the locality cases about the edited relation" in text and "made-up name" not in text
    assert "1 unless said: the relation backwards 0.25 for generality, Yes or No 6.5 for locality." in text
    assert set(atlas_module.KINDS) == {*GENERALITY, *LOCALITY}
    monkeypatch.setattr(atlas_module, "TRAINING_OPTIONS", {"moon_rate": 0.25})
    with pytest.raises(KeyError, match="moon_rate"):
        render_card("atlas")


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


# --- needs ----------------------------------------------------------------------------------------------------------


def meta_backbone(backbone: str) -> Any:
    kind, shape = SHAPES[backbone]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("EleutherAI/gpt-j-6b", 6_050_882_784),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_are_those_of_the_published_backbone_and_of_the_editor(backbone: str, parameters: int) -> None:
    needs, m, rows = training_needs(backbone), 1024, 10
    assert needs.backbone_parameters == parameters
    attention = [
        3 * m * m + 3 * m + 2 * (w - m) * m for w in needs.widths
    ]  # from the latent to the factors; the readout is the same size
    readout = [w * m + 2 * m * m + 3 * m for w in needs.widths]
    expected = (
        sum(rows * m + 2 * a + r + m * w + w + m + 1 for a, r, w in zip(attention, readout, needs.widths, strict=True))
        + 3
    )
    assert needs.editor_parameters == expected
    preset = PRESETS[backbone]
    with torch.device("meta"):
        built = IBKEEditor.for_backbone(meta_backbone(backbone), preset["edited_layers"])
    assert built.config.edited_modules == preset["edited_modules"]
    assert (built.config.input_dims, built.config.output_dims) == (needs.config.input_dims, needs.config.output_dims)
    assert needs.total == sum(size for _, size in needs.memory().values())
    for formula, size in needs.memory().values():
        assert math.prod(int(number.replace(",", "")) for number in re.findall(r"(?:^|× )([\d,]+)", formula)) == size


@pytest.mark.parametrize("backbone", SHAPES)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(backbone: str) -> None:
    needs, rows = training_needs(backbone), 2
    model = meta_backbone(backbone).to(getattr(torch, needs.dtype))
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.update({} if storage._cdata in weights else {storage._cdata: storage})
        return tensor

    def start(_: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        torch._C._set_grad_enabled(True)
        return output.detach().requires_grad_(True)

    with torch.device("meta"):
        ids, mask = (
            torch.zeros(rows, ROW_TOKENS, dtype=torch.long),
            torch.ones(rows, 1, ROW_TOKENS, ROW_TOKENS, dtype=torch.bool),
        )
    lowest = modules_to_edit(model, needs.config.module_names()[:1])
    with (
        torch.no_grad(),
        hooked(lowest, dict.fromkeys(lowest, start)),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    estimate = needs.memory()["activations"][1] * rows / (needs.batch * CASES)
    assert 0.75 < kept_bytes / estimate < 1.25


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_checks_and_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["card", "atlas"]) == 0
    files = [Path("model_cards/atlas/README.md"), Path("model_cards/atlas/.eval_results/atlas.yaml")]
    assert capsys.readouterr().out.splitlines() == [f"written: {file}" for file in files]
    assert sorted(path for path in Path("model_cards").rglob("*") if path.is_file()) == sorted(files)
    assert main(["card", "atlas", "--check"]) == 0
    assert capsys.readouterr().out == "atlas: up to date\n"
    with files[0].open("a") as file:
        file.write("by hand\n")
    assert main(["card", "atlas", "--check"]) == 2
    assert capsys.readouterr().err.startswith(
        f"ibke card: {files[0]}: not what `ibke card` writes now; write it again"
    )
    assert main(["card", "atlas"]) == 0
    assert stale_files("atlas", "model_cards") == []
    assert main(["card", "all", "--check"]) == 2
    assert "gpt2-xl/README.md, " in capsys.readouterr().err
    assert main(["card", "all", "--out", "elsewhere"]) == 0
    assert main(["card", "all", "--out", "elsewhere", "--check"]) == 0


def test_needs_are_those_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "gpt2-xl", "--needs"]) == 0
    assert capsys.readouterr().out.strip() in render_card("gpt2-xl")["README.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3"], "ibke card: no card 'gpt3'; the cards are atlas, gpt2-xl, gpt-j-6b, qwen3-1.7b, qwen3-8b"),
        (["gpt3", "--check"], "no card 'gpt3'; the cards are atlas"),
        (["/no/such/folder"], "no card '/no/such/folder'; the cards are atlas"),
        (
            ["atlas", "--needs"],
            (
                "--needs belongs to an editor that is not trained yet: gpt2-xl, gpt-j-6b, qwen3-1.7b, qwen3-8b; "
                "found 'atlas'"
            ),
        ),
        (["gpt3", "--needs"], "found 'gpt3'"),
        (["all", "--needs"], "found 'all'"),
        (["atlas", "--results", "x"], "--results belongs to the folder of a trained editor; 'atlas' is none"),
        (["all", "--repository", "me/x"], "--repository belongs to the folder of a trained editor; 'all' is none"),
    ],
)
def test_what_has_no_card_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["card", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


# --- the card of a trained editor -----------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, tiny_model: Any) -> Path:
    model = tiny_model("gpt2")
    model.config.name_or_path = "openai-community/gpt2"
    IBKEEditor.for_backbone(model, latent_dim=8, latent_length=2).save_pretrained(tmp_path / "ibke-tiny")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "ibke-tiny"


def test_the_card_shown_is_the_one_that_is_pushed(
    trained: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ["--results", str(trained.parent / "results")]
    assert main(["card", str(trained), "--repository", "org/ibke-tiny", *results]) == 0
    shown = capsys.readouterr().out
    assert main(["push", str(trained), "org/ibke-tiny", *results]) == 0
    assert hub["org/ibke-tiny"].files()["README.md"].decode() == shown
    assert [TITLES["exact_match"], "61.0"] in markdown_rows(shown)
    assert "base_model: openai-community/gpt2" in shown
    entries = parse_eval_result_entries(yaml.safe_load(hub["org/ibke-tiny"].files()[".eval_results/UniEdit.yaml"]))
    assert [(entry.task_id, entry.notes.rpartition(", ")[2]) for entry in entries] == [
        ("exact_match", "greedy generation"),
        ("reliability", "teacher-forced"),
        ("generality", "teacher-forced"),
    ]


def test_a_folder_is_called_by_its_name_and_finds_results_beside_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained.parent / "results" / "results.json", trained)
    assert main(["card", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert 'from_pretrained("ibke-tiny")' in shown and [TITLES["reliability"], "99.1"] in markdown_rows(shown)
    assert {entry.metric_type for entry in ModelCard(shown).data.eval_results} == {
        "reliability",
        "generality",
        "exact_match",
    }


@pytest.mark.parametrize("arguments", [["--check"], ["--out", "x"], ["--needs"]])
def test_options_of_other_cards_are_refused(
    arguments: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(trained), *arguments]) == 2
    assert f"{arguments[0]} belongs to the cards of this package" in capsys.readouterr().err
    assert main(["card", str(trained), "--results", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_folder_without_an_editor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ASSETS / "records", tmp_path / "records")
    (tmp_path / "empty").mkdir()
    assert main(["card", str(tmp_path / "records")]) == 2
    assert "holds records, whose card `ibke push` writes" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "empty")]) == 2
    assert "neither an editor, an edit nor records" in capsys.readouterr().err
