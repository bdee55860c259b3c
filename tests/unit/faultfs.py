"""File layers that fail or kill at a chosen call, for the crash tests of checkpoints.

* `FaultStorage` counts the calls that change the disk and stops the world at the n-th of them: a
  process kill (what was written stays, a write is torn in half), a power cut (what was not synced
  is gone too: contents, names, renames), or a real SIGKILL.
* `FullStorage` is a volume of a given size, with or without telling how much of it is free.
"""

import enum
import errno
import os
import signal
from pathlib import Path

from nanochat.storage import Storage


class Crash(enum.Enum):
    """How the world stops."""

    KILL = "kill"
    POWER_CUT = "power cut"
    SIGKILL = "sigkill"


class Killed(BaseException):
    """Stands for the end of the process; no handler for errors sees it."""


class FaultStorage(Storage):
    """Counts calls in `calls`; crashes at call number `crash_at` (from 0), never if None."""

    def __init__(self, crash_at: int | None = None, how: Crash = Crash.KILL) -> None:
        self.calls: list[str] = []
        self._crash_at = crash_at
        self._how = how
        self._dead = False
        self._paths: dict[int, Path] = {}
        self._unsynced: dict[Path, int] = {}  # file -> bytes of it that are durable
        self._new_names: list[Path] = []
        self._renames: list[tuple[Path, Path, bytes | None]] = []

    def _point(self, name: str) -> None:
        if self._dead:
            raise Killed
        self.calls.append(name)
        if self._crash_at is not None and len(self.calls) > self._crash_at:
            if self._how is Crash.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            self._dead = True
            if self._how is Crash.POWER_CUT:
                self._lose_unsynced()
            raise Killed

    def _lose_unsynced(self) -> None:
        for path, size in self._unsynced.items():
            if path.exists():
                os.truncate(path, size)
        for path in self._new_names:
            path.unlink(missing_ok=True)
        for source, target, replaced in reversed(self._renames):
            os.rename(target, source)
            if replaced is not None:
                target.write_bytes(replaced)

    def make_dir(self, path: Path) -> None:
        self._point(f"make_dir {path.name}")
        super().make_dir(path)

    def open_new(self, path: Path) -> int:
        self._point(f"open {path.name}")
        fd = super().open_new(path)
        self._paths[fd] = path
        self._unsynced[path] = 0
        self._new_names.append(path)
        return fd

    def write(self, fd: int, data: memoryview) -> None:
        try:
            self._point(f"write {self._paths[fd].name}")
        except Killed:
            if self._how is Crash.KILL:
                os.write(fd, data[: len(data) // 2])
            raise
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        """Only noted: a real fsync would make the tests slow and prove nothing."""
        self._point(f"sync {self._paths[fd].name}")
        self._unsynced.pop(self._paths[fd], None)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._point(f"rename {target.name}")
        replaced = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self._renames.append((source, target, replaced))
        self._unsynced = {_moved(p, source, target): n for p, n in self._unsynced.items()}
        self._new_names = [_moved(p, source, target) for p in self._new_names if p != source]

    def sync_dir(self, path: Path) -> None:
        self._point(f"sync_dir {path.name}")
        self._new_names = [p for p in self._new_names if p.parent != path]
        self._renames = [r for r in self._renames if r[1].parent != path]

    def remove(self, path: Path) -> None:
        self._point(f"remove {path.name}")
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        """File by file, so that a kill leaves half of it."""
        for child in sorted(path.iterdir()):
            self.remove(child)
        self._point(f"rmdir {path.name}")
        path.rmdir()


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


class FullStorage(Storage):
    """A volume of `size` bytes that holds the files below `root`.

    honest: whether free_bytes tells the truth; a quota does not show there.
    """

    def __init__(self, root: Path, size: int, honest: bool) -> None:
        self.root = root
        self.size = size
        self.honest = honest

    def _free(self) -> int:
        return self.size - sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file())

    def free_bytes(self, path: Path) -> int:
        return self._free() if self.honest else 1 << 60

    def write(self, fd: int, data: memoryview) -> None:
        if len(data) > self._free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        """Not needed here."""
