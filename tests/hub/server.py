"""A small Hugging Face Hub on loopback: the protocol that huggingface_hub speaks, and the ways in which it goes wrong.

Like the Hub it describes gated repositories to anyone but hands their files only to tokens that may read them, answers
401 rather than 404 for a missing repository when there is no token, and redirects to another host for large files.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.uploads import Uploads


@dataclass
class Repository:
    """Files by revision: `commits` maps a commit to its files, `branches` a name to a commit.

    `readers`: tokens that may read the files of a gated repository; None: it is open to everyone.
    `private`: whether its listing says so.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    readers: frozenset[str] | None = None
    private: bool = False

    @classmethod
    def of(cls, files: dict[str, bytes], *, readers: frozenset[str] | None = None) -> "Repository":
        repository = cls({}, {}, readers)
        repository.commit(files)
        return repository

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Put `branch` on a new commit with these files; gives the commit."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass(frozen=True)
class Request:
    """What was asked, and how it was answered; `body_bytes` counts what was sent of the body."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    body_bytes: int


@dataclass
class HubServer:
    """The server, its repositories and tokens, and everything that was asked of it.

    Attributes:
        cuts: path of a file in a repository ("org/name/file") -> after how many bytes its next transfer breaks off.
        failures: path, or the start of one -> statuses of the next answers.
        owners: token -> whose repositories it may write into; the first is its own name. See `uploads.py`.
        objects: large files that were uploaded, by their hash.
    """

    repositories: dict[str, Repository]
    tokens: frozenset[str] = frozenset()
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.port = 0
        self._start()

    def _start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Nobody listens on the port."""
        self.close()
        try:
            yield
        finally:
            self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        """Where large files are; the name differs from that of `url`, so it is another host to a client."""
        return f"http://localhost:{self.port}"

    def storage_path(self, name: str, file: str) -> str:
        """Where the main branch's version of a large file is."""
        repository = self.repositories[name]
        content = repository.commits[repository.branches["main"]][file]
        return f"/storage/{name}/{_sha256(content)}/{file}"

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def forget(self) -> None:
        """Start the record of requests anew."""
        with self._lock:
            self.requests.clear()

    def planned_failure(self, path: str) -> int | None:
        with self._lock:
            for prefix, statuses in self.failures.items():
                if path.startswith(prefix) and statuses:
                    return statuses.pop(0)
        return None

    def planned_cut(self, where: str) -> int | None:
        with self._lock:
            return self.cuts.pop(where, None)

    def downloads(self) -> list[str]:
        """The files whose bodies were asked for, sorted; one that was asked for twice stands twice."""
        return sorted(
            request.path.partition("/resolve/")[2].partition("/")[2] or request.path.rpartition("/")[2]
            for request in self.requests
            if request.method == "GET" and request.status in (200, 206) and not request.path.startswith("/api/")
        )


class _Handler(Uploads, BaseHTTPRequestHandler):
    """One request. Connections are closed after each, so that an unreachable server has none left open."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on stderr; the requests are in `HubServer.requests`."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.with_body = with_body
        if status := self.hub.planned_failure(self.path_only):
            return self._refuse(status, message="the server is not well")
        if self.path_only.startswith("/storage/"):
            return self._stored()
        if self.token is not None and self.token not in self.hub.tokens:
            return self._refuse(401, message="Invalid credentials in Authorization header")
        parts = self.path_only.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:] == ["auth-check", "write"]:
            return self._may_write(parts[2], "/".join(parts[2:4]))
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._refuse(404)

    @property
    def token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None, after the answer that says so, if there is no such thing."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401 if self.token is None else 404, code="RepoNotFound", message="Repository not found")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def _api(self, name: str, rest: list[str]) -> None:
        kind, revision = (rest[0], rest[1]) if len(rest) >= 2 else ("revision", "main")
        found = self._files(name, revision)
        if found is None:
            return
        commit, files = found
        if kind == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            repository = self.hub.repositories[name]
            gated = "manual" if repository.readers is not None else False
            said = {"id": name, "sha": commit, "private": repository.private, "gated": gated}
            self._send_json({**said, "siblings": siblings})
        elif kind == "tree" and parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true":
            self._send_json([_entry(file, content) for file, content in sorted(files.items())])
        else:
            self._refuse(404)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        commit, files = found
        readers = self.hub.repositories[name].readers
        if readers is not None and self.token not in readers:
            return self._refuse(
                401 if self.token is None else 403, code="GatedRepo", message=f"Access to model {name} is restricted."
            )
        if file not in files:
            return self._refuse(404, code="EntryNotFound", message="Entry not found", commit=commit)
        content = files[file]
        if not is_large(file):
            return self._send_file(f"{name}/{file}", content, {"X-Repo-Commit": commit, "ETag": f'"{_blob(content)}"'})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{_sha256(content)}"',
            "Location": f"{self.hub.storage_url}/storage/{name}/{_sha256(content)}/{file}",
        }
        return self._send(302, b"", headers)

    def _stored(self) -> None:
        """A large file by its content's hash; the signed address of the real storage needs no token either."""
        owner, model, digest, file = self.path_only.removeprefix("/storage/").split("/", 3)
        for files in self.hub.repositories[f"{owner}/{model}"].commits.values():
            if file in files and _sha256(files[file]) == digest:
                return self._send_file(f"{owner}/{model}/{file}", files[file], {"ETag": f'"{digest}"'})
        return self._refuse(404)

    def _send_file(self, where: str, content: bytes, headers: dict[str, str]) -> None:
        headers = {"Accept-Ranges": "bytes", **headers}
        status, body = 200, content
        if wanted := self.headers["Range"]:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), int(end) if end else len(content) - 1
            status, body = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        cut = self.hub.planned_cut(where) if self.with_body else None
        self._send(status, body, headers, cut=cut)

    def _send_json(self, value: Any, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, *, code: str = "", message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, b"", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: int | None = None) -> None:
        sent = body[:cut] if self.with_body else b""
        # Recorded before the client can go on, so that a test that waits for the client sees everything.
        self.hub.record(
            Request(self.command, self.path_only, self.headers["Range"], self.token, status, body_bytes=len(sent))
        )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True


def is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".pth", ".gguf"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, Any]:
    """One file in a listing of the tree."""
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
    if is_large(file):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry
