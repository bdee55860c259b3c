"""A hub on this machine: the parts of the Hugging Face hub and of a plain file server that fetch
uses, with the faults that real ones have.

* `/api/datasets/REPO/revision/REV` and `/api/datasets/REPO/paths-info/REV` as the hub's REST API.
* `/datasets/REPO/resolve/REV/PATH` redirects to another host name (127.0.0.1 -> localhost), as the
  hub redirects to its store; the store serves ranges and ETags. `/files/PATH` is served directly.
* A fault is asked for by `hub.faults[path].append(...)` and is used up by one request of that path.
"""

import hashlib
import json
import threading
import urllib.parse
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request of a file."""

    status: int | None = None
    retry_after: str | None = None
    cut_after: int | None = None
    """Bytes of the body after which the connection ends, although more were announced."""
    flip: bool = False
    """Change a byte of the body."""
    no_ranges: bool = False
    """Answer a range with the whole file."""
    off_by: int = 0
    """Begin the range so many bytes late, and say so."""
    wait: threading.Event | None = None
    """Send half of the body, then wait for this event."""


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """The server; `with Hub() as hub:`. Its address is `hub.url`."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    """Repository -> path -> content; the plain files stand under the name `files`."""
    without_lfs: set[str] = field(default_factory=set)
    """Paths whose sha256 the API does not know."""
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    requests: list[Request] = field(default_factory=list)
    token: str | None = None
    """Asked for where it is set."""
    address: str = "127.0.0.1"
    """Where it listens; a Docker bridge's address is reached from containers."""
    store_name: str = "localhost"
    """Name of the same server in redirects."""

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer((self.address, 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self._server.server_port}"

    @property
    def store_url(self) -> str:
        """The same server under another name, as a store of its own."""
        return f"http://{self.store_name}:{self._server.server_port}"

    def num_requests(self, path: str) -> int:
        """GETs of a file's bytes."""
        return sum(r.method == "GET" and r.path.endswith(f"/store/{path}") for r in self.requests)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            form = urllib.parse.parse_qs(self.rfile.read(length).decode())
            self._note()
            path = urllib.parse.unquote(self.path)
            repository = path.removeprefix("/api/datasets/").partition("/paths-info/")[0]
            if not self._has_fault(path):
                self._json([_info(hub, repository, p) for p in form["paths"]
                            if p in hub.repositories[repository]])  # fmt: skip

        def _answer(self, with_body: bool) -> None:
            self._note()
            path = urllib.parse.unquote(self.path)
            is_store = path.startswith("/store/")
            bearer = f"Bearer {hub.token}"
            if hub.token and not is_store and self.headers.get("Authorization") != bearer:
                return self._empty(401)
            if path.startswith("/api/datasets/"):
                return self._revision(path)
            if path.startswith("/datasets/"):
                repository, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
                name = rest.partition("/")[2]
                if name not in hub.repositories.get(repository, {}):
                    return self._empty(404)
                where = f"{hub.store_url}/store/{repository}/{name}"
                return self._empty(302, {"Location": where, "X-Repo-Commit": COMMIT})
            if is_store:
                *repository_parts, name = path.removeprefix("/store/").split("/", 2)
                content = hub.repositories.get("/".join(repository_parts), {}).get(name)
                return self._file(f"{'/'.join(repository_parts)}/{name}", content, with_body)
            name = path.removeprefix("/files/")
            return self._file(f"files/{name}", hub.repositories["files"].get(name), with_body)

        def _note(self) -> None:
            hub.requests.append(Request(self.command, self.path, dict(self.headers)))

        def _revision(self, path: str) -> None:
            repository = path.removeprefix("/api/datasets/").partition("/revision/")[0]
            if repository not in hub.repositories:
                return self._empty(404, {"X-Error-Code": "RepoNotFound"})
            if not self._has_fault(path):
                self._json({"id": repository, "sha": COMMIT, "siblings": []})
            return None

        def _has_fault(self, path: str) -> bool:
            if not hub.faults[path]:
                return False
            fault = hub.faults[path].pop(0)
            assert fault.status is not None
            retry = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._empty(fault.status, retry)
            return True

        def _file(self, path: str, content: bytes | None, with_body: bool) -> None:
            if content is None:
                return self._empty(404)
            fault = hub.faults[path].pop(0) if with_body and hub.faults[path] else Fault()
            if fault.status is not None:
                retry = {"Retry-After": fault.retry_after} if fault.retry_after else {}
                return self._empty(fault.status, retry)
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            start = self._range_start(tag, fault)
            headers = {"ETag": tag, "Accept-Ranges": "bytes"}
            if start is not None and start >= len(content):
                headers["Content-Range"] = f"bytes */{len(content)}"
                return self._empty(416, headers)
            if start is not None:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start or 0 :]
            if fault.flip:
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(200 if start is None else 206)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self._send(body, fault)
            return None

        def _range_start(self, tag: str, fault: Fault) -> int | None:
            asked = self.headers.get("Range")
            if asked is None or fault.no_ranges:
                return None
            if self.headers.get("If-Range", tag) != tag:
                return None
            return int(asked.removeprefix("bytes=").rstrip("-")) + fault.off_by

        def _send(self, body: bytes, fault: Fault) -> None:
            if fault.wait is not None:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                fault.wait.wait(10.0)
                self.close_connection = True
                return
            if fault.cut_after is not None:
                self.wfile.write(body[: fault.cut_after])
                self.close_connection = True
                return
            self.wfile.write(body)

        def _json(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler


def _info(hub: Hub, repository: str, path: str) -> dict[str, Any]:
    content = hub.repositories[repository][path]
    info: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path not in hub.without_lfs:
        sha256 = hashlib.sha256(content).hexdigest()
        info["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return info
