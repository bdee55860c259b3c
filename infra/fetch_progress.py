"""The progress of a fetch on stderr: one bar in a terminal, a line now and then in a log."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from infra.fetch import Progress as Told

LINE_EVERY_S = 10.0


class Bar(Told):
    """One bar over the bytes of all files."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._files = self._num_files = 0

    def begin(self, num_files: int, num_bytes: int) -> None:
        self._num_files = num_files
        self._task = self._bar.add_task(f"0 of {num_files} files", total=num_bytes or None)
        self._bar.start()

    def on_bytes(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)

    def on_file(self, path: str) -> None:
        self._files += 1
        self._bar.update(self._task, description=f"{self._files} of {self._num_files} files")

    def end(self) -> None:
        self._bar.stop()


class Lines(Told):
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files = self._num_files = 0
        self._bytes = self._num_bytes = 0
        self._said_s = time.monotonic()

    def begin(self, num_files: int, num_bytes: int) -> None:
        self._num_files, self._num_bytes = num_files, num_bytes
        sys.stderr.write(f"fetch: {num_files} files, {num_bytes / 1e9:.2f} GB\n")

    def on_bytes(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes += num_bytes
            if time.monotonic() - self._said_s > LINE_EVERY_S:
                self._said_s = time.monotonic()
                self._say()

    def on_file(self, path: str) -> None:
        self._files += 1

    def end(self) -> None:
        self._say()

    def _say(self) -> None:
        sys.stderr.write(
            f"fetch: {self._files} of {self._num_files} files, {self._bytes / 1e9:.2f} of "
            f"{self._num_bytes / 1e9:.2f} GB\n"
        )


def progress_here() -> Told:
    """A bar where a person watches, else lines."""
    return Bar() if sys.stderr.isatty() else Lines()
