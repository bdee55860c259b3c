"""The file layer of checkpoints: every change that a save makes to the disk is one call here.

* `Storage` has one method per system call that can fail or be the last one before a kill. Tests
  replace it by one that counts the calls and kills, or fails, at each of them in turn.
* `HashedFile` takes size and sha256 while the bytes pass, so that a save never reads back.

No torch here, also indirectly.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WRITE_BYTES = 8 << 20
"""Bytes hashed and written at once: small enough to be still in the cache for the second pass."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about a file."""

    size: int
    sha256: str


class HashedFile:
    """A new file that is written once from front to end."""

    def __init__(self, storage: "Storage", fd: int) -> None:
        self._storage = storage
        self._fd = fd
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; `data` is bytes, or a view of unsigned bytes."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            piece = view[start : start + WRITE_BYTES]
            self._hash.update(piece)
            self._storage.write(self._fd, piece)
            self._size += len(piece)

    @property
    def record(self) -> FileRecord:
        """Size and hash of what was written so far."""
        return FileRecord(self._size, self._hash.hexdigest())


class Storage:
    """The disk."""

    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; one that is there is fine (another rank made it)."""
        path.mkdir(parents=True, exist_ok=True)

    def open_new(self, path: Path) -> int:
        """Create or empty a file; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> None:
        """Write all of `data`; one write(2) may take less than it was given."""
        while len(data):
            data = data[os.write(fd, data) :]

    def sync(self, fd: int) -> None:
        """Make the content of a file durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; an existing file `target` is replaced atomically."""
        os.rename(source, target)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written on the volume of a folder."""
        return shutil.disk_usage(path).free

    # -- made of the above

    @contextmanager
    def new_file(self, path: Path) -> Iterator[HashedFile]:
        """A new file, durable when the block ends without an error."""
        fd = self.open_new(path)
        try:
            yield HashedFile(self, fd)
            self.sync(fd)
        finally:
            self.close(fd)

    def write_new(self, path: Path, data: bytes) -> FileRecord:
        """Write a small file durably."""
        with self.new_file(path) as f:
            f.write(data)
        return f.record

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a small file so that a crash leaves the old or the new content."""
        staged = path.with_name(f".{path.name}.tmp")
        self.write_new(staged, data)
        self.rename(staged, path)
        self.sync_dir(path.parent)


def sha256_of(path: Path) -> str:
    """Hash of a file that is on the disk."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
