"""The half of the Hub that takes uploads: repositories made, large files stored by their hash, commits."""

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from tests.hub.server import HubServer


class Uploads(BaseHTTPRequestHandler):
    """Answers POST and PUT as the Hub does. What it shares with reading is in `server.py`."""

    hub: "HubServer"
    token: str | None
    _send_json: Any
    _refuse: Any

    def do_POST(self) -> None:
        body = self._body()
        self.path_only, self.with_body = unquote(urlsplit(self.path).path), True
        if status := self.hub.planned_failure(self.path_only):
            return self._refuse(status, message="the server is not well")
        if self.token is None or self.token not in self.hub.tokens:
            return self._refuse(401, message="Invalid username or password.")
        parts = self.path_only.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._send_json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self._create(**json.loads(body))
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            owner, name, revision = parts[2], "/".join(parts[2:4]), parts[5]
            if not self._writes(owner):
                return self._refuse(403, message="You don't have the required permissions")
            if parts[4] == "preupload":
                return self._upload_modes(json.loads(body))
            if parts[4] == "commit":
                return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])
        if self.path_only.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        return self._refuse(404)

    def do_PUT(self) -> None:
        """A large file, to its hash. The signed address of the real storage needs no token."""
        body = self._body()
        self.path_only, self.with_body = unquote(urlsplit(self.path).path), True
        if status := self.hub.planned_failure(self.path_only):
            return self._refuse(status, message="the server is not well")
        self.hub.objects[self.path_only.rpartition("/")[2]] = body
        return self._send_json({})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _writes(self, owner: str) -> bool:
        return owner in self.hub.owners.get(self.token or "", ())

    def _may_write(self, owner: str, name: str) -> None:
        if name not in self.hub.repositories:
            return self._refuse(404, code="RepoNotFound", message="Repository not found")
        return self._send_json({}) if self._writes(owner) else self._refuse(403, message="You have read access only")

    def _create(self, *, name: str, organization: str | None, visibility: str = "public", **_: Any) -> None:
        from tests.hub.server import Repository

        own = self.hub.owners.get(self.token or "", ())
        owner = organization or (own[0] if own else "")
        full = f"{owner}/{name}"
        said = {"url": f"{self.hub.url}/{full}", "name": full}
        if not self._writes(owner):
            return self._refuse(403, message="You don't have the rights to create a model under this namespace")
        if full in self.hub.repositories:
            return self._send_json({**said, "error": "You already created this model repo"}, status=409)
        self.hub.repositories[full] = Repository({}, {}, private=visibility == "private")
        self.hub.repositories[full].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send_json(said)

    def _upload_modes(self, asked: dict[str, Any]) -> None:
        from tests.hub.server import is_large

        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.storage_url}/upload/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.objects
            objects.append({**item, **({} if known else {"actions": action})})
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        commit = repository.resolve(revision)
        if commit is None:
            return self._refuse(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        files = dict(repository.commits[commit])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        digest = repository.commit(files, branch=revision)
        return self._send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{digest}", "commitOid": digest})
