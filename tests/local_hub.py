"""A hub on this machine: as much of the hub's HTTP interface as its own client needs to publish and to fetch a model.

Written from what the client of huggingface_hub sends (create a repository and a branch, ask how to upload, commit, look
up a revision, list its files, fetch one).  It keeps what it is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_local_hub"


class LocalHub(ThreadingHTTPServer):
    """Repositories: name -> branch -> file -> bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run a hub while the block runs."""
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def commit_of(repo: str, branch: str) -> str:
    """A commit for a branch; its files do not change while a test reads them."""
    return hashlib.sha1(f"{repo}@{branch}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories.setdefault(repo, {"main": {}})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo)
            return self._answer({"url": f"{self.server.url}/{repo}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        if found is None:
            return self._answer({"error": f"not written: POST {path}"}, 501)
        repo, what, branch = found.groups()
        branches = self.server.repositories[repo]
        if what == "branch":
            branches.setdefault(branch, {})
            return self._answer({})
        if branch not in branches:
            return self._answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for entry in map(json.loads, body.decode().splitlines()):
            if entry["key"] == "header":
                self.server.messages.append(entry["value"]["summary"])
            else:
                branches[branch][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = commit_of(repo, branch)
        self._answer({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        path = self._path()
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api.group(1), api.group(3)) if api else file.groups()[:2] if file else ("", "")
        branches = self.server.repositories.get(repo)
        if branches is None:
            return self._answer({"error": "no repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        branch = next((b for b in branches if revision in (b, commit_of(repo, b))), None)
        if branch is None:
            return self._answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files, commit = branches[branch], commit_of(repo, branch)
        if api and api.group(2) == "revision":
            return self._answer({"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": []})
        if api:
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            return self._answer([{"type": "file", "path": n, "size": len(c), "oid": oids[n]} for n, c in files.items()])
        assert file is not None
        content = files[file.group(3)]
        if self.command == "GET":
            self.server.fetched.append(file.group(3))
        etag = hashlib.sha1(content).hexdigest()
        self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""
