"""Uploads a folder to the Hub in one commit: all of it or nothing, and never a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..core.adapter_files import NETWORK_ERRORS

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
CUT: tuple[type[Exception], ...] = (
    RuntimeError,  # what the client makes of a large file that was cut
    *NETWORK_ERRORS,
)


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
