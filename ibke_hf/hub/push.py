"""`ibke push`: publish a folder as what it is, an editor, an edit or records, in one commit with a card."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData

from ..core.adapter_files import CONFIG as ADAPTER_CONFIG
from ..core.adapter_files import INFO as EDIT_INFO
from ..core.edits import LowRankEdit
from ..data.files import record_files
from ..data.rows import records_dataset
from ..data.sources import SPLITS
from ..editors.catalogue import TRAINED, register_trained
from .publishing import CARD, RESULTS, push_edit, push_editor, upload

ROWS = "data"  # folder of the rows as Parquet, for `datasets`
SPLIT = re.compile(r"\w+")


def push_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a folder that :class:`IBKETrainer`, `ibke edit`, `ibke data build` and their kin have written.

    Args:
        folder: The folder of an editor, of an edit or of records.
        repo_id: Repository, made if it does not exist.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of
            :func:`~ibke_hf.hub.publishing.upload`, `metadata` of the card, `results` of an editor and `max_rank` of an
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
            raise ValueError(
                f"{folder}: holds a {kind} edit, which is no LoRA; upload the folder as it is, which its class loads"
            )
        raise ValueError(
            f"{folder}: holds a dense edit, which is as large as the weights that it changes and no LoRA; merge "
            f"it instead"
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
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{folder}: neither an editor, an edit nor records; found {found}")


def _field(file: Path, name: str, what: str) -> Any:
    """Return a field of a JSON file, None where it is absent."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); save the {what} again") from error
    return content.get(name) if isinstance(content, Mapping) else None


def push_editor_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a saved editor, with the ``results.json`` and the card that lie beside it, if they do, and nothing else.

    Args:
        folder: What `save_pretrained` has written.
        repo_id: Repository, made if it does not exist.
        options: See :func:`~ibke_hf.hub.publishing.push_editor`.

    Raises:
        OSError: If there are no weights.
        UploadError: If the upload is cut; another call finishes it.
    """
    from transformers import AutoModel

    register_trained()
    path = Path(folder)
    editor = AutoModel.from_pretrained(path, use_safetensors=True)
    if options.get("results") is None and (path / RESULTS).exists():
        options["results"] = path / RESULTS
    if options.get("card") is None and (path / CARD).exists():
        options["card"] = (path / CARD).read_text(encoding="utf-8")
    return push_editor(editor, repo_id, **options)


def push_edit_folder(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a saved edit; see :func:`~ibke_hf.hub.publishing.push_edit`.

    Raises:
        AdapterError: If it cannot be read as an edit.
        UploadError: If the upload is cut; another call finishes it.
    """
    return push_edit(LowRankEdit.from_pretrained(folder), repo_id, **options)


# --- records ------------------------------------------------------------------------------------------------------


def record_splits(folder: str | Path) -> dict[str, Path]:
    """Return the folders of record files by split: those inside, or the folder itself, which is ``train`` unless its name says more."""
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
            :func:`~ibke_hf.hub.publishing.upload`.

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
            f"{folder}: {f'the split {bad[0]!r} must be named by letters, digits and _' if bad else 'no record file in it'}"
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


def dataset_card(repo_id: str, numbers: Mapping[str, Mapping[str, int]], **metadata: Any) -> DatasetCard:
    """Write the card of a dataset of records: what is in each split, its columns, how to load it.

    Args:
        repo_id: Where it is published.
        numbers: By split, the number of records, requests, generality and locality cases.
        metadata: Metadata of the card.
    """
    files = [{"split": name, "path": f"{ROWS}/{name}.parquet"} for name in numbers]
    data = DatasetCardData(
        **{
            "tags": ["knowledge-editing", "model-editing", "ibke-hf"],
            "task_categories": ["text-generation"],
            "configs": [{"config_name": "default", "data_files": files}],
            **metadata,
        }
    )
    columns = list(next(iter(numbers.values())))
    table = ["| split | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    table += [
        f"| {name} | " + " | ".join(f"{row[column]:,}" for column in columns) + " |" for name, row in numbers.items()
    ]
    first = next(iter(numbers))
    text = f"""# {repo_id.rpartition("/")[2]}

Records for editing facts in language models: each has one or more edit requests, generality cases, whose answer must follow from
the edit, and locality cases, whose answer must not change.

{chr(10).join(table)}

Rows, with requests, cases and hops as lists:

```python
import datasets

rows = datasets.load_dataset("{repo_id}", split="{first}")
```

Records, read from the files of each domain one after another:

```python
from ibke_hf.data.sources import read_records

records = read_records("{repo_id}", split="{first}")
```

Columns: `id`, `dataset`, `domain`, `requests` (`prompt`, `target`, `subject`), `generality` and `locality` (`prompt`, `target`,
`criteria`, `hops`, `top_k`, `aliases`, `supporting`, `facts`, `name`), `edits` (the requests as triples), `kind` (counterfactual, or
unknown to the model), `relation`, `metadata`.
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
