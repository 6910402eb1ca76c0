"""Spaces: settings that the Hub takes, folders that run on their own, one commit, refusals that name the cure."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_clients import without_waiting
from loopback_hub import LoopbackHub
from paths import ROOT

import ibke_hf
from ibke_hf.cli import main
from ibke_hf.evaluation import metric_page, scores
from ibke_hf.hub.spaces import CODE, assemble, push_space, read_settings
from ibke_hf.hub.upload import UploadError

METRIC = ROOT / "spaces" / "edit_quality"
SPACES = sorted(file.parent for file in (ROOT / "spaces").glob("*/README.md"))
ID = "org/edit_quality"
SETTINGS = "---\ntitle: Mine\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n\n# Mine\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A Space whose page imports this package and says from where."""
    folder = tmp_path / "mine"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__pycache__" / "app.pyc").write_bytes(b"x")
    (folder / "README.md").write_text(SETTINGS)
    (folder / "requirements.txt").write_text("torch\n")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "logo.svg").write_text("<svg/>")
    (folder / "app.py").write_text("import ibke_hf.atlas\n\nprint(ibke_hf.__file__)\nibke_hf.atlas.load_backbone()\n")
    return folder


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails; return the line on stderr."""

    def run(*arguments: object) -> str:
        assert main(["spaces", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


# --- the Spaces of the repository -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", SPACES, ids=lambda folder: folder.name)
def test_settings_are_those_that_ci_tests(folder: Path) -> None:
    settings = read_settings(folder)
    pinned = dict(
        line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert settings.sdk_version == pinned["gradio"]
    assert (folder / str(settings.app_file)).is_file()
    assert settings.license == "apache-2.0"
    assert str(settings.python_version) in ("3.10", "3.11", "3.12", "3.13")
    assert len(getattr(settings, "short_description", "")) <= 60
    listed = [line.strip() for line in (folder / "requirements.txt").read_text().splitlines()]
    names = {re.split(r"[<>=\[ ]", line)[0] for line in listed if line and not line.startswith("#")}
    assert f"gradio=={pinned['gradio']}" in listed or "gradio" not in names
    assert names >= {"torch"}


def test_both_are_there() -> None:
    if not SPACES:
        pytest.skip("spaces/ is not beside the tests")
    assert [folder.name for folder in SPACES] == ["edit_quality", "ibke-editor"]


# --- assembly -------------------------------------------------------------------------------------------------------


def test_the_metric_brings_its_formulas_and_its_page(tmp_path: Path) -> None:
    target = assemble(METRIC, tmp_path / "edit_quality")
    assert files(target) == {
        "app.py",
        "README.md",
        "requirements.txt",
        "edit_quality.py",
        "scores.py",
        "metric_page.py",
    }
    for name, module in (("scores.py", scores), ("metric_page.py", metric_page)):
        assert (target / name).read_bytes() == Path(str(module.__file__)).read_bytes()
    assert not [
        file for file in target.glob("*.py") if re.search(r"^\s*(from|import) ibke_hf", file.read_text(), re.M)
    ]
    assert assemble(target, tmp_path / "again") and files(target) == files(
        tmp_path / "again"
    )  # what is assembled can be again


@pytest.mark.slow
def test_a_page_of_this_package_runs_on_the_copy_beside_it(mine: Path, tmp_path: Path) -> None:
    target = assemble(mine, tmp_path / "space")
    page_files = {"app.py", "README.md", "requirements.txt", "logo.svg"}
    assert {name for name in files(target) if not name.startswith("ibke_hf/")} == page_files
    package = Path(str(ibke_hf.__file__)).parent
    absent = ("__pycache__", "atlas/assets/mend/", "atlas/assets/records/")  # no page compares editors
    copied = {f"ibke_hf/{name}" for name in files(package) if not any(part in name for part in absent)}
    assert copied == files(target) - page_files
    assert sum(file.stat().st_size for file in target.rglob("*")) < 24_000_000
    done = subprocess.run([sys.executable, "app.py"], cwd=target, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{target / 'ibke_hf' / '__init__.py'}\n"), done.stderr
    (target / "ibke_hf" / "old.py").touch()
    assert "ibke_hf/old.py" not in files(assemble(target, tmp_path / "again"))


def test_build_says_how_to_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert main(["spaces", "build", str(METRIC), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: run it by `python app.py` there, with what requirements.txt lists\n"
    assert (
        refused("build", METRIC, "--out", out)
        == f"ibke spaces build: {out}: exists and is not empty; give a new folder or remove it"
    )
    assert "exists and is not empty" in refused("build", METRIC, "--out", out / "app.py")
    assert f"lies in {out}, which is copied there" in refused("build", out, "--out", out / "deeper")


# --- publishing -----------------------------------------------------------------------------------------------------


def test_the_command_pushes_in_one_commit(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["spaces", "push", str(METRIC), ID, "--private"]) == 0
    space = hub[f"spaces/{ID}"]
    assert capsys.readouterr().out == f"space: {hub.url}/spaces/{ID}/commit/{space.refs['main']}\n"
    assert (space.private, space.sdk, space.titles) == (True, "gradio", ["initial commit", "Add the Space"])
    target = assemble(METRIC, tmp_path / "space")
    assert space.files() == {".gitattributes": b"", **{name: (target / name).read_bytes() for name in files(target)}}
    assert (
        main(["spaces", "push", str(target), ID, "--create-pr", "--message", "Again"]) == 0
    )  # what was assembled can be pushed
    assert capsys.readouterr().out == f"space: {hub.url}/spaces/{ID}/discussions/1\n"
    assert space.files("refs/pr/1") == space.files()


def test_code_of_an_earlier_push_goes_and_other_files_stay(hub: LoopbackHub, mine: Path) -> None:
    (mine / "helper.py").touch()
    push_space(mine, "org/mine")
    hub["spaces/org/mine"].files()["ibke_hf/removed.py"] = hub["spaces/org/mine"].files()["picture.png"] = b"x"
    (mine / "helper.py").unlink()
    push_space(mine, "org/mine")
    pushed = hub["spaces/org/mine"].files()
    assert not {"helper.py", "ibke_hf/removed.py", ".env", "__pycache__/app.pyc"} & set(pushed)
    assert {
        "picture.png",
        "app.py",
        "logo.svg",
        "ibke_hf/__init__.py",
        "ibke_hf/atlas/assets/backbone/model.safetensors",
    } <= set(pushed)
    assert CODE == ("*.py", "ibke_hf/*")


@pytest.mark.parametrize("cut", ["lfs", "commit"])
def test_a_cut_upload_leaves_the_old_revision_and_a_retry_finishes(
    cut: str, hub: LoopbackHub, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waiting(monkeypatch)
    push_space(METRIC, ID)
    push_space(mine, "org/mine")
    before, old = hub["spaces/org/mine"].refs["main"], hub["spaces/org/mine"].files()
    (mine / "app.py").write_text("import ibke_hf\n")
    (mine / "new.safetensors").write_bytes(cut.encode())
    hub.cut = cut
    with pytest.raises(UploadError, match=r"org/mine: the upload was cut .* push again to finish"):
        push_space(mine, "org/mine")
    assert hub["spaces/org/mine"].refs["main"] == before
    assert hub["spaces/org/mine"].files() == old
    hub.cut = ""
    push_space(mine, "org/mine")
    assert hub["spaces/org/mine"].files()["app.py"] == b"import ibke_hf\n"
    assert len(hub["spaces/org/mine"].commits) == 3


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named_with_the_place(hub: LoopbackHub, refused: Callable[..., str]) -> None:
    line = refused("push", "edit_quality_", ID)
    assert line == (
        f"ibke spaces push: edit_quality_: no such folder in {Path.cwd()}; give the folder of a Space, "
        "such as spaces/edit_quality of a clone of this project"
    )
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", None, "README.md: no such file; it states the Space's settings"),
        ("app.py", None, "app.py: no such file; a Space holds app.py, README.md and requirements.txt"),
        ("requirements.txt", None, "requirements.txt: no such file; a Space holds"),
        ("README.md", "# Mine\n", "with `sdk: gradio`; found sdk None"),
        ("README.md", "# Mine\n\n" + SETTINGS, "README.md: must begin with the Space's settings"),
        ("README.md", SETTINGS.replace("gradio", "streamlit"), "found sdk 'streamlit'"),
        (
            "README.md",
            "---\na: [\n---\n",
            "README.md: not valid YAML",
        ),
        ("README.md", "---\n- 1\n---\n", "expected values by name, found list"),
        ("README.md", "---\n1: 2\n---\n", "1 is no name"),
        ("README.md", SETTINGS.replace("6.31.0", "6.31"), "the settings need `sdk_version`, a text; found 6.31"),
        ("README.md", SETTINGS.replace("app_file: app.py\n", ""), "the settings need `app_file`, a text; found None"),
        ("README.md", SETTINGS.replace("app.py", "main.py"), "main.py: no such file; a Space holds main.py"),
        ("app.py", "import os\n", "app.py: imports neither ibke_hf nor metric_page"),
        ("app.py", "from .ibke_hf import x\n", "app.py: imports neither ibke_hf nor metric_page"),
        ("app.py", "import (", "app.py: not Python ("),
        ("app.py", "\0", "app.py: not Python ("),
        ("optimizer.pt", "x", "optimizer.pt: may hold a pickle"),
    ],
)
def test_what_is_no_space_is_refused_and_nothing_is_sent(
    name: str, text: str | None, message: str, mine: Path, hub: LoopbackHub, refused: Callable[..., str]
) -> None:
    if text is None:
        (mine / name).unlink()
    else:
        (mine / name).write_text(text)
    assert message in refused("push", mine, "org/mine")
    assert hub.repositories == {}


def test_the_metric_is_pushed_under_its_name_alone(hub: LoopbackHub, refused: Callable[..., str]) -> None:
    line = refused("push", METRIC, "org/quality")
    assert line.endswith(
        "org/quality: evaluate.load finds a metric in a Space of its own name alone; push to org/edit_quality"
    )
    assert "push to org/edit_quality" in refused("push", METRIC, "quality")
    assert hub.repositories == {}
    assert "write access" in refused("push", METRIC, ID, "--token", "hf_reader")
