"""A library of edits as one repository of the Hub: packed, so that ten thousand edits are a few files in one commit.

A shard holds the files of many edits; it is named by the digest of what it holds and never changes, so that a push
sends only what the repository lacks: one shard of the edits that are new, and the index. Edits that others have pushed
stay; what was taken out here leaves the index, and a shard of which less than half is left is packed anew.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from ..core.files import parse_json, read_text
from ..io import write_json, write_text
from ..lifelong.index import Entry, LibraryError
from ..lifelong.library import FORMAT, ROUTER, SETTINGS, EditLibrary
from ..lifelong.router import Router
from .cards.text import CARD, base_model_metadata, fenced, page, public_name
from .upload import upload

SHARDS, REMOTE_INDEX = "shards", "index.jsonl"
SHARD_BYTES = 1 << 30  # of edits in one file
MOST_SHOWN = 20  # requests that a card lists
Line = dict[str, Any]  # what the remote index says of an edit: an entry's line, and its shard


def push_library(
    library: EditLibrary, repo_id: str, *, metadata: Mapping[str, Any] | None = None, **options: Any
) -> CommitInfo:
    """Publish a library in one commit: what others have pushed stays, what was taken out here goes.

    Args:
        library: What is pushed, with its router.
        repo_id: Repository, made if it does not exist.
        metadata: Metadata of the card.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message` of :func:`~.upload.upload`.

    Raises:
        LibraryError: If the repository holds something else, or it and the library are empty.
        UploadError: If the upload is cut; the repository is as it was, and another call finishes it.
    """
    where = {name: options[name] for name in ("token", "revision") if options.get(name) is not None}
    remote = _remote_index(repo_id, where)
    removed = library.removed()
    kept = {edit_id: line for edit_id, line in remote.items() if edit_id not in removed}
    local = {entry.id: entry for entry in library.list()}
    if not kept and not local:
        raise LibraryError(f"{library.folder}: holds no edit to push; add one first")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch)
        poor = _poor_shards(remote, kept)
        again = [entry_id for entry_id, line in kept.items() if line["shard"] in poor]
        if missing := [edit_id for edit_id in again if edit_id not in local]:
            pull_library(library, repo_id, only=missing, **where)
            local = {entry.id: entry for entry in library.list()}
        new = [edit_id for edit_id in local if edit_id not in kept or edit_id in again]
        lines = {edit_id: line for edit_id, line in kept.items() if edit_id not in again}
        for name, ids in _packed(library, [local[edit_id] for edit_id in new], target / SHARDS):
            lines |= {edit_id: {**local[edit_id].line(), "shard": name} for edit_id in ids}
        write_text(
            target / REMOTE_INDEX, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        )
        write_json(target / SETTINGS, {"format_version": FORMAT, "kind": "edit library"})
        if library.router is not None:
            library.router.save_pretrained(target / ROUTER)
        library_card(list(lines.values()), repo_id, **(metadata or {})).save(target / CARD)
        dead = {line["shard"] for line in remote.values()} - {line["shard"] for line in lines.values()}
        return upload(
            target,
            repo_id,
            replaces=[f"{SHARDS}/{name}" for name in sorted(dead)],
            **{"commit_message": "Update the library", **options},
        )


def _packed(library: EditLibrary, entries: Sequence[Entry], folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Write edits into shards; yield the name of each and the ids that it holds."""
    part: list[Entry] = []
    for place, entry in enumerate(entries):
        part.append(entry)
        if sum(one.nbytes for one in part) >= SHARD_BYTES or place + 1 == len(entries):
            folder.mkdir(exist_ok=True)
            name = f"{hashlib.sha256(''.join(sorted(one.id for one in part)).encode()).hexdigest()[:16]}.safetensors"
            tensors: dict[str, Any] = {}
            about: dict[str, Any] = {}
            for one in part:
                with safe_open(library.file(one.id), framework="pt") as stored:
                    tensors |= {f"{one.id}/{key}": stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                    about[one.id] = (stored.metadata() or {})["edit"]
            save_file(tensors, folder / name, metadata=about)
            yield name, [one.id for one in part]
            part = []


def _poor_shards(remote: Mapping[str, Line], kept: Mapping[str, Line]) -> set[str]:
    """Return the shards of which less than half is left."""
    before, after = _counts(remote), _counts(kept)
    return {name for name, number in before.items() if 0 < after.get(name, 0) < number / 2}


def _counts(lines: Mapping[str, Line]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in lines.values():
        counts[line["shard"]] = counts.get(line["shard"], 0) + int(line.get("nbytes", 1))
    return counts


def pull_library(library: EditLibrary, repo_id: str, *, only: Sequence[str] | None = None, **where: Any) -> list[str]:
    """Add the edits of a repository that a library lacks; what was taken out of it here stays out.

    Args:
        library: Where they go; a library without a router takes the repository's.
        repo_id: The repository.
        only: Ids that are wanted, also such as were taken out here.
        where: `revision` and `token`.

    Returns:
        The ids that are new.

    Raises:
        LibraryError: If there is no library, or a file of it does not hold what its name says.
    """
    where = _pinned(repo_id, where)
    remote = _remote_index(repo_id, where)
    if not remote:
        raise LibraryError(f"{repo_id}: holds no library of edits; push one: ibke library push")
    have, removed = {entry.id for entry in library.list()}, library.removed()
    wanted = [i for i in remote if i not in have and (i in only if only is not None else i not in removed)]
    if library.router is None:
        library.use_router(_remote_router(repo_id, where))
    shards: dict[str, list[str]] = {}
    for edit_id in wanted:
        shards.setdefault(remote[edit_id]["shard"], []).append(edit_id)
    for name, ids in shards.items():
        file = _download(repo_id, f"{SHARDS}/{name}", where)
        with safe_open(file, framework="pt") as stored:
            keys: dict[str, list[str]] = {}
            for key in stored.keys():  # noqa: SIM118
                keys.setdefault(key.partition("/")[0], []).append(key)
            about = stored.metadata() or {}
            contents = []
            for edit_id in ids:
                tensors = {key.partition("/")[2]: stored.get_tensor(key) for key in keys.get(edit_id, ())}
                entry = Entry.of(remote[edit_id], f"{repo_id}/{REMOTE_INDEX}")
                contents.append((entry, tensors, about.get(edit_id, "")))
            library.take(contents, f"{repo_id}/{name}")
    return wanted


def _pinned(repo_id: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the commit that a revision is now: a push in between must not mix an old index with new shards."""
    try:
        sha = HfApi(token=where.get("token")).model_info(repo_id, revision=where.get("revision")).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise LibraryError(f"{repo_id}: there is no such repository or revision that you may read") from error
    return {**where, "revision": sha}


def _remote_index(repo_id: str, where: Mapping[str, Any]) -> dict[str, Line]:
    """Return the lines of a repository's index by id; none where there is no repository or it is new."""
    try:
        file = _download(repo_id, REMOTE_INDEX, _pinned(repo_id, where))
    except (EntryNotFoundError, LibraryError):
        return {}
    name, lines = f"{repo_id}/{REMOTE_INDEX}", {}
    for number, text in enumerate(read_text(file, name=name).splitlines()):
        line = parse_json(text, name=f"{name}, line {number + 1}", cure="push the library again", error=LibraryError)
        entry = Entry.of(line if isinstance(line, dict) else {}, f"{name}, line {number + 1}")
        if not isinstance(line.get("shard"), str) or "/" in line["shard"]:
            raise LibraryError(f"{name}, line {number + 1}: names no shard; push the library again")
        lines[entry.id] = line
    return lines


def _download(repo_id: str, name: str, where: Mapping[str, Any]) -> str:
    return str(hf_hub_download(repo_id, name, **where))


def _remote_router(repo_id: str, where: Mapping[str, Any]) -> Router | None:
    try:
        _download(repo_id, f"{ROUTER}/config.json", where)
    except EntryNotFoundError:
        return None
    router: Router = Router.from_pretrained(repo_id, subfolder=ROUTER, **where).eval()
    return router


def library_card(lines: Sequence[Line], repo_id: str, **metadata: Any) -> ModelCard:
    """Write the card of a library: how many edits of which backbone, the first of them, and how to attach it."""
    backbones = dict.fromkeys(line["backbone"] for line in lines if public_name(line["backbone"]))
    backbone = next(iter(backbones), "")
    data = ModelCardData(
        **{
            "library_name": "ibke-hf",
            "tags": ["knowledge-editing", "model-editing", "lora", "edit-library"],
            **base_model_metadata(backbone),
            **metadata,
        }
    )
    requests = [request for line in lines for request in line["requests"]]
    shown = "\n".join(
        f"{json.dumps(r['prompt'], ensure_ascii=False)} -> {json.dumps(r['target'], ensure_ascii=False)}"
        for r in requests[:MOST_SHOWN]
    )
    more = f"\nand {len(requests) - MOST_SHOWN} more, see {REMOTE_INDEX}" if len(requests) > MOST_SHOWN else ""
    use = (
        "from ibke_hf import EditLibrary\nfrom ibke_hf.loading import load_model\n\n"
        f'model, tokenizer = load_model("{backbone or "BACKBONE"}")\n'
        f'library = EditLibrary("my-edits", tokenizer=tokenizer)\nlibrary.pull("{repo_id}")\n'
        "with library.attached(model):\n    ..."
    )
    blocks = [
        f"# {repo_id.rpartition('/')[2]}",
        (
            f"A library of {len(lines)} knowledge edits of {backbone or 'a language model'}. Each prompt carries "
            f"those that it is about, found by the router that lies beside them."
        ),
        fenced(shown + more, "text"),
        fenced(use),
    ]
    return ModelCard(page(data, blocks))
