"""What is in the layers, the configuration and the history of an image, read once as a stream.

`docker save` writes one of two forms, and manifest.json says in both which members are layers:
ID/layer.tar (engines up to 24; a layer that is there twice is a link) and blobs/sha256/DIGEST (an
OCI layout, from 25 on).
"""

import itertools
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, Any, cast

SCANNED_BYTES = 1 << 20
"""Files up to this size are searched; whoever leaks a key does not pad it."""
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{200}")
FORBIDDEN = {
    "git": re.compile(r"(^|/)\.git(/|$)"),
    "package caches": re.compile(
        r"^(root|home/[^/]+)/\.(cache|cargo|npm)/.|^var/cache/apt/archives/.*\.deb$"
        r"|^var/lib/apt/lists/.*Packages"
    ),
    "host keys": re.compile(r"^etc/ssh/ssh_host_"),
    "credentials": re.compile(
        r"(^|/)(\.env|\.netrc|\.pypirc|\.runpod|id_(rsa|ed25519)|\.docker/config\.json)(/|$)"
    ),
    "tests": re.compile(r"^opt/nanochat/app/(.*/)?(tests/|test_[^/]*\.py$)"),
    "tests of wheels": re.compile(
        r"^(opt/nanochat/venv|root/skypilot-runtime)/lib/[^/]+/site-packages/(.*/)?tests/"
    ),
    "Rust": re.compile(r"^usr/bin/(rustc|cargo)|(^|/)[^/]+\.rlib$"),
    "build folder": re.compile(r"^(build|out)(/|$)"),
}
KEY_SAMPLES = re.compile(r"^(opt/nanochat/venv|root/skypilot-runtime)/.*/(tests?|testing)/")
TAR_BLOCK = 512
GZIP = b"\x1f\x8b"


@dataclass
class Scan:
    """All layers of an image; `private` is what must not stand in a file, a name or a document."""

    private: re.Pattern[bytes]
    layers: list[str] = field(default_factory=list)
    """Members that are layers, from the base to the last."""
    layer_bytes: dict[str, int] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    """Configuration with history, manifests."""
    names: Counter[str] = field(default_factory=Counter)
    twice_bytes: int = 0
    forbidden: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def read(self, chunks: Iterable[bytes]) -> None:
        """Read a saved image. Raises ValueError where a layer that it names was not understood."""
        links: dict[str, str] = {}
        with tarfile.open(fileobj=cast(Any, Stream(chunks)), mode="r|") as archive:
            for member in archive:
                if member.issym():
                    folder = posixpath.dirname(member.name)
                    links[member.name] = posixpath.normpath(f"{folder}/{member.linkname}")
                elif member.isfile():
                    self._add(member.name, cast(IO[bytes], archive.extractfile(member)))
        for image in json.loads(self.documents["manifest.json"]):
            self.layers += [links.get(name, name) for name in image["Layers"]]
            unread = {*self.layers, image["Config"]} - {*self.layer_bytes, *self.documents}
            if unread:
                raise ValueError(f"the manifest names what was not read: {unread}")

    def table(self) -> str:
        """Size of each layer that has files, from the base to the last, and of all."""
        sizes = [self.layer_bytes[name] for name in self.layers]
        rows = [f"{size / 1e6:9,.1f} MB" for size in sizes if size]
        return "\n".join([*rows, f"{sum(sizes) / 1e6:9,.1f} MB in all"])

    def _add(self, name: str, content: IO[bytes]) -> None:
        head = content.read(TAR_BLOCK)
        is_small = len(head) < TAR_BLOCK and not head.startswith(GZIP)
        if is_small or head[:1] in (b"{", b"["):
            self.documents[name] = head + content.read()
            self._search(name, self.documents[name])
            return
        chunks = itertools.chain([head], iter(lambda: content.read(1 << 20), b""))
        with tarfile.open(fileobj=cast(Any, Stream(chunks)), mode="r|*") as layer:
            self._add_layer(name, layer)

    def _add_layer(self, name: str, layer: tarfile.TarFile) -> None:
        total = 0
        for entry in layer:
            path = entry.name.removeprefix("./").rstrip("/")
            total += entry.size
            self.forbidden += [f"{why}: {path}" for why, p in FORBIDDEN.items() if p.search(path)]
            self._search(path, path.encode(errors="replace"))
            if not entry.isfile():
                continue
            if self.names[path]:
                self.twice_bytes += entry.size
            self.names[path] += 1
            if entry.size <= SCANNED_BYTES:
                content = cast(IO[bytes], layer.extractfile(entry)).read()
                if PRIVATE_KEY.search(content) and not KEY_SAMPLES.search(path):
                    self.found.append(f"private key: {path}")
                self._search(path, content)
        self.layer_bytes[name] = total

    def _search(self, where: str, content: bytes) -> None:
        if found := self.private.search(content):
            self.found.append(f"{found[0].decode()}: {where}")


class Stream:
    """Chunks as a file that tarfile reads once."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, have = [self._rest], len(self._rest)
        while have < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]
