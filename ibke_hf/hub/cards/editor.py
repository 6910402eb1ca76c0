"""The card of an editor: its backbone and layers, how to load it, results. The one template of all editors' cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ...evaluation.scores import REPORTED
from .results import model_index, results_table
from .text import LIBRARY, TAGS, base_model_metadata, fenced, page, public_name

SECTIONS = (
    "Use",
    "Train it",
    "Evaluate and publish",
    "Needs",
    "Training",
    "Where it fails",
    "Results",
    "Data",
    "What is the paper's and what is ours",
)
INSTALLED = """{imports}

editor = {name}.from_pretrained("{id}")
"""
REMOTE = """from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

editor = AutoModel.from_pretrained("{id}", trust_remote_code=True)
EditRequest = get_class_from_dynamic_module("records.EditRequest", "{id}")
"""
USE = """edit = editor.edit(model, tokenizer, [EditRequest("The capital of Australia is", "Sydney")])
with edit.attached(model):
    ...  # model.generate(...)"""


def editor_card(
    editor: Any,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
    remote: bool = False,
    **metadata: Any,
) -> ModelCard:
    """Write the card of an editor: its backbone and layers, how to load it, results.

    Args:
        editor: The editor.
        repo_id: Where it is published.
        results: What ``results.json`` of `ibke eval` holds.
        scores: The last validation of a training run.
        remote: Say how to load it where `ibke_hf` is not installed.
        metadata: Metadata of the card.
    """
    kind, name = type(editor), repo_id.rpartition("/")[2]
    imports = f"from ibke_hf import EditRequest, {kind.__name__}"
    if ".editors." in kind.__module__:
        home = kind.__module__.removesuffix(".editor")  # the room of a rival that has one
        imports = f"from ibke_hf import EditRequest\nfrom {home} import {kind.__name__}"
    backbone, layers = public_name(editor.config.base_model_name_or_path), ", ".join(editor.config.module_names())
    summary = getattr(kind, "card_summary", "") or f"turns edit requests into low-rank edits of {layers}."
    summary = f"`{kind.__name__}`{f' for {backbone}' if backbone else ''}: {summary}"
    use = [fenced(INSTALLED.format(imports=imports, name=kind.__name__, id=repo_id) + USE)]
    if remote:
        use += [
            "Where `ibke_hf` is not installed, with torch and transformers alone:",
            fenced(REMOTE.format(id=repo_id) + USE),
        ]
    validation = ", ".join(
        f"{name} {scores[f'eval_{name}']:.2f}" for name in ("loss", *REPORTED) if scores and f"eval_{name}" in scores
    )
    last = [f"Last validation: {validation}."] if validation else []
    sections = {"Use": use, "Training": last, "Results": results_table(results) if results else []}
    data = editor_metadata(editor.config.base_model_name_or_path, name, [results] if results else [], **metadata)
    return ModelCard(editor_page(data, name, [summary], sections))


def editor_metadata(
    backbone: str, name: str, results: Sequence[Mapping[str, Any]] = (), **metadata: Any
) -> ModelCardData:
    """Return the metadata of an editor's card, with the results of each evaluation as its model-index.

    Args:
        backbone: Its id on the Hub; a folder, or a backbone that is not there, is left out.
        name: Name of the editor.
        results: What ``results.json`` of each evaluation holds.
        metadata: Further fields, which win.
    """
    index = (
        {"model_name": name, "eval_results": [entry for evaluation in results for entry in model_index(evaluation)]}
        if results
        else {}
    )
    return ModelCardData(
        **{"library_name": LIBRARY, "tags": list(TAGS), **base_model_metadata(backbone), **index, **metadata}
    )


def editor_page(
    data: ModelCardData, name: str, summary: Sequence[str], sections: Mapping[str, Sequence[str]], *, status: str = ""
) -> str:
    """Return the text of an editor's card, published or not: the one template of them all.

    Args:
        data: The metadata.
        name: Title of the card.
        summary: Paragraphs below it.
        sections: Paragraphs by the title of their section, one of `SECTIONS`, which gives their order; empty ones are
            left out.
        status: First line, before the title, of an editor that is not published.
    """
    parts = [(f"## {title}", *sections[title]) for title in sorted(sections, key=SECTIONS.index) if sections[title]]
    return page(data, [*([status] if status else []), f"# {name}", *summary, *chain.from_iterable(parts)])
