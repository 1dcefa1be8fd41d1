"""A stand-in for the Hugging Face hub: a local server with the parts of its protocol that the tests need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: Repository, with `datasets/` before data sets -> file -> content; all at one commit.
Repositories = dict[str, dict[str, bytes]]


class Hub(ThreadingHTTPServer):
    """A server with a hub's repositories.

    Attributes:
        repositories: files by repository.
        loaded: files whose content was requested.
    """

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.loaded: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _answer(self, body: bool) -> None:
        path = urlparse(self.path).path.strip("/")
        if path.startswith("api/"):
            self._api(path.removeprefix("api/").removeprefix("models/").split("/"), body)
        else:
            repository, _, rest = path.partition("/resolve/")
            commit, _, name = rest.partition("/")
            content = self.server.repositories.get(repository, {}).get(name)
            self._send(content if commit == COMMIT else None, body, name)

    def _api(self, parts: list[str], body: bool) -> None:
        size = 3 if parts[0] == "datasets" else 2
        files = self.server.repositories.get("/".join(parts[:size]))
        if files is None:
            self._send(None, body)
        elif len(parts) == size:
            self._send(json.dumps({"id": "/".join(parts), "sha": COMMIT, "siblings": []}).encode(), body)
        else:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self._send(json.dumps(entries).encode() if parts[-1] == COMMIT else None, body)

    def _send(self, content: bytes | None, body: bool, name: str = "") -> None:
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        if name:
            self.server.loaded.append(name)
        self.wfile.write(content)


@contextmanager
def hub_of(repositories: Repositories) -> Iterator[Hub]:
    with Hub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
