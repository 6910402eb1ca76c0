"""The code of an editor that travels with its weights, for `trust_remote_code` where `ibke_hf` is not installed."""

from __future__ import annotations

import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from ..io import read_json, write_json


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
        change_config(folder, auto_map=names)
    return bool(files)


def code_files(editor: Any) -> set[str]:
    """Return the files of an editor's code that travel with it.

    None do unless all are flat siblings with relative imports, as the core's are and MEND's are not.
    """
    class_files = [str(sys.modules[kind.__module__].__file__) for _, kind in _classes(editor)]
    if any(name.startswith(".") for file in class_files for name in get_relative_imports(file)):
        return set()
    return {*class_files, *chain.from_iterable(map(get_relative_import_files, class_files))}


def _classes(editor: Any) -> list[tuple[str, Any]]:
    return [("AutoConfig", type(editor.config)), ("AutoModel", type(editor))]


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields in the ``config.json`` of a saved editor."""
    file = folder / "config.json"
    content = read_json(file, cure="save the editor again") | fields
    write_json(file, dict(sorted(content.items())), indent=2)
