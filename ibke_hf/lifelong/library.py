"""`EditLibrary`: a folder of thousands of edits, of which each prompt carries those that it is about.

An edit lies in a file of its own that is named by the digest of its content, so that it is written once, by a rename,
and two processes never write different things to one place; the index is told after the file is there, and a file that
the index does not know was never added. What is pushed to the Hub is packed, see :mod:`.shards`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.conflicts import Conflict
from ..core.edits import LowRankEdit
from ..core.records import EditRequest
from ..io import read_json, write_json, written_file
from .at_odds import conflicts_in
from .edit_files import edit_bytes, packed_bytes, read_edit_file, single_edits
from .faults import faults_of
from .index import Entry, Index, LibraryError, append, rewrite, writing
from .routed import request_vectors
from .router import Router, digest_of
from .routing import Routing
from .search import Search, search_among, stacked
from .shelf import EditShelf, whole

EDITS, SETTINGS, ROUTER = "edits", "library.json", "router"
FORMAT = 1
Entries: TypeAlias = list[Entry]  # a library has a method of the name `list`
Names: TypeAlias = list[str]
Conflicts: TypeAlias = list[Conflict]
Near = list[tuple[float, Entry]]
SHORTEST = 6  # letters of an id that may stand for it


class EditLibrary:
    """Edits in a folder, and the router that finds them.

    Args:
        folder: Made if it is missing.
        router: Finds the edits; by default the one that lies in the folder. It is kept there.
        tokenizer: The backbone's: what a request is read with, once, to be found by later.

    Raises:
        LibraryError: If the folder holds something else, or is of a newer format.
    """

    def __init__(self, folder: str | Path, router: Router | None = None, tokenizer: Any = None) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        self._require_library()
        (self.folder / EDITS).mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            write_json(self.folder / SETTINGS, {"format_version": FORMAT, "kind": "edit library"})
        self.router: Router | None = None
        if router is not None:
            self.use_router(router)
        elif (self.folder / ROUTER / "config.json").exists():
            self.router = Router.from_pretrained(self.folder / ROUTER).eval()
        self._index = Index(self.folder)
        self._shelf: tuple[Any, EditShelf] | None = None

    def _require_library(self) -> None:
        settings = self.folder / SETTINGS
        if settings.exists():
            version = read_json(settings, error=LibraryError).get("format_version")
            if not isinstance(version, int) or version > FORMAT:
                raise LibraryError(f"{settings}: format {version} is newer than {FORMAT}; update ibke_hf")
        elif self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / EDITS).is_dir():
            raise LibraryError(f"{self.folder}: holds something else than a library of edits; name another folder")

    def use_router(self, router: Router | None) -> None:
        """Find edits by this router from now on, and keep it in the folder."""
        self.router = router
        place = self.folder / ROUTER
        if router is not None and not (
            (place / "config.json").exists() and _same(router, Router.from_pretrained(place))
        ):
            router.save_pretrained(place)

    # --- what is in it ----------------------------------------------------------------------------------------------

    def list(self) -> Entries:
        """Return what the index says of each edit, in the order in which they were added."""
        self._index.refresh()
        return [*self._index.entries.values()]

    def __len__(self) -> int:
        return len(self.list())

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.list())

    def __contains__(self, edit_id: object) -> bool:
        self._index.refresh()
        return edit_id in self._index.entries

    def entry(self, edit_id: str) -> Entry:
        """Return what the index says of an edit that is named by its id, or by the beginning of it.

        Raises:
            LibraryError: If there is none, or several begin so.
        """
        self._index.refresh()
        if edit_id in self._index.entries:
            return self._index.entries[edit_id]
        matching = [entry for key, entry in self._index.entries.items() if key.startswith(edit_id)]
        if len(edit_id) < SHORTEST or len(matching) != 1:
            what = f"{len(matching)} edits begin so" if matching and len(edit_id) >= SHORTEST else "holds no such edit"
            raise LibraryError(f"{self.folder}: {edit_id!r}: {what}; `ibke library list` shows their ids")
        return matching[0]

    def read(self, edit_id: str) -> LowRankEdit:
        """Read an edit, bit by bit as it was added.

        Raises:
            LibraryError: If it is not there, or its file is damaged.
        """
        return read_edit_file(self.file(self.entry(edit_id).id))

    def file(self, edit_id: str) -> Path:
        """Return where the file of an edit is or would be."""
        return self.folder / EDITS / edit_id[:2] / f"{edit_id}.safetensors"

    # --- changes ----------------------------------------------------------------------------------------------------

    def add(self, *edits: Any, model: Any = None) -> Names:
        """Add edits; once this returns, they are there whatever happens to the process.

        Args:
            edits: Low-rank edits of any editor, each made on the unedited model; several independent ones, or the
                parts of edits that were solved together, become as many.
            model: The backbone, with which a router reads the requests; by default that is done when the library is
                attached to it.

        Returns:
            Their ids; the same edit has the same id, and is there once.

        Raises:
            TypeError: If one is no low-rank edit.
            NonFiniteError: If one is not finite; nothing is added then.
        """
        singles = [part for edit in edits for part in single_edits(edit)]
        contents = [edit_bytes(part) for part in singles]
        entries = [self._entry(part, content) for part, content in zip(singles, contents, strict=True)]
        if model is not None and self.router is not None:
            entries = self._with_vectors(model, entries)
        with writing(self.folder):
            self._index.refresh()
            new = {entry.id: entry for entry in entries if entry.id not in self._index.entries}
            for entry, content in zip(entries, contents, strict=True):
                if entry.id in new:
                    self._write(self.file(entry.id), content)
            append(self.folder, [entry.line() for entry in new.values()])
            self._index.refresh()
        return [entry.id for entry in entries]

    @staticmethod
    def _write(file: Path, content: bytes) -> None:
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_bytes() != content:
            with written_file(file) as temporary:
                temporary.write_bytes(content)

    def _entry(self, edit: LowRankEdit, content: bytes) -> Entry:
        info = edit.info
        digest = hashlib.sha256(content).hexdigest()
        return Entry(digest, info.requests, info.editor, info.backbone, edit.layers, len(content))

    def edit(self, editor: Any, model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> Names:
        """Edit each request on the unedited model and add what comes of it; return the ids."""
        self.tokenizer = self.tokenizer or tokenizer
        made = editor.edit(model, tokenizer, requests, mode="independent")
        return self.add(made, model=model)

    def conflicts(self, *edit_ids: str) -> Conflicts:
        """Return what edits are at odds with, by their places in :meth:`list`; see :mod:`ibke_hf.core.conflicts`.

        All requests are compared, and keys with those of the edits that the router has nearest.

        Raises:
            LibraryError: If one is not there.
        """
        entries = self.list()
        return conflicts_in(entries, {self.entry(edit_id).id for edit_id in edit_ids}, self.read)

    def remove(self, *edit_ids: str) -> None:
        """Take edits out.

        Raises:
            LibraryError: If one is not there; nothing is taken out then.
        """
        with writing(self.folder):
            chosen = [self.entry(edit_id).id for edit_id in edit_ids]
            append(self.folder, [{"remove": edit_id} for edit_id in chosen])
            self._index.refresh()
            for edit_id in chosen:
                with suppress(FileNotFoundError):
                    self.file(edit_id).unlink()

    def export(self, folder: str | Path, *edit_ids: str, **options: Any) -> None:
        """Save edits, by default all, as one LoRA adapter that acts on every prompt: solved together.

        Args:
            folder: Of the adapter.
            edit_ids: Which.
            options: Of :func:`~ibke_hf.core.adapter_files.save_edit`.

        Raises:
            LibraryError: If there is none.
        """
        chosen = [self.entry(edit_id).id for edit_id in edit_ids] or [entry.id for entry in self.list()]
        if not chosen:
            raise LibraryError(f"{self.folder}: holds no edit to export; add one first")
        whole([read_edit_file(self.file(edit_id)) for edit_id in chosen]).save_pretrained(folder, **options)

    def removed(self) -> set[str]:
        """Return the ids of edits that were taken out here."""
        self._index.refresh()
        return set(self._index.removed)

    def take(self, contents: Sequence[tuple[Entry, Mapping[str, Tensor], str]], where: str) -> None:
        """Add edits that another library has packed, if they are what their ids say.

        Args:
            contents: Entry, tensors and description of each.
            where: What errors call their source.

        Raises:
            LibraryError: If one has another content; nothing is added then.
        """
        files = [(entry, packed_bytes(tensors, about)) for entry, tensors, about in contents]
        for entry, content in files:
            if hashlib.sha256(content).hexdigest() != entry.id:
                raise LibraryError(f"{where}: edit {entry.id[:12]} is not what its id says; push the library again")
        with writing(self.folder):
            self._index.refresh()
            for entry, content in files:
                self._write(self.file(entry.id), content)
            append(self.folder, [e.line() for e, _ in files if e.id not in self._index.entries])
            self._index.refresh()

    # --- the Hub ------------------------------------------------------------------------------------------------

    def push(self, repo_id: str, **options: Any) -> Any:
        """Publish the library as one repository, see :func:`ibke_hf.hub.library.push_library`."""
        return import_module("ibke_hf.hub.library").push_library(self, repo_id, **options)

    def pull(self, repo_id: str, **options: Any) -> Names:
        """Add what a repository holds, see :func:`ibke_hf.hub.library.pull_library`; return the ids that are new."""
        ids: Names = import_module("ibke_hf.hub.library").pull_library(self, repo_id, **options)
        return ids

    # --- finding ----------------------------------------------------------------------------------------------------

    def search(self, text: str, model: Any, number: int = 5) -> Near:
        """Return the edits nearest to a prompt with their similarity, the best first, also those below the threshold.

        Raises:
            LibraryError: If there is no router or tokenizer.
        """
        from ..core.tokens import encode_prompt, pad_and_label
        from .reading import read_states

        shelf = self.shelf(model)
        router = self._require_router()
        ids = encode_prompt(self._require_tokenizer(), text)
        with torch.no_grad():
            states, mask = read_states(model, router.sources, pad_and_label([([*ids, 0], len(ids))]))
            device = router.log_scale.device
            similarities, places = shelf.nearest(
                router([state.to(device) for state in states], mask.to(device)), 2 * number
            )
        best: dict[str, float] = {}
        for similarity, place in zip(similarities[0].tolist(), places[0].tolist(), strict=True):
            best.setdefault(shelf.key(place), similarity)
        return [(similarity, self._index.entries[key]) for key, similarity in list(best.items())[:number]]

    @contextmanager
    def attached(self, model: Any, *, all_threads: bool = False, **options: Any) -> Iterator[Any]:
        """Have each prompt carry the edits that it is about, in `forward`, `generate` and pipelines alike.

        Edits that are added or taken out while the block runs are seen by the next block.

        Args:
            model: The backbone; its weights are not touched, so undo is exact.
            all_threads: See :meth:`~ibke_hf.core.edits.WeightEdit.attached`.
            options: `threshold` and `most_edits` in place of the router's own, and `on_route`, which is called with
                the places of the edits that each prompt was given.

        Raises:
            LibraryError: If there is no router, or a request was never read and there is no tokenizer to read it.
            BackboneError: If the model does not fit router or edits.
        """
        with Routing(model, self._require_router(), self.shelf(model), **options).attached(all_threads=all_threads):
            yield model

    def shelf(self, model: Any) -> EditShelf:
        """Return what a router picks from, once every request was read; made anew only if the library has changed."""
        router = self._require_router()
        entries = self._read_requests(model, digest_of(router))
        state = (digest_of(router), tuple(entry.id for entry in entries))
        if self._shelf is not None and self._shelf[0] == state:
            return self._shelf[1]
        keys = [entry.id for entry in entries for _ in entry.requests]
        rows = [row.float() for entry in entries if entry.vectors is not None for row in entry.vectors]
        layers = dict.fromkeys(name for entry in entries for name in entry.layers)
        search: Search = search_among(stacked(rows, router.config.dim))
        shelf = EditShelf(keys, tuple(layers), lambda key: read_edit_file(self.file(key)), search)
        self._require_layers(model, entries)
        self._shelf = (state, shelf)
        return shelf

    def _require_layers(self, model: Any, entries: Sequence[Entry]) -> None:
        """Refuse edits of another backbone before a pass meets them; one of each set of layers is read for it."""
        for entry in {entry.layers: entry for entry in entries}.values():
            read_edit_file(self.file(entry.id)).modules(model)

    def _read_requests(self, model: Any, router: str) -> Entries:
        """Read the requests that this router has not read yet, and keep what it knows of them."""
        entries = self.list()
        unread = [entry for entry in entries if entry.router != router or entry.vectors is None]
        if unread:
            known = self._with_vectors(model, unread)
            with writing(self.folder):
                self._index.refresh()
                still = [entry for entry in known if entry.id in self._index.entries]
                append(self.folder, [entry.line() for entry in still])
                self._index.refresh()
            entries = [*self._index.entries.values()]
        return entries

    def _with_vectors(self, model: Any, entries: Sequence[Entry]) -> Entries:
        router = self._require_router()
        nameless = next((entry for entry in entries if not entry.requests), None)
        if nameless is not None:
            raise LibraryError(
                f"{self.folder}: edit {nameless.id[:12]} does not say which request it was made for, so no prompt can "
                f"be routed to it; take it out, or attach it alone"
            )
        requests = [request for entry in entries for request in entry.requests]
        vectors = iter(request_vectors(model, self._require_tokenizer(), router, requests))
        digest = digest_of(router)
        return [entry.with_vectors(digest, torch.stack([next(vectors) for _ in entry.requests])) for entry in entries]

    def _require_router(self) -> Router:
        if self.router is None:
            raise LibraryError(
                f"{self.folder}: has no router, which finds the edits of a prompt; name one (router=, on the command "
                f"line --router), or train one: ibke train-router"
            )
        return self.router

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise LibraryError(
                f"{self.folder}: texts are read with the backbone's tokenizer: EditLibrary(folder, tokenizer=…)"
            )
        return self.tokenizer

    # --- order ------------------------------------------------------------------------------------------------------

    def compact(self) -> int:
        """Write the index anew without what was taken out, and remove files that it does not know; return how many."""
        with writing(self.folder):
            self._index.refresh()
            removed = [{"remove": edit_id} for edit_id in sorted(self._index.removed)]
            rewrite(self.folder, [*removed, *(entry.line() for entry in self._index.entries.values())])
            unknown = [
                file for file in (self.folder / EDITS).glob("*/*.safetensors") if file.stem not in self._index.entries
            ]
            for file in unknown:
                file.unlink()
            self._index.refresh()
        return len(unknown)

    def check(self, model: Any = None) -> Names:
        """Return what is wrong with the library, one line each; nothing if it can be served.

        Args:
            model: The backbone that it is to be served with; its weights are compared with those that each edit was
                made on.
        """
        return faults_of(self, model)


def _same(one: Router, two: Router) -> bool:
    settings = ("threshold", "most_edits")
    return digest_of(one) == digest_of(two) and all(
        getattr(one.config, name) == getattr(two.config, name) for name in settings
    )
