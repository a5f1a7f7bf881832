"""A Hub on this machine, in memory, for one process of tests: the requests of pushing, pulling and deleting models.

`HF_ENDPOINT` must name it before huggingface_hub is imported. Knows no Xet (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
USER = "tester"
LARGE = 4096  # bytes from which a file that is no text goes to the large file storage


def git_hash(contents: bytes) -> str:
    """The name git gives to contents."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Commits, oldest first; each is a whole tree: path -> contents."""

    name: str
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    large: dict[str, bool] = field(default_factory=dict)  # git hash -> in the large file storage

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, tree: dict[str, bytes]) -> str:
        identifier = hashlib.sha1(f"{self.name} {len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits.append((identifier, tree))
        return identifier

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((found for found in self.commits if found[0] == revision), None)


class Refused(Exception):
    """An answer that is an error: status, code of the Hub, text."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """Repositories, stored objects, a log of requests, and failures to come.

    Attributes:
        failures: pieces of paths -> status that the next request to such a path gets.
        requests: (method, path) of every request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str) -> dict[str, bytes]:
        """What everybody sees of a repository now."""
        return {
            path: text for path, text in self.repositories[name].commits[-1][1].items() if path != ".gitattributes"
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    # ------------------------------------------------------------------------------------------------------ transport

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, method: str) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((method, path))
            try:
                for piece in list(self.server.failures):
                    if piece in path:
                        raise Refused(self.server.failures.pop(piece), message="The server fails on purpose.")
                status, answer, headers = self._route(method, path, body)
            except Refused as error:
                status, answer = error.status, {"error": str(error)}
                headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
        encoded = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self._send(status, encoded, headers)

    # -------------------------------------------------------------------------------------------------------- routing

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        method = "GET" if method == "HEAD" else method
        for expected, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if expected == method and match:
                answer = getattr(self, name)(body, *match.groups())
                return answer if isinstance(answer, tuple) else (200, answer, {"Content-Type": "application/json"})
        raise Refused(404, message=f"{method} {path} is not known here.")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _check_token(self) -> None:
        if not self._has_token():
            raise Refused(401, message="Invalid credentials in Authorization header")

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        hidden = repository is not None and repository.private and not self._has_token()
        if repository is None or hidden:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _tree(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(name)
        found = repository.tree(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, *found

    def whoami(self, body: bytes) -> Any:
        self._check_token()
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, body: bytes) -> Any:
        self._check_token()
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        address = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repositories:
            return 409, address | {"error": "You already created this model repo"}, {}
        self.server.repositories[name] = Repository(
            name, bool(asked.get("private") or asked.get("visibility") == "private")
        )
        return address

    def delete(self, body: bytes) -> Any:
        self._check_token()
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._repository(name)
        del self.server.repositories[name]
        return {}

    def validate_yaml(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        self._check_token()
        _, _, tree = self._tree(name, revision)

        def plan(entry: dict[str, Any]) -> dict[str, Any]:
            is_large = entry["size"] >= LARGE and not entry["path"].endswith((".py", ".json", ".md"))
            known = tree.get(entry["path"])
            oid = None if known is None else git_hash(known)
            mode = "lfs" if is_large else "regular"
            return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return {"files": [plan(entry) for entry in json.loads(body)["files"]]}

    def lfs_batch(self, body: bytes, name: str) -> Any:
        self._check_token()
        self._repository(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.server.objects:  # what is there already needs no action
                address = f"{self.server.url}/storage/{entry['oid']}"
                entry = {**entry, "actions": {"upload": {"href": address, "header": {}}}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="The contents are not those that were announced.")
        self.server.objects[oid] = body
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        self._check_token()
        repository, parent, tree = self._tree(name, revision)
        tree = dict(tree)
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header" and value.get("parentCommit", parent) != parent:
                raise Refused(412, message="A commit has happened since.")
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                contents = self.server.objects.get(value["oid"])
                if contents is None:
                    raise Refused(400, message=f"{value['path']} was never uploaded.")
                tree[value["path"]] = contents
                repository.large[git_hash(contents)] = True
            elif key == "deletedFile":
                del tree[value["path"]]
            elif key == "deletedFolder":
                tree = {
                    path: text for path, text in tree.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
        oid = repository.commit(tree)
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.server.url}/{name}/commit/{oid}",
            "hookOutput": "",
        }

    def model_info(self, body: bytes, name: str, revision: str | None = None) -> Any:
        repository, oid, tree = self._tree(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return {
            "id": name,
            "modelId": name,
            "sha": oid,
            "siblings": siblings,
            "tags": [],
            "private": repository.private,
        }

    def list_tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> Any:
        repository, _, tree = self._tree(name, revision)
        inside = {path: text for path, text in tree.items() if folder is None or path.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries = []
        for path, contents in sorted(inside.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(contents), "oid": git_hash(contents)}
            if repository.large.get(git_hash(contents)):
                sha256 = hashlib.sha256(contents).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(contents), "pointerSize": 130}
            entries.append(entry)
        return entries

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        repository, oid, tree = self._tree(name, revision)
        if path not in tree:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        contents = tree[path]
        is_large = repository.large.get(git_hash(contents))
        etag = hashlib.sha256(contents).hexdigest() if is_large else git_hash(contents)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, contents, headers
        start, end = int(asked[1]), int(asked[2] or len(contents) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(contents)}"
        return 206, contents[start : end + 1], headers


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/(?:models|spaces)/{_NAME}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/(?:spaces/)?{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/([0-9a-f]{64})", "store"),
    ("POST", rf"/api/(?:models|spaces)/{_NAME}/commit/([^/]+)", "commit"),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}", "model_info"),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}/revision/([^/]+)", "model_info"),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}/tree/([^/]+)", "list_tree"),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}/tree/([^/]+)/(.+)", "list_tree"),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
)
