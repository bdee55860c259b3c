"""A folder on disk that is either whole or not there.

It is filled beside its place and renamed; a lock file lets one process of a machine fill it while
the others wait for it (a lock ends with its process, whatever ended that). Two machines that share
a file system without locks both fill one, and the first rename wins.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat.rundir import fsync_dir
from nanochat.spec import SpecError


def make_folder(
    folder: Path, fill: Callable[[Path], None], is_whole: Callable[[Path], bool]
) -> None:
    """See to it that `is_whole(folder)`, by `fill(staged)` and a rename where it is not so.

    A folder that is not whole is replaced. `fill` fsyncs what it writes. Raises SpecError where the
    place cannot be written.
    """
    staged = folder.with_name(f".{folder.name}.{socket.gethostname()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if is_whole(folder):
                return
            shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
            staged.mkdir()
            try:
                fill(staged)
                fsync_dir(staged)
                _put_in_place(staged, folder, is_whole)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as e:
        raise SpecError(
            f"{folder} cannot be written ({e.strerror or e}); make room there, or set "
            "NANOCHAT_HOME to another place"
        ) from None


def _put_in_place(staged: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    try:
        os.rename(staged, folder)
    except OSError:
        if not is_whole(folder):  # else another machine was first
            raise
    fsync_dir(folder.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
