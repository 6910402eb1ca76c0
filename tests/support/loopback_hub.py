"""A stand-in for the Hub on 127.0.0.1: as much of its HTTP as `huggingface_hub` needs, repositories in memory.

The client's endpoint is frozen when it is imported, so conftest.py binds :data:`HUB` before that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_TOKEN = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".parquet")  # what goes the way of large files
API = re.compile(
    r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)(/(?P<what>[^/]+)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
BATCH = re.compile(r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
RESOLVE = re.compile(r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)")


@dataclass
class Repository:
    """Commits by id, each with the content of every file, and what branches and pull requests point to."""

    private: bool = False
    sdk: str | None = None  # of a Space
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], title: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[digest], self.refs[ref] = files, digest
        self.titles.append(title)
        return digest

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch, pull request or commit."""
        return self.commits[self.refs.get(revision, revision)]


class LoopbackHub:
    """The server. `cut` names what it breaks off: ``"lfs"``, ``"commit"``, a file that is read, or nothing."""

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.lock = Lock()
        self.thread: Thread | None = None
        self.reset()

    def start(self) -> None:
        if self.thread is None:
            self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            self.thread.start()

    def reset(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut = ""

    def __getitem__(self, key: str) -> Repository:
        """Return a repository: ``hub["org/model"]``, ``hub["datasets/org/records"]``."""
        kind, _, name = key.partition("/")
        return self.repositories[(kind, name) if "/" in name else ("models", key)]

    def every_file(self) -> list[str]:
        """Return the path of every file of every commit."""
        return [
            path
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for path in files
        ]


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        try:
            with self.hub.lock:
                self.url = urlsplit(self.path)
                self.hub.requests.append(f"{self.command} {self.path}")
                self._route()
        except _Refusal as refusal:
            self._send(
                json.dumps({"error": str(refusal)}).encode(),
                refusal.status,
                {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)},
            )
        except _Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self) -> None:
        path = self.url.path
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._validate()
        if path.startswith("/lfs/"):
            return self._store(path.removeprefix("/lfs/"))
        for pattern, answer in ((API, self._api), (BATCH, self._batch), (RESOLVE, self._resolve)):
            if match := pattern.fullmatch(path):
                return answer({key: unquote(value) for key, value in match.groupdict().items() if value is not None})
        raise _Refusal(404, "", f"no such page: {path}")

    # --- what is asked and answered -----------------------------------------------------------------------------

    def _body(self, cut: str = "") -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if cut and self.hub.cut == cut:
            self.rfile.read(length // 2)
            raise _Cut
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(length)

    def _send(self, content: bytes = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _require_writer(self) -> None:
        if self._token() != TOKEN:
            self._body()
            raise _Refusal(403 if self._token() else 401, "", "a token with write access is needed")

    def _repository(self, where: dict[str, str], *, write: bool = False) -> Repository:
        if write:
            self._require_writer()
        stored = self.hub.repositories.get((where.get("kind", "models"), where["id"]))
        if stored is None or (stored.private and self._token() not in (TOKEN, READ_TOKEN)):
            self._body()
            raise _Refusal(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        return stored

    def _files(self, where: dict[str, str]) -> tuple[str, dict[str, bytes]]:
        """Return id and files of a commit."""
        repository, revision = self._repository(where), where.get("revision", "main")
        digest = repository.refs.get(revision, revision)
        if digest not in repository.commits:
            self._body()
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return digest, repository.commits[digest]

    # --- repositories -------------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._require_writer()
        body = json.loads(self._body())
        kind, name = f"{body.get('type') or 'model'}s", f"{body.get('organization') or 'me'}/{body['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        if kind == "spaces" and body.get("sdk") not in ("gradio", "docker", "static"):
            raise _Refusal(400, "", "a Space needs an sdk")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        created = self.hub.repositories[kind, name] = Repository(private, body.get("sdk"))
        created.commit("main", {".gitattributes": b""}, "initial commit")
        return self._json({"url": url, "name": name})

    def _validate(self) -> None:
        text = json.loads(self._body())["content"].split("---\n")[1]
        try:
            metadata = yaml.safe_load(text)  # Python objects, as NumPy numbers would be, are no YAML of the Hub's
            errors = [] if isinstance(metadata, dict) else [{"message": "metadata must be a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _api(self, where: dict[str, str]) -> None:
        what = where.get("what", "revision")
        if what not in ("revision", "tree", "paths-info", "preupload", "branch", "commit"):
            raise _Refusal(404, "", f"no such page: {self.path}")
        getattr(self, f"_{what.replace('-', '_')}")(where)

    def _revision(self, where: dict[str, str]) -> None:
        digest, files = self._files(where)
        self._json(
            {
                "id": where["id"],
                "sha": digest,
                "private": self._repository(where).private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
        )

    def _tree(self, where: dict[str, str]) -> None:
        _, files = self._files(where)
        base = f"{where['path'].rstrip('/')}/" if where.get("path") else ""
        deep = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = {path: content for path, content in files.items() if path.startswith(base)}
        if base and not inside:
            raise _Refusal(404, "EntryNotFound", f"{base} does not exist")
        folders = {str(folder) for path in inside for folder in PurePosixPath(path).parents}
        entries = [_entry(path, content) for path, content in inside.items()]
        entries += [_folder(path) for path in folders - {"."} if path.startswith(base)]
        self._json([entry for entry in entries if deep or "/" not in entry["path"].removeprefix(base)])

    def _paths_info(self, where: dict[str, str]) -> None:
        body = self._body().decode()
        _, files = self._files(where)
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        entries = [_entry(path, files[path]) for path in asked if path in files]
        self._json(entries + [_folder(path) for path in asked if any(file.startswith(f"{path}/") for file in files)])

    def _branch(self, where: dict[str, str]) -> None:
        repository = self._repository(where, write=True)
        start = json.loads(self._body() or b"{}").get("startingPoint", "main")
        if where["revision"] in repository.refs:
            raise _Refusal(409, "", "this branch exists")
        repository.refs[where["revision"]] = repository.refs[start]
        self._json({})

    # --- uploads ------------------------------------------------------------------------------------------------

    def _preupload(self, where: dict[str, str]) -> None:
        self._repository(where, write=True)
        files = json.loads(self._body())["files"]
        for file in files:
            file |= {
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
        self._json({"files": files})

    def _batch(self, where: dict[str, str]) -> None:
        self._repository(where, write=True)
        objects = json.loads(self._body())["objects"]
        for part in objects:
            if part["oid"] not in self.hub.large:
                part["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{part['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        content = self._body("lfs")
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refusal(400, "", "the content is not what was announced")
        self.hub.large[oid] = content
        self._send()

    def _commit(self, where: dict[str, str]) -> None:
        repository = self._repository(where, write=True)
        lines = [json.loads(line) for line in self._body("commit").splitlines()]
        revision = where["revision"]
        if revision not in repository.refs:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, title = dict(repository.files(revision)), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        pull = "create_pr" in parse_qs(self.url.query)
        digest = repository.commit(f"refs/pr/{number}" if pull else revision, files, title)
        page = f"{self.hub.url}/{'' if where['kind'] == 'models' else where['kind'] + '/'}{where['id']}"
        opened = f"{page}/discussions/{number}" if pull else None
        self._json({"commitUrl": f"{page}/commit/{digest}", "commitOid": digest, "pullRequestUrl": opened})

    # --- downloads ----------------------------------------------------------------------------------------------

    def _resolve(self, where: dict[str, str]) -> None:
        digest, files = self._files(where)
        if where["path"] == self.hub.cut:
            raise _Cut
        if where["path"] not in files:
            return self._send(
                b"",
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": digest},
            )
        content = files[where["path"]]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {
            "X-Repo-Commit": digest,
            "ETag": etag,
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if where["path"].endswith(LARGE):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), int(part[2]) if part[2] else len(content) - 1
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            return self._send(content[first : last + 1], 206, headers)
        return self._send(content, 200, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = (
        {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
        if path.endswith(LARGE)
        else {}
    )
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


HUB = LoopbackHub()
