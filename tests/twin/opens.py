"""Which files of some folders are opened, by whatever process and library: inotify(7)."""

import ctypes
import os
import select
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

IN_OPEN, IN_Q_OVERFLOW, IN_ISDIR = 0x20, 0x4000, 0x40000000
EVENT = struct.Struct("iIII")
READ_BYTES = 1 << 16


class Opens:
    """Notes the regular files below some folders that are opened while it is entered.

    Folders that come to be meanwhile are not seen.
    """

    def __init__(self, *folders: Path) -> None:
        self.opened: set[Path] = set()
        self._folders = folders

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        self._place: dict[int, Path] = {}
        for folder in self._folders:
            for place in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
                watch = libc.inotify_add_watch(self._fd, os.fsencode(place), IN_OPEN)
                assert watch >= 0, f"{place}: {os.strerror(ctypes.get_errno())}"
                self._place[watch] = place
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        os.close(self._fd)

    def _follow(self) -> None:
        while True:
            is_last = self._done.is_set()
            ready, _, _ = select.select([self._fd], [], [], 0.0 if is_last else 0.05)
            if ready:
                self._take(os.read(self._fd, READ_BYTES))
            elif is_last:
                return

    def _take(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            watch, mask, _, length = EVENT.unpack_from(events, at)
            at += EVENT.size
            name = os.fsdecode(events[at : at + length].rstrip(b"\0"))
            at += length
            assert not mask & IN_Q_OVERFLOW, "more files were opened than the kernel notes"
            if not mask & IN_ISDIR and watch in self._place:
                self.opened.add(self._place[watch] / name)
