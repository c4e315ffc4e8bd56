"""A small Hub: an HTTP server that speaks the protocol of huggingface.co, as the clients 0.36 and 2.x use it.

Models and datasets, all in memory: creating, LFS (basic uploads), atomic commits, branches, private and gated
repositories, read and write tokens, downloads. A dataset is the repository `datasets/OWNER/NAME` of `HubServer.repos`,
as in the addresses of its files. Left out: Spaces, pull requests, multipart uploads (for files above some gigabytes),
and Xet, a storage with a binary protocol of its own: clients 2.x upload through it without asking, so `HubClient` sets
HF_HUB_DISABLE_XET=1, and what is left is LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".bin", ".msgpack", ".onnx", ".parquet", ".pt", ".safetensors", ".zip")
# What may happen to a request: the connection breaks before or after the server acted on it, halfway through the
# answer, or the server fails.
Fault = Literal["reset", "lost", "truncated", "error"]


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As the client compares it: the SHA-256 of an LFS file, git's SHA-1 of others."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: dict[str, Blob]

    @property
    def sha(self) -> str:
        tree = sorted((name, blob.oid) for name, blob in self.files.items())
        return hashlib.sha1(repr((self.parent, self.message, tree)).encode()).hexdigest()


@dataclass
class Repo:
    repo_id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> str:
        commit = Commit(self.branches.get(branch), message, files)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The contents at a revision, without the .gitattributes that every repository begins with."""
        files = self.commits[self.branches.get(revision, revision)].files
        return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first, without the initial one."""
        commits, sha = [], self.branches[branch]
        while (commit := self.commits[sha]).parent is not None:
            commits.append(commit)
            sha = commit.parent
        return commits

    @property
    def name(self) -> str:
        """With its owner, as the client calls it."""
        return self.repo_id.removeprefix("datasets/")


@dataclass(frozen=True)
class User:
    name: str
    organizations: tuple[str, ...] = ()
    can_write: bool = True

    def is_member(self, repo_id: str) -> bool:
        """Whether a repository is the user's, or of an organization of theirs."""
        return repo_id.removeprefix("datasets/").split("/")[0] in (self.name, *self.organizations)


class HubError(Exception):
    """An answer that is an error, with the headers that the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubServer:
    """The server, its state, and what goes wrong on purpose.

    Use as a context manager. `repos`, `lfs` and `requests` may be read and changed between requests.
    """

    def __init__(self, users: dict[str, User]):
        self.users = users  # by token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []  # the kind of each request, in order
        self.files_asked_for: set[str] = set()
        self.unknown: list[str] = []  # asked for, and not known here
        self.tokens_on_cdn: list[str] = []  # sent where a file's own address was enough
        self._faults: Callable[[int, str], Fault | None] = lambda index, kind: None
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        # As on the Hub, large files are on another host, which is sent no token.
        self.cdn = f"http://localhost:{self._http.server_port}/cdn"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def failing(self, faults: Callable[[int, str], Fault | None]) -> Iterator[None]:
        """Within the block, what happens to a request is decided by its index, counted from 0, and its kind."""
        self.requests.clear()
        self._faults = faults
        try:
            yield
        finally:
            self._faults = lambda index, kind: None

    def note(self, kind: str) -> Fault | None:
        with self._lock:
            self.requests.append(kind)
            return self._faults(len(self.requests) - 1, kind)

    def create(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository, with files if there are any."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        attributes = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}
        repo.commit("main", "initial commit", attributes)
        if files:
            blobs = {name: Blob(content, name.endswith(LFS_SUFFIXES)) for name, content in files.items()}
            repo.commit("main", "files", {**attributes, **blobs})
        return repo

    # What the routes do. Each gets the path's parts, the decoded body and the user, and returns JSON.

    def create_repo(self, body: dict[str, Any], user: User | None) -> Any:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        name, kind = f"{body.get('organization') or user.name}/{body['name']}", body.get("type") or "model"
        repo_id = f"datasets/{name}" if kind == "dataset" else name
        if not self.may_write(repo_id, user):
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{name}"')
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": name, "id": name}
        if repo_id in self.repos:
            raise HubError(409, json.dumps({"error": f"You already created this {kind} repo", **answer}))
        self.create(repo_id, private=body.get("private", body.get("visibility") == "private"))
        return answer

    def may_write(self, repo_id: str, user: User | None) -> bool:
        return user is not None and user.can_write and user.is_member(repo_id)

    def readable(self, repo_id: str, user: User | None) -> Repo:
        repo = self.repos.get(repo_id)
        is_member = user is not None and user.is_member(repo_id)
        if repo is None or (repo.private and not is_member):
            # As the Hub does: nobody learns whether a repository exists that is not theirs to see.
            status, message = (401, "Invalid username or password.") if user is None else (404, "Repository not found")
            raise HubError(status, message, "RepoNotFound")
        if repo.gated and not is_member:
            raise HubError(403, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def writable(self, repo_id: str, user: User | None) -> Repo:
        repo = self.readable(repo_id, user)
        if not self.may_write(repo_id, user):
            raise HubError(403, "You are not allowed to write to this repository")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def info(self, repo: Repo, revision: str) -> Any:
        sha = self.revision(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(repo.commits[sha].files)]
        return {"id": repo.name, "modelId": repo.name, "sha": sha, "private": repo.private, "tags": []} | {
            "gated": repo.gated and "auto",
            "siblings": siblings,
        }

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> Any:
        files = repo.commits[self.revision(repo, revision)].files
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, Any] = {}
        for name, blob in files.items():
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = self.entry(name, blob)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return list(entries.values())

    def entry(self, name: str, blob: Blob) -> dict[str, Any]:
        lfs = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}
        return {"type": "file", "path": name, "oid": blob.oid, "size": len(blob.content)} | (
            {"lfs": lfs} if blob.is_lfs else {}
        )

    def preupload(self, repo: Repo, revision: str, body: dict[str, Any]) -> Any:
        there = repo.commits[self.revision(repo, revision)].files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if self.is_large(file) else "regular",
                    "shouldIgnore": False,
                    "oid": there[file["path"]].oid if file["path"] in there else None,
                }
                for file in body["files"]
            ]
        }

    def is_large(self, file: dict[str, Any]) -> bool:
        return file["path"].endswith(LFS_SUFFIXES) or b"\0" in base64.b64decode(file["sample"])

    def batch(self, repo_id: str, body: dict[str, Any]) -> Any:
        objects: list[dict[str, Any]] = []
        for wanted in body["objects"]:
            actions = {
                "upload": {"href": f"{self.cdn}/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.endpoint}/{repo_id}/lfs-verify"},
            }
            objects.append(wanted if wanted["oid"] in self.lfs else {**wanted, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def verify(self, body: dict[str, Any]) -> Any:
        if len(self.lfs.get(body["oid"], b"")) != body["size"]:
            raise HubError(400, f"{body['oid']} was not uploaded")
        return {}

    def upload(self, oid: str, content: bytes) -> Any:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content has another checksum")
        self.lfs[oid] = content
        return {}

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> Any:
        """All lines or none."""
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise HubError(400, f"the operation {line['key']} is not known here")
        sha = repo.commit(branch, header["summary"], files)
        url = f"{self.endpoint}/{repo.repo_id}/commit/{sha}"
        return {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""}

    def create_branch(self, repo: Repo, branch: str, body: dict[str, Any]) -> Any:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self.revision(repo, body.get("startingPoint") or "main")
        return {}

    def validate_yaml(self, body: dict[str, Any]) -> Any:
        """The Hub's rule that matters here: metadata begin and end with a line of dashes, and are YAML."""
        import yaml

        match = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise HubError(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []})) from error
        warnings = [] if isinstance(metadata, dict) else [{"message": "empty or missing yaml metadata"}]
        return {"errors": [], "warnings": warnings}


def _make_handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_state = hub

    return Handler


# Kind, method, path. The groups are: repository, revision, what else there is.
_NAME = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+?)"
_API = rf"/api/(?:models/|(?=datasets/)){_NAME}"
_ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("info", "GET", rf"{_API}(/revision/(?P<revision>[^/]+))?"),
    ("tree", "GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    ("paths", "POST", rf"{_API}/paths-info/(?P<revision>[^/]+)"),
    ("refs", "GET", rf"{_API}/refs"),
    ("branch", "POST", rf"{_API}/branch/(?P<revision>[^/]+)"),
    ("preupload", "POST", rf"{_API}/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", rf"{_API}/commit/(?P<revision>[^/]+)"),
    ("batch", "POST", rf"/{_NAME}\.git/info/lfs/objects/batch"),
    ("verify", "POST", rf"/{_NAME}/lfs-verify"),
    ("upload", "PUT", r"/cdn/(?P<oid>\w+)"),
    ("download", "GET", r"/cdn/(?P<oid>\w+)"),
    ("download", "HEAD", r"/cdn/(?P<oid>\w+)"),
    ("resolve", "GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("resolve", "HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would wait 40 ms before each body
    server_state: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        hub, body = self.server_state, self.read_body()
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        routes = ((kind, re.fullmatch(route, path)) for kind, method, route in _ROUTES if method == self.command)
        kind, match = next(((kind, match) for kind, match in routes if match), ("", None))
        if match is None:
            hub.unknown.append(f"{self.command} {path}")
            self.answer(404, {}, b'{"error": "no such route"}')
            return
        parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        if kind in ("upload", "download") and self.headers.get("Authorization") is not None:
            hub.tokens_on_cdn.append(path)
        if kind == "resolve":
            hub.files_asked_for.add(parts["path"])
        fault = hub.note(kind)
        if fault == "reset":
            self.break_connection()
            return
        if fault == "error":
            self.answer(500, {}, b'{"error": "Internal error"}')
            return
        with hub._lock:
            status, headers, content = self.act(kind, parts, query, body)
        if fault == "lost":
            self.break_connection()
        else:
            self.answer(status, headers, content, is_truncated=fault == "truncated")

    def act(self, kind: str, parts: dict[str, str], query: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        try:
            if kind == "resolve":
                return self.resolve(parts)
            if kind == "download":
                return self.download(parts["oid"])
            return 200, {"Content-Type": "application/json"}, json.dumps(self.call(kind, parts, query, body)).encode()
        except HubError as error:
            is_json = error.message.startswith("{")
            content = error.message if is_json else json.dumps({"error": error.message})
            headers = {"Content-Type": "application/json", **({} if is_json else error.headers)}
            return error.status, headers, content.encode()

    def call(self, kind: str, parts: dict[str, str], query: Any, body: bytes) -> Any:
        hub, revision = self.server_state, parts.get("revision", "main")
        if kind == "upload":
            return hub.upload(parts["oid"], body)
        user = self.user()
        if kind == "whoami":
            if user is None:
                raise HubError(401, "Invalid username or password.")
            return {"type": "user", "name": user.name, "orgs": [{"name": name} for name in user.organizations]}
        if kind in ("create", "validate"):
            given = json.loads(body)
            return hub.create_repo(given, user) if kind == "create" else hub.validate_yaml(given)
        if kind in ("branch", "preupload", "commit", "batch", "verify"):
            repo = hub.writable(parts["repo"], user)
            if kind == "commit":
                return hub.commit(repo, revision, [json.loads(line) for line in body.splitlines() if line])
            given = json.loads(body or b"{}")
            if kind == "branch":
                return hub.create_branch(repo, revision, given)
            if kind == "preupload":
                return hub.preupload(repo, revision, given)
            return hub.batch(parts["repo"], given) if kind == "batch" else hub.verify(given)
        repo = hub.readable(parts["repo"], user)
        if kind == "info":
            return hub.info(repo, revision)
        if kind == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
            ]
            return {"branches": branches, "tags": [], "converts": []}
        if kind == "paths":
            files = repo.commits[hub.revision(repo, revision)].files
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return [hub.entry(name, files[name]) for name in wanted if name in files]
        is_recursive = query.get("recursive", [""])[0].lower() == "true"
        return hub.tree(repo, revision, parts.get("path", ""), is_recursive)

    def resolve(self, parts: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """A small file itself; of an LFS file where it is, on a server that needs no token."""
        hub = self.server_state
        repo = hub.readable(parts["repo"], self.user())
        sha = hub.revision(repo, parts["revision"])
        blob = repo.commits[sha].files.get(parts["path"])
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        if not blob.is_lfs:
            return 200, headers, blob.content
        size = str(len(blob.content))
        hub.lfs[blob.oid] = blob.content
        headers |= {"X-Linked-Size": size, "X-Linked-Etag": f'"{blob.oid}"'}
        return 302, {**headers, "Location": f"{hub.cdn}/{blob.oid}"}, b""

    def download(self, oid: str) -> tuple[int, dict[str, str], bytes]:
        content = self.server_state.lfs.get(oid)
        if content is None:
            raise HubError(404, "no such object")
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, headers, content[start : end + 1]
        return 200, headers, content

    def user(self) -> User | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server_state.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, headers: dict[str, str], content: bytes, is_truncated: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_truncated else content)
        if is_truncated:
            self.break_connection()

    def break_connection(self) -> None:
        """As a network that fails does it: without a goodbye."""
        self.wfile.flush()
        # Lingering for 0 seconds makes the close a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
