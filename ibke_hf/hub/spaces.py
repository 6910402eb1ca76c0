"""Spaces: a folder of `spaces/` and our code that it imports -> a folder that runs as it is -> the Hub."""

from __future__ import annotations

import ast
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, SpaceCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..evaluation.space import METRIC, write_metric
from ..io import parse_yaml, read_text
from .cards.text import CARD
from .upload import upload

REQUIREMENTS = "requirements.txt"
PACKAGE, METRIC_PAGE = "ibke_hf", "metric_page"
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
CODE = ("*.py", f"{PACKAGE}/*")  # of an earlier push; what is not in the folder any more goes
EXAMPLE = f"such as spaces/{METRIC} of a clone of this project"


def push_space(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Publish a Space, with the code of ours that it needs, in one commit.

    Args:
        folder: See :func:`assemble`.
        repo_id: Space, made if it does not exist; that of a metric is named as the metric, or ``evaluate.load`` does
            not find it.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, … of
            :func:`~ibke_hf.hub.upload.upload`.

    Returns:
        The commit's information.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing in it.
        ValueError: If it is no Space of ours, or the id does not suit it.
        PickleError: If it holds a file that may be a pickle; nothing is sent then.
        UploadError: If the upload is cut; the Space is as it was, and another call finishes it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = assemble(folder, Path(scratch) / "space")
        if (target / f"{METRIC_PAGE}.py").exists() and repo_id.rpartition("/")[2] != METRIC:
            owner = repo_id.rpartition("/")[0] or "org"
            raise ValueError(
                f"{repo_id}: evaluate.load finds a metric in a Space of its own name alone; push to {owner}/{METRIC}"
            )
        return upload(
            target, repo_id, repo_type="space", replaces=CODE, **{"commit_message": "Add the Space", **options}
        )


def assemble(folder: str | Path, target: str | Path) -> Path:
    """Write a folder that runs by ``python app.py``: a Space's own files and the code of ours that they import.

    Beside a page that imports ``ibke_hf`` goes this package as it is installed here, beside one that imports
    ``metric_page`` that module with the metric and its formulas.

    Args:
        folder: ``app.py``, ``README.md`` with the Space's settings, and ``requirements.txt``; files named with a dot
            are left out.
        target: Where to write; a new or empty folder.

    Returns:
        The target.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing in it.
        FileExistsError: If the target is not empty.
        ValueError: If the README has no settings of a Gradio Space, the page imports nothing of ours, or the target
            lies in the folder.
    """
    source, target = Path(folder), Path(target)
    app = _app_file(source)
    bring = _needs(source, app)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists and is not empty; give a new folder or remove it")
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target}: lies in {source}, which is copied there; give a folder outside")
    shutil.copytree(source, target, ignore=NOT_COPIED, dirs_exist_ok=True)
    bring(target)
    return target


def read_settings(folder: str | Path) -> SpaceCardData:
    """Return the settings of a Gradio Space, which stand at the head of its README.

    Raises:
        FileNotFoundError: If there is no README.
        ValueError: If it has no such settings; names the one that is missing.
    """
    file = Path(folder) / CARD
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; it states the Space's settings (title, sdk, sdk_version, app_file) between two ---"
        )
    text = read_text(file, cure="save it in UTF-8")
    head = REGEX_YAML_BLOCK.search(text)
    cure = "correct the Space's settings between the first two ---"
    settings = parse_yaml(head.group(2) if head else "", name=str(file), cure=cure)
    try:
        data = SpaceCardData(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a Space ({error}); {cure}") from error
    if data.sdk != "gradio":
        raise ValueError(
            f"{file}: must begin with the Space's settings between two ---, with `sdk: gradio`; found sdk {data.sdk!r}"
        )
    for name in ("title", "sdk_version", "app_file"):
        if not isinstance(getattr(data, name), str):
            raise ValueError(f"{file}: the settings need `{name}`, a text; found {getattr(data, name)!r}")
    return data


def _app_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder in {Path.cwd()}; give the folder of a Space, {EXAMPLE}")
    app = folder / str(read_settings(folder).app_file)
    for file in (app, folder / REQUIREMENTS):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; a Space holds {app.name}, {CARD} and {REQUIREMENTS}, {EXAMPLE}"
            )
    return app


def _needs(folder: Path, app: Path) -> Callable[[Path], None]:
    """Tell which code of ours a page imports, as what copies it."""
    names = _imports(app)
    for name, bring in ((PACKAGE, _bring_package), (METRIC_PAGE, _bring_metric)):
        if name in names:
            return bring
    raise ValueError(
        f"{app}: imports neither {PACKAGE} nor {METRIC_PAGE}, so {folder} needs nothing of ours; push it with "
        f"`hf upload`"
    )


def _imports(file: Path) -> set[str]:
    """Return the top-level names of what a file imports, also inside functions."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file}: not Python ({error})") from error
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in named}


def _bring_package(target: Path) -> None:
    shutil.rmtree(target / PACKAGE, ignore_errors=True)  # of a folder that was assembled before
    shutil.copytree(Path(__file__).parents[1], target / PACKAGE, ignore=_not_of_a_page)


def _bring_metric(target: Path) -> None:
    write_metric(target)
    shutil.copyfile(Path(__file__).parents[1] / "evaluation" / f"{METRIC_PAGE}.py", target / f"{METRIC_PAGE}.py")


def _not_of_a_page(folder: str, names: list[str]) -> set[str]:
    """Leave out what no page reads: the embedded model's second editor and test records, which comparisons load."""
    return NOT_COPIED(folder, names) | ({"mend", "records"} if Path(folder).name == "assets" else set())
