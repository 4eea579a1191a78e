"""A small server on this machine that answers like the Hugging Face hub: a listing, and files in whole or in part."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4096  # bytes; from here on a file is kept as a large one, by its SHA-256


@dataclass
class Request:
    path: str
    headers: Message  # whose names are of any case


@dataclass
class Hub:
    """One repository with the branch ``main``.  What a test sets here changes the answers from then on."""

    repo: str
    files: dict[str, bytes]
    extra_names: list[str] = field(default_factory=list)  # listed beside the files
    status: int = 200
    error_code: str = ""
    refuses: str = "/api/"  # the status is that of paths with this in them
    listing: bytes | None = None  # in place of the real one
    stop_after: dict[str, int] = field(default_factory=dict)  # name -> bytes, then the connection hangs
    drop_after: dict[str, int] = field(default_factory=dict)  # name -> bytes, then it is cut, once
    served: dict[str, bytes] = field(default_factory=dict)  # name -> other bytes than were announced
    ignores_ranges: bool = False
    requests: list[Request] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)  # a connection hangs
    url: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "", "HF_HUB_OFFLINE": "", "NO_PROXY": "*", "no_proxy": "*"}

    def asked_for(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(f"/resolve/{COMMIT}/{name}")]

    def names_asked_for(self) -> set[str]:
        parts = [request.path.partition(f"/resolve/{COMMIT}/") for request in self.requests]
        return {unquote(name) for _, found, name in parts if found}

    def describe(self) -> bytes:
        siblings = [self._sibling(name, data) for name, data in self.files.items()]
        siblings += [self._sibling(name, b"{}") for name in self.extra_names]
        return json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode()

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
        if len(data) >= LARGE:
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    closing: threading.Event

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(path, self.headers))
        name = unquote(path.removeprefix(f"/{self.hub.repo}/resolve/{COMMIT}/"))
        if self.hub.status != 200 and self.hub.refuses in path:
            self._answer(self.hub.status, b"", {"X-Error-Code": self.hub.error_code} if self.hub.error_code else {})
        elif path == f"/api/models/{self.hub.repo}/revision/main":
            self._answer(200, self.hub.describe() if self.hub.listing is None else self.hub.listing, {})
        elif name in self.hub.files:
            self._file(name)
        else:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if "/revision/" in path else "EntryNotFound"})

    def _file(self, name: str) -> None:
        data = self.hub.served.get(name, self.hub.files[name])
        start = 0
        wanted = self.headers.get("Range", "")
        if wanted and not self.hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        n_sent = min(self.hub.stop_after.get(name, len(data)), self.hub.drop_after.pop(name, len(data)))
        self._answer(206 if start else 200, data[start:], headers, n_sent)
        if n_sent < len(data):
            self.close_connection = True
            if name in self.hub.stop_after:
                self.hub.stopped.set()
                self.closing.wait(60)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], n_sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body[:n_sent])
            self.wfile.flush()
        except ConnectionError:  # the client was ended by a test
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    """Serves on a free port of this machine until the block ends."""
    closing = threading.Event()
    handler = type("Handler", (_Handler,), {"hub": hub, "closing": closing})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            closing.set()
            server.shutdown()
            thread.join()


def repository(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint, as a hub has them."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
