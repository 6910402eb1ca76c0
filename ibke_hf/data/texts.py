"""Plain texts, such as the corpus of key statistics, from a file, a folder or a dataset of the Hub."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ..io import FileError, parse_json

NUMBER = 20_000  # texts of a large dataset that are read unless more are asked for
COLUMN = "text"


def read_texts(source: str | Path, limit: int = NUMBER) -> list[str]:
    """Return the first texts of a source.

    Args:
        source: A file of one text in each line; a JSON Lines file of objects with a ``text``; or a folder or Hub id
            that `datasets` reads, with a column ``text`` in its split ``train``. A configuration follows its id after
            a colon, as in ``"wikimedia/wikipedia:20231101.en"``.
        limit: So many texts at most.

    Raises:
        FileNotFoundError: If there is no such file or folder, and the name is no id.
        ValueError: If there is no text.
        ImportError: If `datasets` is needed and not installed.
    """
    path = Path(source)
    texts = _of_file(path, limit) if path.is_file() else _of_dataset(str(source), limit)
    if not texts:
        raise ValueError(
            f"{source}: holds no text; give a corpus of one text in each line, or a dataset with a column {COLUMN!r}"
        )
    return texts


def _of_file(path: Path, limit: int) -> list[str]:
    if path.suffix in (".json", ".csv", ".parquet"):
        raise ValueError(
            f"{path}: give a corpus as plain lines or JSON Lines (.jsonl), or a folder that `datasets` reads"
        )
    try:
        with path.open(encoding="utf-8") as lines:
            filled = ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
            first = list(islice(filled, limit))
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not a text in UTF-8 ({error.reason}); save it in UTF-8") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in first]
    return [_text_of(line, f"{path}: line {number}") for number, line in first]


def _text_of(line: str, name: str) -> str:
    """Return the text of a line of JSON."""
    cure = f"each line must be a JSON object with a {COLUMN!r}"
    value = parse_json(line, name=name, cure=cure)
    text = value.get(COLUMN) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise FileError(f"{name}: found {line:.80}; {cure}")
    return text


def _of_dataset(name: str, limit: int) -> list[str]:
    if not Path(name).exists() and (name.startswith((".", "~", "/")) or "/" not in name):
        raise FileNotFoundError(f"{name}: no such file or folder, and no id of a dataset")
    try:
        import datasets
    except ImportError as error:
        raise ImportError('reading a dataset needs the extra "train": pip install "ibke-hf[train]"') from error
    place, _, configuration = name.partition(":")
    rows = datasets.load_dataset(place, configuration or None, split="train", streaming=True)
    if COLUMN not in (rows.column_names or [COLUMN]):
        raise ValueError(f"{name}: has no column {COLUMN!r}, found {', '.join(rows.column_names or [])}")
    return [text for row in islice(rows, limit) if (text := str(row[COLUMN]).strip())]
