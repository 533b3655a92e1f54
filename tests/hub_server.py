"""A stand-in for the Hub's HTTP API on the loopback interface, as far as huggingface_hub uses it for models.

Repositories are in memory. It counts the bytes that it serves, and remembers what was uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_writes_of_alice", "hf_reads_of_alice", "hf_writes_of_bob"
"""Tokens that the server knows."""

NAMES = {WRITER: "alice", READER: "alice", STRANGER: "bob"}

LFS_FILES = (".safetensors", ".gguf", ".bin")
"""Files that the Hub keeps outside of git."""


@dataclass
class Repo:
    """A model: its files, and what was committed. Of a gated one, only its owner gets files; everybody sees their names."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """Forty digits that depend on the content."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(self.files):
            digest.update(name.encode() + hashlib.sha256(self.files[name]).digest())
        return digest.hexdigest()


class HubServer:
    """What the handlers share."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.served: Counter[str] = Counter()
        self.uploaded: list[str] = []
        self.requests: list[str] = []
        self.failing_uploads = 0
        self.busy_answers = 0
        self.silent_seconds = 0.0
        self.knows_ranges = True
        self.organizations: list[str] = []
        self.scopes: list[dict[str, object]] | None = None  # rights of a fine-grained token
        self.url = ""

    def add(self, hub_id: str, folder: Path, **more: bytes) -> Repo:
        """A repository with the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[hub_id] = Repo(files | more)
        return self.repos[hub_id]

    def served_of(self, end: str) -> int:
        """Bytes of content that were served of files whose names end so."""
        return sum(count for name, count in self.served.items() if name.endswith(end))


def owner_of(hub_id: str) -> str:
    return hub_id.partition("/")[0]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait for an acknowledgement

    def log_message(self, *_: object) -> None:
        """Be silent."""

    # --- helpers ---

    @property
    def user(self) -> str | None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        return NAMES.get(token)

    def may_write(self, hub_id: str) -> bool:
        return self.user == owner_of(hub_id) and WRITER in self.headers.get("authorization", "")

    def send(self, content: bytes | dict[str, Any] | list[Any], status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.send({"error": message}, status, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def repo(self, hub_id: str) -> Repo | None:
        repo = self.hub.repos.get(hub_id)
        if repo is None or (repo.private and self.user != owner_of(hub_id)):
            self.fail(404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def open_repo(self, hub_id: str) -> Repo | None:
        """A repository whose files the user may get."""
        repo = self.repo(hub_id)
        if repo is not None and repo.gated and self.user != owner_of(hub_id):
            self.fail(403, "Access to this model is restricted", "GatedRepo")
            return None
        return repo

    # --- requests ---

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else None):
                getattr(self, name)(**match.groupdict())
                return
        self.body()
        self.fail(404, f"the stand-in has no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def whoami(self) -> None:
        if self.user is None:
            return self.fail(401, "Invalid credentials in Authorization header")
        role = "read" if READER in self.headers["authorization"] else "write"
        organizations = [{"name": name} for name in self.hub.organizations]
        token: dict[str, object] = {"role": role}
        if self.hub.scopes is not None:
            token = {"role": "fineGrained", "fineGrained": {"scoped": self.hub.scopes}}
        return self.send(
            {"name": self.user, "orgs": organizations, "auth": {"type": "access_token", "accessToken": token}}
        )

    def auth_check(self, id: str, write: str | None) -> None:
        if self.open_repo(id) is None:
            return None
        if write and not self.may_write(id):
            return self.fail(403, "You don't have the rights to write")
        return self.send({"ok": True})

    def info(self, id: str, revision: str | None = None) -> None:
        repo = self.repo(id)
        if repo is None:
            return None
        if revision not in (None, "main", repo.commit):
            return self.fail(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(repo.files)]
        return self.send(
            {"_id": id, "id": id, "modelId": id, "sha": repo.commit, "private": repo.private, "tags": [], "siblings": siblings}
        )  # fmt: skip

    def tree(self, id: str, revision: str, folder: str | None = None) -> None:
        repo = self.repo(id)
        if repo is not None:
            self.send([self.entry(name, content) for name, content in sorted(repo.files.items())])

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest()
        }  # fmt: skip
        if name.endswith(LFS_FILES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def paths_info(self, id: str, revision: str) -> None:
        body = self.body().decode()
        repo = self.repo(id)
        if repo is not None:
            wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", unquote(body))
            self.send([self.entry(name, repo.files[name]) for name in wanted if name in repo.files])

    def resolve(self, id: str, revision: str, file: str) -> None:
        repo = self.open_repo(id)
        if repo is None:
            return None
        if file not in repo.files:
            return self.fail(404, "Entry not found", "EntryNotFound")
        if self.hub.busy_answers and "range" in self.headers:
            self.hub.busy_answers -= 1
            return self.fail(503, "busy")
        if self.hub.silent_seconds and "range" in self.headers:
            time.sleep(self.hub.silent_seconds)
            self.close_connection = True
            return None
        if not self.hub.knows_ranges and "range" in self.headers:
            # A large file, whose content does not arrive.
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            return self.end_headers()
        content = repo.files[file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": repo.commit, "Accept_Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        status = 200
        if span:
            stop = min(int(span[2]) + 1, len(content)) if span[2] else len(content)
            headers["Content_Range"] = f"bytes {span[1]}-{stop - 1}/{len(content)}"
            content = content[int(span[1]) : stop]
            status = 206
        headers["Content_Length"] = str(len(content))
        if self.command == "GET":
            self.hub.served[f"{id}/{file}"] += len(content)
        return self.send(content, status, **headers)

    def create(self) -> None:
        wanted = json.loads(self.body())
        if self.user is None or READER in self.headers["authorization"]:
            return self.fail(401 if self.user is None else 403, "You don't have the rights to create a model")
        owner = wanted.get("organization") or self.user
        hub_id = f"{owner}/{wanted['name']}"
        if owner != self.user:
            return self.fail(403, f"You don't have the rights to create a model under the namespace {owner}")
        answer = {"url": f"{self.hub.url}/{hub_id}", "id": hub_id, "name": hub_id}
        if hub_id in self.hub.repos:
            return self.send(answer, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos[hub_id] = Repo({".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send(answer)

    def preupload(self, id: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        if not self.may_write(id):
            return self.fail(403, "You don't have the rights to write")
        answers = []
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS_FILES) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return self.send({"files": answers})

    def lfs_batch(self, id: str) -> None:
        answers = []
        for wanted in json.loads(self.body())["objects"]:
            answer: dict[str, Any] = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            answers.append(answer)
        self.send({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        content = self.body()
        if self.hub.failing_uploads:
            self.hub.failing_uploads -= 1
            return self.fail(400, "the connection was lost")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.uploaded.append(oid)
        return self.send(b"")

    def commit(self, id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo(id)
        if repo is None:
            return None
        if not self.may_write(id):
            return self.fail(403, "You don't have the rights to write")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
            else:
                repo.commits.append(value)
        answer = {"success": True, "commitOid": repo.commit, "commitUrl": f"{self.hub.url}/{id}/commit/{repo.commit}"}
        return self.send(answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body())["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/models/{ID}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"/api/models/{ID}", "info"),
    ("GET", rf"/api/models/{ID}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "tree"),
    ("POST", rf"/api/models/{ID}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs inside."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def connected(monkeypatch: Any, cache: Path) -> Iterator[HubServer]:
    """A server, and huggingface_hub in this process using it, with a cache of its own and no token."""
    from huggingface_hub import constants

    with hub_server() as hub:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,  # its storage servers have an API of their own
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_STORED_TOKENS_PATH": str(cache / "tokens"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
