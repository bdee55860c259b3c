"""`nanochat fetch`: every byte that the stages of a spec will touch, and nothing more.

* What: nanochat.touches. Whence: nanochat/data.lock.json. How: infra.download.
* What the kit's lock does not know of a file (its sha256, its size, the newest revision of its
  repository) is asked of the hub once, or computed from what arrives, and written to the
  `data.lock.json` in the source's folder: from then on it is what every check compares with.
* The embedded corpus and a text file need no network: their shards are made here too, so that
  afterwards the folder serves every stage, in an image, a volume or a scratch file system.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from infra import hub
from infra.download import TIMEOUT, Downloader, DownloadError, Fetched, Refused, Remote
from nanochat import corpus
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, EXIT_STOPPED, atomic_write_json, read_json
from nanochat.spec import RunSpec, SpecError
from nanochat.storage import sha256_of
from nanochat.touches import (
    LOCK_FORMAT,
    LOCK_NAME,
    data_roots,
    folder_lock,
    package_lock,
    published_paths,
)

NUM_CONNECTIONS = 8
FLOOR_BYTES = 256 << 20
"""Left free on the volume."""
Lock = dict[str, Any]


@dataclass
class Wanted:
    """A file to have, and what is known of it."""

    path: str
    """SOURCE/NAME"""
    facts: dict[str, Any]
    """size and sha256 (or None), url where the source is no repository of the hub."""
    place: Path | None = None
    """Where it lies; None where it is to be fetched."""

    @property
    def source(self) -> str:
        return self.path.partition("/")[0]

    @property
    def name(self) -> str:
        return self.path.partition("/")[2]


@dataclass
class Result:
    """What a fetch did, or a check found."""

    folder: str
    files: int = 0
    files_fetched: int = 0
    bytes_fetched: int = 0
    seconds: float = 0.0
    text: str | None = None
    """Folder of the shards that were made or found, for sources that need no network."""
    problems: list[str] = field(default_factory=list)
    unanswered: str | None = None
    """Why nothing could be asked for; the files are then not looked at one by one."""
    exit_code: int = EXIT_DONE

    def render(self) -> str:
        """For people."""
        if self.unanswered:
            return self.unanswered
        lines = [f"not there: {problem}" for problem in self.problems]
        if self.text:
            lines.append(f"text: {self.text}")
        if self.problems:
            lines.append(f"{len(self.problems)} of {self.files} files are not right")
        else:
            brought = ""
            if self.files_fetched:
                brought = f", {self.files_fetched} of them fetched ({self.bytes_fetched:,} bytes)"
            lines.append(f"{self.files} files right in {self.folder}{brought}")
        return "\n".join(lines)


class Progress:
    """What a fetch tells while it runs; here nothing."""

    def begin(self, num_files: int, num_bytes: int) -> None: ...
    def on_bytes(self, num_bytes: int) -> None: ...
    def on_file(self, path: str) -> None: ...
    def end(self) -> None: ...


def fetch(
    spec: RunSpec,
    to: Path | None = None,
    *,
    lock: Lock | None = None,
    progress: Progress | None = None,
    first_wait_s: float = 1.0,
) -> Result:
    """Bring what the spec's stages read to the data folder `to` (NANOCHAT_HOME/data).

    lock: sources instead of the kit's own. Raises SpecError where it cannot begin: no room, no
    network allowed, a folder that cannot be written. Files that could not be brought are in the
    result.
    """
    started = time.monotonic()
    roots = (to,) if to is not None else data_roots()
    folder = roots[-1]
    progress = progress or Progress()
    _make_writable(folder)
    with _one_at_a_time(folder):
        wanted = _wanted(spec, roots, lock)
        result = Result(str(folder), files=len(wanted))
        missing = [w for w in wanted if w.place is None]
        if missing:
            _forbid_offline(missing)
            _bring(missing, folder, lock or package_lock(), progress, result, first_wait_s)
        if spec.data.source != "fineweb_edu" and not result.unanswered:
            made = corpus.ensure(spec.data, roots)
            result.text = str(made.train[0].path.parent)
    result.seconds = time.monotonic() - started
    return result


def check(spec: RunSpec, to: Path | None = None, *, lock: Lock | None = None) -> Result:
    """Read every byte that the spec's stages read and compare it with the locks; no network."""
    roots = (to,) if to is not None else data_roots()
    wanted = _wanted(spec, roots, lock)
    result = Result(str(roots[-1]), files=len(wanted))
    for w in wanted:
        if w.place is None:
            result.problems.append(f"{w.path} is missing")
        elif w.facts["sha256"] is None:
            result.problems.append(f"{w.path}: no lock knows its sha256")
        elif sha256_of(w.place) != w.facts["sha256"]:
            result.problems.append(f"{w.place} does not have the sha256 of its lock")
    if spec.data.source != "fineweb_edu":
        try:
            result.text = str(corpus.verify(spec.data, roots).train[0].path.parent)
        except SpecError as e:
            result.problems.append(str(e))
    if result.problems:
        result.exit_code = EXIT_SPEC
    return result


# -- what is wanted, and what is there


def _wanted(spec: RunSpec, roots: tuple[Path, ...], lock: Lock | None) -> list[Wanted]:
    """Files of the spec's stages, each once; whole ones with their place."""
    sources = lock or package_lock()
    return [_look(path, roots, sources) for path in published_paths(spec)]


def _look(path: str, roots: tuple[Path, ...], sources: Lock) -> Wanted:
    source, _, name = path.partition("/")
    shipped = sources[source]["files"].get(name, {})
    for root in roots:
        place = root / path
        if not place.is_file():
            continue
        beside = folder_lock(root / source).get(name, {})
        facts = {k: shipped.get(k) or beside.get(k) for k in ("size", "sha256")}
        if facts["size"] in (None, place.stat().st_size):
            return Wanted(path, facts, place)
    return Wanted(path, {"size": None, "sha256": None, **shipped})


def _forbid_offline(missing: list[Wanted]) -> None:
    if os.environ.get("NANOCHAT_OFFLINE") == "1":
        shown = ", ".join(w.path for w in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise SpecError(
            f"{len(missing)} files have to be fetched ({shown}), but NANOCHAT_OFFLINE=1 forbids "
            "any connection; run fetch where there is a network, without that variable"
        )


# -- bringing it


def _bring(
    missing: list[Wanted],
    folder: Path,
    sources: Lock,
    progress: Progress,
    result: Result,
    first_wait_s: float,
) -> None:
    """Fetch all that is missing; what fails is noted in the result."""
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=hub.headers()) as client:
        downloader = Downloader(client, progress.on_bytes, first_wait_s=first_wait_s)
        try:
            remotes = _remotes(missing, folder, sources, downloader)
        except DownloadError as e:
            result.unanswered, result.exit_code = str(e), EXIT_STOPPED
            return
        _check_room(remotes, folder)
        progress.begin(len(missing), sum(r.size or 0 for r in remotes.values()))
        for path, remote in remotes.items():
            progress.on_bytes(_bytes_there(folder / path, remote))
        locks = _FolderLocks(folder, sources)
        pool = ThreadPoolExecutor(NUM_CONNECTIONS)
        try:
            futures = {
                pool.submit(downloader.fetch, remote, folder / path): path
                for path, remote in remotes.items()
            }
            for future in as_completed(futures):
                path = futures[future]
                fetched = _outcome(path, future.result, result)
                if fetched is not None:
                    locks.add(path, fetched, remotes[path])
                    progress.on_file(path)
                    result.files_fetched += 1
                    result.bytes_fetched += fetched.size
        except BaseException:
            downloader.cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            progress.end()


def _outcome(path: str, get: Callable[[], Fetched], result: Result) -> Fetched | None:
    """The fetched file, or None with the reason in the result."""
    try:
        return get()
    except Refused as e:
        result.exit_code = EXIT_SPEC
        result.problems.append(f"{path}: {e}")
    except DownloadError as e:
        result.exit_code = max(result.exit_code, EXIT_STOPPED)
        result.problems.append(f"{path}: {e}")
    except OSError as e:
        result.exit_code = EXIT_SPEC
        result.problems.append(f"{path} cannot be written: {e.strerror or e}")
    return None


def _remotes(
    missing: list[Wanted], folder: Path, sources: Lock, downloader: Downloader
) -> dict[str, Remote]:
    """Address, size and hash of every missing file; the hub is asked for what no lock knows."""
    remotes: dict[str, Remote] = {}
    for source in dict.fromkeys(w.source for w in missing):
        of_source = [w for w in missing if w.source == source]
        repository = sources[source].get("hub")
        if repository is None:
            for w in of_source:
                size = w.facts["size"] or downloader.size_of(w.facts["url"])
                remotes[w.path] = Remote(w.facts["url"], size, w.facts["sha256"])
            continue
        revision = sources[source]["revision"] or _pinned(folder / source)
        found = hub.describe(repository, revision, {w.name: w.facts for w in of_source})
        remotes |= {f"{source}/{name}": remote for name, remote in found.items()}
    return remotes


def _pinned(folder: Path) -> str | None:
    """The revision of which a former fetch brought files."""
    lock = read_json(folder / LOCK_NAME)
    revision = lock.get("revision") if isinstance(lock, dict) else None
    return revision if isinstance(revision, str) else None


def _bytes_there(target: Path, remote: Remote) -> int:
    part = target.with_name(f".{target.name}.part")
    return min(part.stat().st_size, remote.size or 0) if part.exists() else 0


def _check_room(remotes: dict[str, Remote], folder: Path) -> None:
    need = sum((r.size or 0) - _bytes_there(folder / path, r) for path, r in remotes.items())
    free = shutil.disk_usage(folder).free
    if need + FLOOR_BYTES > free:
        raise SpecError(
            f"{need / 2**30:.2f} GiB are to be fetched and {FLOOR_BYTES / 2**30:.2f} GiB stay free,"
            f" but {folder} has {free / 2**30:.2f} GiB free. Make room, or fetch to another place: "
            "--to DIR, or NANOCHAT_HOME"
        )


class _FolderLocks:
    """The locks beside the data, brought up to date file by file."""

    def __init__(self, folder: Path, sources: Lock) -> None:
        self._folder = folder
        self._sources = sources
        self._writing = threading.Lock()

    def add(self, path: str, fetched: Fetched, remote: Remote) -> None:
        """Note a file that is in its place."""
        source, _, name = path.partition("/")
        shipped = self._sources[source]
        file = self._folder / source / LOCK_NAME
        first_seen = remote.sha256 is None or not shipped["files"].get(name, {}).get("sha256")
        entry = {
            "size": fetched.size,
            "sha256": fetched.sha256,
            "url": remote.url,
            "known_from": "first fetch" if first_seen else "lock of the kit",
        }
        with self._writing:
            lock = read_json(file)
            lock = lock if isinstance(lock, dict) else {}
            files = {**lock.get("files", {}), name: entry}
            head = {"format": LOCK_FORMAT, "source": source, "licence": shipped["licence"]}
            if "hub" in shipped:
                head |= {"hub": shipped["hub"], "revision": hub.revision_in(remote.url)}
            atomic_write_json(file, {**head, "files": dict(sorted(files.items()))})


# -- the folder


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
    except OSError as e:
        raise SpecError(
            f"{folder} cannot be written ({e.strerror}); give a place that can: --to DIR, or "
            "NANOCHAT_HOME"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Fetches into one folder follow each other; where the file system has no locks, they mix.

    Mixing is wasteful, not harmful: every file is checked before its rename.
    """
    with open(folder / ".fetch.lock", "w") as f:
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
