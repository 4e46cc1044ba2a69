"""A stand-in for the Hugging Face Hub on this machine: what its library asks for when models are fetched and pushed.

Repositories are dicts from a path to the bytes, each with one commit. What is pushed is kept, and every request is
recorded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNKNOWN_LICENSE = "unheard-of"
DOWN = "/goes-down"  # a request of this is the last one that is answered


class Hub:
    """The server's contents.

    Attributes:
        repositories: From OWNER/NAME to {path: bytes}.
        gated: The repositories that nobody may read or write.
        requests: The method, the path and the token of each request.
        created: The body of each request to create a repository.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.close: Callable[[], None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection ends with its answer, so that none outlives the server
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, status=200, body=b"", headers=None, code=None):
        self.send_response(status)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if code is not None:
            self.send_header("X-Error-Code", code)
        headers = {"Content-Length": len(content), "Content-Type": "application/json", **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self):
        path = unquote(urlsplit(self.path).path)
        if path == DOWN:  # only when this is answered
            threading.Thread(target=self.hub.close).start()
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        chunks = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            chunks.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        return path, b"".join(chunks)

    def _readable(self, repository):
        """The files of a repository; None after an error was answered."""
        if repository in self.hub.gated:
            self._answer(403, {"error": "gated"}, code="GatedRepo")
        elif repository not in self.hub.repositories:
            self._answer(404, {"error": "no such repository"}, code="RepoNotFound")
        else:
            return self.hub.repositories[repository]
        return None

    def do_GET(self):
        path, _ = self._begin()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/(.+))?", path):
            repository, revision, tree = match.groups()
            files = self._readable(repository)
            if files is None:
                return
            if (revision or tree or "main") not in ("main", "v1", COMMIT):
                self._answer(404, {"error": "no such revision"}, code="RevisionNotFound")
            elif tree:
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
                ]
                self._answer(body=listed)
            else:
                siblings = [{"rfilename": name} for name in files]
                self._answer(body={"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, _, name = match.groups()
            files = self._readable(repository)
            if files is None:
                return
            if name not in files:
                self._answer(404, {"error": "no such file"}, code="EntryNotFound")
            else:
                self._answer(body=files[name], headers={"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(files[name])}"'})
        else:
            self._answer(200 if path == DOWN else 404, {"error": "unknown"})

    do_HEAD = do_GET

    def do_PUT(self):
        path, body = self._begin()
        self.hub.blobs[path.rsplit("/", 1)[1]] = body
        self._answer()

    def do_POST(self):
        path, body = self._begin()
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append(asked)
            repository = f"{asked['organization']}/{asked['name']}"
            there = repository in self.hub.repositories
            self.hub.repositories.setdefault(repository, {})
            address = f"http://{self.headers['Host']}/{repository}"
            self._answer(409 if there else 200, {"url": address, "error": "it exists"} if there else {"url": address})
        elif path == "/api/validate-yaml":
            bad = '"license" must be one of [mit]' if UNKNOWN_LICENSE in body.decode() else ""
            self._answer(400 if bad else 200, {"errors": [{"message": bad}] if bad else [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            if match[1] in self.hub.gated:
                self._answer(403, {"error": "you may not write here"})
                return
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "regular" if one["path"].endswith((".md", ".json", ".py")) else "lfs",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            self._answer(body={"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"http://{self.headers['Host']}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(body={"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = self.hub.repositories[match[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    data = self.hub.blobs[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                    files[value["path"]] = data
            address = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
            self._answer(body={"commitUrl": address, "commitOid": COMMIT, "success": True})
        else:
            self._answer(404, {"error": "unknown"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def hub_server():
    """Serve a Hub. Yields it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def close():
        server.shutdown()
        server.server_close()

    hub.close = close
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        close()
        thread.join()
