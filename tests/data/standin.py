"""A stand-in for the Hugging Face Hub on this machine: the requests that data sets need, with faults on demand."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

NAME = "some/set"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What goes wrong with one answer: an error `status` with `headers`, or a good answer that ends or stalls after `after`
    bytes, has all bytes flipped, or is whole where a range was asked for.
    """  # fmt: skip

    kind: str  # status | cut | stall | flip | whole
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


class Hub:
    """Serves `files` (path: content) as the data set NAME at COMMIT; faults wait per kind of request until they are used.

    Kinds: "revision", "tree" (pages of `page` entries), "bytes" (of the Hub's address), "cdn" (of the address that it sends
    the client on to). `requests` lists (kind, path or page, first byte asked for, token).
    """  # fmt: skip

    def __init__(self, page: int = 1000) -> None:
        self.files: dict[str, bytes] = {}
        self.sums: dict[str, str] = {}  # SHA-256 to claim instead of the true one
        self.faults: dict[str, deque[Fault]] = {kind: deque() for kind in ("revision", "tree", "bytes", "cdn")}
        self.requests: list[tuple[str, str, int | None, str | None]] = []
        self.page = page
        self._over = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, kind: str, *faults: Fault) -> None:
        self.faults[kind].extend(faults)

    def count(self, kind: str) -> int:
        return sum(request[0] == kind for request in self.requests)

    def starts(self, kind: str) -> list[int | None]:
        """First bytes asked for, in order."""
        return [request[2] for request in self.requests if request[0] == kind]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        if path == f"/api/datasets/{NAME}" or path.startswith(f"/api/datasets/{NAME}/revision/"):
            self._answer("revision", path, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            folder = path.removeprefix(f"/api/datasets/{NAME}/tree/{COMMIT}").strip("/")
            self._tree(folder, parse_qs(url.query))
        elif path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            self._file("bytes", path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/"))
        elif path.startswith("/cdn/"):
            self._file("cdn", path.removeprefix("/cdn/"))
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, folder: str, query: dict[str, list[str]]) -> None:
        recursive = query.get("recursive", ["False"])[0].lower() == "true"
        names = [
            name
            for name in sorted(self.hub.files)
            if (name.startswith(f"{folder}/") or not folder) and (recursive or name.rpartition("/")[0] == folder)
        ]
        first = int(query.get("cursor", ["0"])[0])
        entries = []
        for name in names[first : first + self.hub.page]:
            content = self.hub.files[name]
            sha256 = self.hub.sums.get(name, hashlib.sha256(content).hexdigest())
            lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append({"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs})
        headers = {}
        if first + self.hub.page < len(names):
            address = f"{self.hub.url}{urlparse(self.path).path}?cursor={first + self.hub.page}&recursive={recursive}"
            headers["Link"] = f'<{address}>; rel="next"'
        self._answer("tree", str(first), json.dumps(entries).encode(), headers)

    def _file(self, kind: str, name: str) -> None:
        content = self.hub.files.get(name)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-ETag"] = headers["ETag"]
        if kind == "bytes" and not self.hub.faults["bytes"]:
            self._note(kind, name)
            self._send(302, b"", headers | {"Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"})
            return
        self._answer(kind, name, content, headers)

    def _note(self, kind: str, what: str) -> None:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else None
        self.hub.requests.append((kind, what, start, self.headers.get("Authorization")))

    def _answer(self, kind: str, what: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._note(kind, what)
        headers = dict(headers or {})
        fault = self.hub.faults[kind].popleft() if self.hub.faults[kind] else Fault("")
        if fault.kind == "status":
            self._send(fault.status, b"", fault.headers)
            return
        if fault.kind == "flip":
            content = bytes(byte ^ 1 for byte in content)
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and fault.kind != "whole":
            start, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{last}/{len(content)}"
            content = content[start : last + 1]
        self._send(status, content, headers, fault)

    def _send(self, status: int, content: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault is not None and fault.kind in ("cut", "stall")
        self.wfile.write(content[: fault.after] if cut and fault else content)
        if fault is not None and fault.kind == "stall":
            self.wfile.flush()
            self.hub._over.wait(30)
        self.close_connection = self.close_connection or cut
