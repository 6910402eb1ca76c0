"""What goes to the Hub with an editor or an edit: a card, results, the code that reads it, in one commit and without a pickle."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HfHubHTTPError
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from ..core.adapter_files import NETWORK_ERRORS, save_edit, with_uniform_rank
from ..core.edits import LowRankEdit
from ..evaluation.scores import REPORTED

RESULTS, CARD, EVAL_RESULTS = "results.json", "README.md", ".eval_results"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
GENERATED = ("exact_match",)  # by greedy generation; the other scores are teacher-forced
LIBRARY, TAGS = "ibke-hf", ("knowledge-editing", "model-editing")
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
MOST_REQUESTS = 20  # that a card lists
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
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CUT: tuple[type[Exception], ...] = (
    RuntimeError,
    *NETWORK_ERRORS,
)  # RuntimeError: what the client makes of a large file that was cut


class PickleError(ValueError):
    """A file that may hold a pickle, which is never uploaded; the message names it."""


class UploadError(OSError):
    """An upload that was cut; the message names the repository, which is as it was before."""


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload",
    commit_description: str | None = None,
    replaces: Sequence[str] = (),
) -> CommitInfo:
    """Publish a folder in one commit: readers see all of it or what was there before.

    Args:
        folder: What to publish, with all that is in it.
        repo_id: Repository, made if it does not exist.
        repo_type: ``"model"``, ``"dataset"`` or ``"space"``, which is one of Gradio.
        private: Make a new repository private.
        token: Token with write access; by default the one that you are logged in with.
        revision: Branch to commit to, made if it does not exist.
        create_pr: Open a pull request with the commit instead.
        commit_message: Title of the commit.
        commit_description: Text below it.
        replaces: Patterns of files that are removed from the repository by the same commit, unless they are in the
            folder.

    Returns:
        The commit's information, with `commit_url`, `oid` and, of a pull request, `pr_url` and `pr_revision`.

    Raises:
        PickleError: If the folder holds a file that may be a pickle; nothing is sent then.
        UploadError: If the connection breaks; the repository is as it was, and another call finishes the upload.
        HfHubHTTPError: If the Hub refuses, such as for a token without write access.
    """
    refuse_pickles(folder)
    api, sdk = HfApi(token=token), "gradio" if repo_type == "space" else None
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            delete_patterns=list(replaces) or None,
        )
    except HfHubHTTPError:
        raise
    except CUT as error:
        raise UploadError(
            f"{repo_id}: the upload was cut ({error.__cause__ or error}); the repository is as it was before, "
            f"push again to finish"
        ) from error


def refuse_pickles(folder: str | Path) -> None:
    """Raise unless the folder is free of files that may hold pickles.

    Raises:
        PickleError: Naming the first such file.
    """
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise PickleError(
                f"{path}: may hold a pickle, which can run code on the machine that loads it, and is not uploaded; "
                "save weights as safetensors and remove the file"
            )


# --- editors ------------------------------------------------------------------------------------------------------


def push_editor(
    editor: Any,
    repo_id: str,
    *,
    results: Mapping[str, Any] | str | Path | None = None,
    scores: Mapping[str, float] | None = None,
    card: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "50GB",
    **options: Any,
) -> CommitInfo:
    """Publish an editor's weights, config, card, results and code in one commit.

    Args:
        editor: A gradient editor, such as :class:`~ibke_hf.IBKEEditor`.
        repo_id: Repository, made if it does not exist.
        results: What `ibke eval` made: the folder, its ``results.json`` or what that holds.
        scores: The last validation of a training run, by the Trainer's names.
        card: Text of a card of your own, in place of :func:`editor_card`'s.
        metadata: Metadata of the card, such as ``license`` or ``datasets``.
        max_shard_size: Largest size of a file of weights.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of :func:`upload`.

    Returns:
        The commit's information.

    Raises:
        ValueError: If the results are not those of `ibke eval`.
        UploadError: If the upload is cut; another call finishes it.
    """
    found = read_results(results)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        editor.save_pretrained(folder, max_shard_size=max_shard_size)
        _change_config(folder, backbone=public_name(editor.config.backbone))
        remote = write_code(editor, folder)
        if found is not None:
            write_results(found, folder)
        text = card or editor_card(editor, repo_id, results=found, scores=scores, remote=remote, **(metadata or {}))
        ModelCard(str(text)).save(folder / CARD)
        return upload(folder, repo_id, replaces=WEIGHTS, **{"commit_message": "Add the editor", **options})


def write_code(editor: Any, folder: Path) -> bool:
    """Put the code of a saved editor beside it, for `trust_remote_code` where `ibke_hf` is not installed.

    Returns:
        False, and nothing is written, for editors whose code does not travel, see :func:`code_files`.
    """
    files = code_files(editor)
    for needed in files:
        shutil.copyfile(needed, folder / Path(needed).name)
    if files:
        names = {auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in _classes(editor)}
        _change_config(folder, auto_map=names)
    return bool(files)


def code_files(editor: Any) -> set[str]:
    """Return the files of an editor's code that travel with it: none unless they are flat siblings with relative imports (not MEND's)."""
    own = [str(sys.modules[kind.__module__].__file__) for _, kind in _classes(editor)]
    if any(name.startswith(".") for file in own for name in get_relative_imports(file)):
        return set()
    return {*own, *chain.from_iterable(map(get_relative_import_files, own))}


def _classes(editor: Any) -> list[tuple[str, Any]]:
    return [("AutoConfig", type(editor.config)), ("AutoModel", type(editor))]


def _change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    own = f"from ibke_hf import EditRequest, {kind.__name__}"
    imports = (
        f"from ibke_hf import EditRequest\nfrom {kind.__module__} import {kind.__name__}"
        if ".editors." in kind.__module__
        else own
    )
    backbone, layers = public_name(editor.config.backbone), ", ".join(editor.config.module_names())
    summary = getattr(kind, "card_summary", "") or f"turns edit requests into low-rank edits of {layers}."
    summary = f"`{kind.__name__}`{f' for {backbone}' if backbone else ''}: {summary}"
    use = [fenced(INSTALLED.format(imports=imports, name=kind.__name__, id=repo_id) + USE)]
    if remote:
        use += [
            "Where `ibke_hf` is not installed, with torch and transformers alone:",
            fenced(REMOTE.format(id=repo_id) + USE),
        ]
    found = (
        ", ".join(f"{name} {scores[f'eval_{name}']:.2f}" for name in ("loss", *REPORTED) if f"eval_{name}" in scores)
        if scores
        else ""
    )
    last = [f"Last validation: {found}."] if found else []
    sections = {"Use": use, "Training": last, "Results": _results_table(results) if results else []}
    data = editor_metadata(editor.config.backbone, name, [results] if results else [], **metadata)
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
        {"model_name": name, "eval_results": [entry for found in results for entry in _model_index(found)]}
        if results
        else {}
    )
    return ModelCardData(**{"library_name": LIBRARY, "tags": list(TAGS), **_base_model(backbone), **index, **metadata})


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


def _base_model(backbone: str) -> dict[str, str]:
    return {"base_model": backbone, "base_model_relation": "adapter"} if public_name(backbone) else {}


def public_name(name: str) -> str:
    """Return a name that may be an id of the Hub, and "" for those of folders, which are nobody else's business."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else ""


# --- results ------------------------------------------------------------------------------------------------------


def read_results(results: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    """Return what ``results.json`` of `ibke eval` holds.

    Args:
        results: The folder, the file or what it holds; None stays None.

    Raises:
        ValueError: If it is something else; names the file.
    """
    if results is None:
        return None
    where, content = "results", results
    if not isinstance(results, Mapping):
        file = Path(results) / RESULTS if Path(results).is_dir() else Path(results)
        where = str(file)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); evaluate again") from error
    parts = [content.get(name) for name in ("overall", "settings")] if isinstance(content, Mapping) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            f"{where}: holds no `overall` and `settings`, as `ibke eval` writes them; give its --out folder"
        )
    return dict(content)  # type: ignore[arg-type]


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and, for a dataset of the Hub, the scores as ``.eval_results``, which the Hub's pages show."""
    (folder / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    dataset = str(results["settings"].get("dataset"))
    if "/" not in public_name(dataset):
        return
    target = folder / EVAL_RESULTS / f"{dataset.rpartition('/')[2]}.yaml"
    target.parent.mkdir()
    target.write_text(eval_results_text({"": results}), encoding="utf-8")


def eval_results_text(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return evaluations on a dataset of the Hub in the form of ``.eval_results/*.yaml``.

    Args:
        evaluations: What ``results.json`` of each holds, by what its tasks are called before the score, such as
            ``"test_"``.
    """
    entries = [
        EvalResultEntry(
            dataset_id=str(results["settings"]["dataset"]),
            task_id=f"{prefix}{name}",
            value=value,
            notes=_notes(results, name),
        )
        for prefix, results in evaluations.items()
        for name, value in _scores(results)
    ]
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _scores(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the scores that are there, as plain numbers: NumPy's would become Python objects in YAML."""
    values = [(name, results["overall"].get(name)) for name in REPORTED]
    return [(name, round(float(value), 2)) for name, value in values if value is not None and math.isfinite(value)]


def _model_index(results: Mapping[str, Any]) -> list[EvalResult]:
    dataset = _dataset_of(results)
    split = results["settings"].get("split")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in _scores(results)
    ]


def _dataset_of(results: Mapping[str, Any]) -> str:
    """Return the dataset's name; of a path, its last part."""
    name = str(results["settings"].get("dataset") or "records")
    return public_name(name) or Path(name).name


def _notes(results: Mapping[str, Any], score: str = "") -> str:
    settings = results["settings"]
    number, mode = settings.get("sequential", 1), settings.get("mode", "sequential")
    carried = "one edit at a time" if number == 1 else f"{number} edits at once, {mode}"
    return (
        f"{results.get('records', '?')} records, {carried}, "
        f"{'greedy generation' if score in GENERATED else 'teacher-forced'}"
    )


def _results_table(results: Mapping[str, Any]) -> list[str]:
    table = "\n".join(
        ["| score | percent |", "|---|---|", *(f"| {name} | {value:.1f} |" for name, value in _scores(results))]
    )
    said = f"{_dataset_of(results)}: {_notes(results)}; {', '.join(GENERATED)} is of greedy generation."
    return [f"{said} By criterion and hop count in `{RESULTS}`.", table]


# --- edits --------------------------------------------------------------------------------------------------------


def push_edit(
    edit: LowRankEdit,
    repo_id: str,
    *,
    max_rank: int | None = None,
    rank: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> CommitInfo:
    """Publish an edit as a LoRA adapter with a card, in one commit.

    Args:
        edit: A single edit; of several independent ones push ``edit[i]``.
        repo_id: Repository, made if it does not exist.
        max_rank: See :func:`~ibke_hf.core.adapter_files.save_edit`; the card states the relative error.
        rank: See :func:`~ibke_hf.core.adapter_files.save_edit`.
        metadata: Metadata of the card, such as ``license``.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of :func:`upload`.

    Returns:
        The commit's information.

    Raises:
        ValueError: As :func:`~ibke_hf.core.adapter_files.save_edit` does.
        UploadError: If the upload is cut; another call finishes it.
    """
    edit = with_uniform_rank(edit, max_rank, rank)
    edit = replace(
        edit, info=replace(edit.info, editor=public_name(edit.info.editor), backbone=public_name(edit.info.backbone))
    )
    with tempfile.TemporaryDirectory() as folder:
        save_edit(edit, folder)
        edit_card(edit, repo_id, **(metadata or {})).save(Path(folder) / CARD)
        return upload(folder, repo_id, **{"commit_message": "Add the edit", **options})


def edit_card(edit: Any, repo_id: str, **metadata: Any) -> ModelCard:
    """Write the card of a low-rank edit: requests, backbone, editor, scores, how to load it with PEFT and with us.

    Args:
        edit: A :class:`~ibke_hf.LowRankEdit`, as it is published.
        repo_id: Where it is published.
        metadata: Metadata of the card.
    """
    info, rank = edit.info, max(edit.ranks.values())
    data = ModelCardData(
        **{
            "library_name": "peft",
            "tags": ["lora", "knowledge-editing", "model-editing", "ibke-hf"],
            **_base_model(info.backbone),
            **metadata,
        }
    )
    shown, more = info.requests[:MOST_REQUESTS], len(info.requests) - MOST_REQUESTS
    lines = [
        f"{json.dumps(r.prompt, ensure_ascii=False)} -> {json.dumps(r.target, ensure_ascii=False)}" for r in shown
    ]
    requests = (
        fenced("\n".join(lines) + (f"\nand {more} more, see edit.json" if more > 0 else ""), "text")
        if lines
        else "Not stated."
    )
    scores = ", ".join(f"{name} {value:.1f}" for name, value in info.scores.items())
    facts = {
        "edited layers": ", ".join(edit.layers),
        "rank": f"{rank}, alpha {rank}",
        "editor": public_name(info.editor),
        "backbone": public_name(info.backbone),
        "scores": scores,
    }
    if edit.relative_error:
        layer, worst = max(edit.relative_error.items(), key=lambda item: item[1])
        facts["truncation"] = f"by SVD to rank {rank}; relative error of the update at most {worst:.2g} ({layer})"
    blocks = [
        f"# {repo_id.rpartition('/')[2]}",
        "A knowledge edit of a language model as a LoRA adapter. The edited model answers:",
        requests,
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if value),
        "With PEFT (on a 16-bit model, pass `autocast_adapter_dtype=False` as well):",
        fenced(f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{repo_id}")'),
        "With `ibke_hf`, for the length of a block and undone exactly after it:",
        fenced(
            f'from ibke_hf import LowRankEdit\n\nedit = LowRankEdit.from_pretrained("{repo_id}")\nwith '
            f"edit.attached(model):\n    ..."
        ),
    ]
    return ModelCard(page(data, blocks))


def fenced(text: str, language: str = "python") -> str:
    """Fence a text, by more backticks than it has in a row itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def page(data: Any, blocks: Sequence[str]) -> str:
    """Return the text of a card: its metadata, then blocks of Markdown."""
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n"
