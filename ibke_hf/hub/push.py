"""Publishes an editor, an edit or records, or a folder as what it is (`ibke push`), in one commit with a card."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard

from ..core.adapter_files import CONFIG as ADAPTER_CONFIG
from ..core.adapter_files import INFO as EDIT_INFO
from ..core.adapter_files import with_uniform_rank
from ..core.adapter_schema import KEYS, PARTS
from ..core.composition import SolvedEdit
from ..core.edits import LowRankEdit
from ..data.files import record_files
from ..data.rows import records_dataset
from ..data.sources import SPLITS
from ..editors.catalogue import TRAINED
from ..editors.saved import load_low_rank_edit, unmergeable
from ..io import read_json
from ..loading import load_editor
from .cards.dataset import ROWS, dataset_card
from .cards.edit import edit_card
from .cards.editor import editor_card
from .cards.results import RESULTS, read_results, write_results
from .cards.text import CARD, public_name
from .remote_code import change_config, write_code
from .upload import upload

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SPLIT = re.compile(r"\w+")


def push_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a folder that :class:`IBKETrainer`, `ibke edit`, `ibke data build` and their kin have written.

    Args:
        folder: The folder of an editor, of an edit or of records.
        repo_id: Repository, made if it does not exist.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of
            :func:`~ibke_hf.hub.upload.upload`, `metadata` of the card, `results` of an editor and `max_rank` of an
            edit.

    Returns:
        The commit's information.

    Raises:
        ValueError: If the folder is none of them; says what was found.
        FileNotFoundError: If there is no such folder.
        UploadError: If the upload is cut; another call finishes it.
    """
    push: Callable[..., CommitInfo] = {
        "editor": push_editor_folder,
        "edit": push_edit_folder,
        "records": push_records,
    }[folder_kind(folder)]
    return push(folder, repo_id, **options)


def folder_kind(folder: str | Path) -> str:
    """Tell what a folder holds: ``"editor"``, ``"edit"`` or ``"records"``.

    Raises:
        ValueError: If it is none of them; says what was found.
        FileNotFoundError: If there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that holds an editor, an edit or records")
    if (path / ADAPTER_CONFIG).exists():
        return "edit"
    if (path / EDIT_INFO).exists():
        kind = _field(path / EDIT_INFO, "kind", "edit") or "dense"
        if kind != "dense":
            raise ValueError(f"{folder}: {unmergeable(str(kind))}")
        raise ValueError(
            f"{folder}: holds a dense edit, which is as large as the weights that it changes and no LoRA adapter; "
            f"write the edited model with `ibke merge --edit {folder} --out DIR` and push that"
        )
    if (path / "config.json").exists():
        kind = _field(path / "config.json", "model_type", "editor")
        if kind not in TRAINED:  # ids of editors are their model types
            raise ValueError(
                f"{folder}: holds a model of type {kind!r}, not an editor ({', '.join(TRAINED)}); push it with "
                f"transformers"
            )
        return "editor"
    if record_splits(path):
        return "records"
    contents = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{folder}: neither an editor, an edit nor records; found {contents}")


def _field(file: Path, name: str, what: str) -> Any:
    """Return a field of a JSON file, None where it is absent."""
    return read_json(file, cure=f"save the {what} again").get(name)


def push_editor_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a saved editor, with the ``results.json`` and the card that lie beside it, if they do, and nothing else.

    Args:
        folder: What `save_pretrained` has written.
        repo_id: Repository, made if it does not exist.
        options: See :func:`~ibke_hf.hub.push.push_editor`.

    Raises:
        OSError: If there are no weights.
        UploadError: If the upload is cut; another call finishes it.
    """
    path = Path(folder)
    editor = load_editor(path)
    if options.get("results") is None and (path / RESULTS).exists():
        options["results"] = path / RESULTS
    if options.get("card") is None and (path / CARD).exists():
        options["card"] = (path / CARD).read_text(encoding="utf-8")
    return push_editor(editor, repo_id, **options)


def push_edit_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a saved edit; see :func:`~ibke_hf.hub.push.push_edit`.

    Raises:
        AdapterError: If it cannot be read as an edit.
        UploadError: If the upload is cut; another call finishes it.
    """
    return push_edit(load_low_rank_edit(folder), repo_id, **options)


# --- editors and edits ---------------------------------------------------------------------------------------------


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
    evaluation = read_results(results)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        editor.save_pretrained(folder, max_shard_size=max_shard_size)
        change_config(folder, base_model_name_or_path=public_name(editor.config.base_model_name_or_path))
        remote = write_code(editor, folder)
        if evaluation is not None:
            write_results(evaluation, folder)
        text = card or editor_card(
            editor, repo_id, results=evaluation, scores=scores, remote=remote, **(metadata or {})
        )
        ModelCard(str(text)).save(folder / CARD)
        return upload(folder, repo_id, replaces=WEIGHTS, **{"commit_message": "Add the editor", **options})


def push_edit(
    edit: LowRankEdit | SolvedEdit,
    repo_id: str,
    *,
    max_rank: int | None = None,
    rank: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> CommitInfo:
    """Publish an edit as a LoRA adapter with a card, in one commit; its keys and parts lie beside the adapter.

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
    public = _with_public_names(edit)
    adapter = with_uniform_rank(public.low_rank() if isinstance(public, SolvedEdit) else public, max_rank, rank)
    with tempfile.TemporaryDirectory() as folder:
        public.save_pretrained(folder, max_rank=max_rank, rank=rank)
        parts = (Path(folder) / PARTS).exists()
        edit_card(adapter, repo_id, parts=parts, **(metadata or {})).save(Path(folder) / CARD)
        replaced = {"replaces": [KEYS, PARTS], "commit_message": "Add the edit"}
        return upload(folder, repo_id, **{**replaced, **options})


def _with_public_names(edit: Any) -> Any:
    """Return an edit that says of no folder of this machine that it was made by or for."""
    info = replace(edit.info, editor=public_name(edit.info.editor), backbone=public_name(edit.info.backbone))
    parts = {"parts": tuple(map(_with_public_names, edit.parts))} if isinstance(edit, SolvedEdit) else {}
    return replace(edit, info=info, **parts)


# --- records ------------------------------------------------------------------------------------------------------


def record_splits(folder: str | Path) -> dict[str, Path]:
    """Return the folders of record files by split: those inside, or the folder itself (``train`` unless named so)."""
    path = Path(folder)
    if record_files(path):
        return {SPLITS.get(path.resolve().name.lower(), "train"): path}
    return {
        SPLITS.get(inner.name.lower(), inner.name): inner
        for inner in sorted(path.iterdir())
        if inner.is_dir() and record_files(inner)
    }


def push_records(
    folder: str | Path, repo_id: str, *, metadata: Mapping[str, Any] | None = None, **options: Any
) -> CommitInfo:
    """Publish a folder of records as a dataset: the files as they are, rows as Parquet for `datasets`, and a card.

    Args:
        folder: What `ibke data build` has written, or record files of any native format, in a folder for each split.
        repo_id: Repository, made if it does not exist.
        metadata: Metadata of the card, such as ``license``.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of
            :func:`~ibke_hf.hub.upload.upload`.

    Returns:
        The commit's information.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If there are no record files, or a split has a name that `datasets` does not take.
        RecordError: If a split has no record, or one that is unreadable; names file and record.
        UploadError: If the upload is cut; another call finishes it.
    """
    splits = record_splits(folder)
    bad = [name for name in splits if not SPLIT.fullmatch(name)]
    if bad or not splits:
        raise ValueError(
            f"{folder}: "
            + (f"the split {bad[0]!r} must be named by letters, digits and _" if bad else "no record file in it")
        )
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "repository"
        numbers = {name: _copy_split(name, source, target, Path(scratch) / "cache") for name, source in splits.items()}
        dataset_card(repo_id, numbers, **(metadata or {})).save(target / CARD)
        settings = {
            "commit_message": "Add the records",
            "replaces": [f"{ROWS}/*.parquet", *(f"{name}/*" for name in splits)],
            **options,
        }
        return upload(target, repo_id, repo_type="dataset", **settings)


def _copy_split(name: str, source: Path, target: Path, cache: Path) -> dict[str, int]:
    """Put the files and the rows of a split into a folder; return the number of records, requests and cases."""
    rows: Any = records_dataset(source, cache_dir=cache)
    for folder in (target / ROWS, target / name):
        folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(target / ROWS / f"{name}.parquet")
    for file in record_files(source):
        shutil.copyfile(file, target / name / file.name)
    return {
        "records": len(rows),
        **{kind: sum(map(len, rows[kind])) for kind in ("requests", "generality", "locality")},
    }
