"""One file over HTTPS: resumed by range, tried again with back-off, never half a file in its place.

* Bytes go to a `.part` file beside the target; a later attempt, or a later process, continues it
  from where it ends (RFC 9110, section 14), unless the server's ETag says that it is another file.
* A server that says 429 or 503 with Retry-After is left alone by every thread for so long; other
  faults are tried again after growing waits, and only attempts without any progress are counted.
* Size and sha256 are checked before the rename; a bad file goes to quarantine, and is fetched again
  from its first byte.
"""

import email.utils
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import tenacity

from nanochat.rundir import fsync_dir
from nanochat.storage import sha256_of

MAX_STALLED_ATTEMPTS = 8
"""Attempts in a row without a new byte after which a file is given up for this time."""
MAX_BAD_FILES = 2
"""Whole files of the wrong content after which it is the publisher's file that differs."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 900.0
TIMEOUT = httpx.Timeout(30.0, read=60.0)
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class DownloadError(RuntimeError):
    """A file could not be brought; the message says why and what to do."""


class Refused(DownloadError):
    """Trying again is of no use: not there, not allowed, or not the file that the lock knows."""


class _Passing(Exception):
    """A fault that may pass."""

    def __init__(self, message: str, stalled: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.stalled = stalled
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Remote:
    """A file at its publisher, and what is known of it."""

    url: str
    size: int | None = None
    """Bytes."""
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that is in its place."""

    size: int
    sha256: str


class Downloader:
    """Brings files; its methods may be called by many threads."""

    def __init__(
        self,
        client: httpx.Client,
        on_bytes: Callable[[int], None] = lambda count: None,
        *,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        """on_bytes: told how many bytes arrived; a negative number when some were thrown away."""
        self._client = client
        self._on_bytes = on_bytes
        self._first_wait_s = first_wait_s
        self._cancelled = threading.Event()
        self._not_before_s = 0.0

    def cancel(self) -> None:
        """Make every thread give up at its next byte; what they have stays for the next time."""
        self._cancelled.set()

    def size_of(self, url: str) -> int | None:
        """Bytes of a file as the server states them; None where it does not, or does not answer
        (the fetch that follows tries again, and says so)."""
        try:
            response = self._client.head(url, headers={"Accept-Encoding": "identity"})
        except httpx.TransportError:
            return None
        length = response.headers.get("Content-Length", "")
        return int(length) if response.is_success and length.isdigit() else None

    def fetch(self, remote: Remote, target: Path) -> Fetched:
        """Bring a file to its place. Raises DownloadError, Refused or OSError (the disk)."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for bad in range(1, MAX_BAD_FILES + 1):
            transfer = _Transfer(self, remote, target)
            self._until_complete(transfer)
            problem, fetched = transfer.check()
            if problem is None:
                transfer.put_in_place()
                return fetched
            kept = transfer.quarantine()
            if bad == MAX_BAD_FILES:
                raise Refused(
                    f"{remote.url}: {problem}; it was fetched {bad} times. The publisher's file is "
                    f"not what the lock knows, or something on the way changes it (kept in {kept})"
                )
        raise AssertionError

    def _until_complete(self, transfer: "_Transfer") -> None:
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=lambda state: _passing(state).stalled >= MAX_STALLED_ATTEMPTS,
            wait=self._wait_s,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            retry(transfer.attempt)
        except _Passing as e:
            raise DownloadError(
                f"{transfer.remote.url}: {e} ({e.stalled} attempts without progress). What has "
                "arrived is kept; run the same command again to continue"
            ) from None

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        fault = _passing(state)
        if fault.retry_after_s is not None:
            self._not_before_s = max(self._not_before_s, time.monotonic() + fault.retry_after_s)
            return fault.retry_after_s
        longest = min(LONGEST_WAIT_S, self._first_wait_s * 2.0 ** max(0, fault.stalled - 1))
        return longest * random.uniform(0.5, 1.0)

    def _sleep(self, seconds: float) -> None:
        self._cancelled.wait(seconds)

    def wait_for_turn(self) -> None:
        """Wait while a server has asked for patience."""
        while (left_s := self._not_before_s - time.monotonic()) > 0 and not self.is_cancelled:
            self._sleep(left_s)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def client(self) -> httpx.Client:
        return self._client

    def count(self, num_bytes: int) -> None:
        """Tell the progress bar."""
        self._on_bytes(num_bytes)


class _Transfer:
    """One file on its way."""

    def __init__(self, downloader: Downloader, remote: Remote, target: Path) -> None:
        self.remote = remote
        self._downloader = downloader
        self._target = target
        self._part = target.with_name(f".{target.name}.part")
        self._tag_file = target.with_name(f".{target.name}.etag")
        self._stalled = 0

    def attempt(self) -> None:
        """Bring what is missing. Raises _Passing, or Refused."""
        self._downloader.wait_for_turn()
        before = self._size()
        if self.remote.size is not None and before == self.remote.size:
            return
        try:
            with self._downloader.client.stream(
                "GET", self.remote.url, headers=self._headers()
            ) as r:
                self._take(r, before)
        except httpx.HTTPError as e:
            raise self._passing(f"{type(e).__name__}: {e}", before) from None
        if self.remote.size is not None and self._size() < self.remote.size:
            raise self._passing(f"ended after {self._size()} of {self.remote.size} bytes", before)

    def check(self) -> tuple[str | None, Fetched]:
        """(what is wrong with the whole file, its size and hash)."""
        found = Fetched(self._size(), sha256_of(self._part))
        if self.remote.size is not None and found.size != self.remote.size:
            return f"has {found.size} bytes, expected were {self.remote.size}", found
        if self.remote.sha256 is not None and found.sha256 != self.remote.sha256:
            return f"has sha256 {found.sha256}, expected was {self.remote.sha256}", found
        return None, found

    def put_in_place(self) -> None:
        """Durably, and at once."""
        with open(self._part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(self._part, self._target)
        self._tag_file.unlink(missing_ok=True)
        fsync_dir(self._target.parent)

    def quarantine(self) -> Path:
        """Move the bad file out of the way, where a person can look at it."""
        folder = self._target.parent / ".quarantine"
        folder.mkdir(exist_ok=True)
        kept = folder / f"{self._target.name}.{sha256_of(self._part)[:12]}"
        self._downloader.count(-self._size())
        shutil.move(self._part, kept)
        self._tag_file.unlink(missing_ok=True)
        return kept

    def _take(self, response: httpx.Response, before: int) -> None:
        """Write the body of a response behind what is there."""
        status = response.status_code
        if status == 416:  # what is there is as long as the file, or longer
            if self.remote.size is not None or self._size_in(response) != before:
                self._start_again(before)
                raise self._passing("the server has fewer bytes than were there", before)
            return
        if not response.is_success:
            self._refuse(response, before)
        starts_at = before if status == 206 else 0
        if status == 206 and _range_start(response) != before:
            self._start_again(before)
            raise self._passing("the server sent another range than was asked for", before)
        if before and starts_at == 0:
            self._start_again(before)
        offered = self._size_in(response)
        if self.remote.size is not None and offered not in (None, self.remote.size):
            raise Refused(
                f"{self.remote.url} has {offered} bytes, the lock says {self.remote.size}: it is "
                "another file than the one that the lock knows"
            )
        if tag := _strong_tag(response):
            self._tag_file.write_text(tag)
        with open(self._part, "ab") as f:
            for chunk in response.iter_raw():
                if self._downloader.is_cancelled:
                    raise DownloadError("cancelled")
                f.write(chunk)
                self._downloader.count(len(chunk))

    def _refuse(self, response: httpx.Response, before: int) -> None:
        """Raise what an error status means."""
        status = response.status_code
        if status in TRY_AGAIN:
            after_s = _retry_after_s(response)
            raise self._passing(f"HTTP {status} {response.reason_phrase}", before, after_s)
        meaning = {
            401: "it asks for a login: set HF_TOKEN to a token of an account that may read it",
            403: "access is not granted: accept the conditions on its page, and set HF_TOKEN",
            404: "there is no such file; the publisher has moved it, or the mirror has not got it",
        }.get(status, response.reason_phrase)
        raise Refused(f"{self.remote.url}: HTTP {status}: {meaning}")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if before := self._size():
            headers["Range"] = f"bytes={before}-"
            if self._tag_file.exists():
                headers["If-Range"] = self._tag_file.read_text()
        return headers

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _start_again(self, before: int) -> None:
        self._downloader.count(-before)
        self._part.unlink(missing_ok=True)
        self._tag_file.unlink(missing_ok=True)

    def _passing(self, message: str, before: int, after_s: float | None = None) -> _Passing:
        self._stalled = 0 if self._size() > before else self._stalled + 1
        return _Passing(message, self._stalled, after_s)

    def _size_in(self, response: httpx.Response) -> int | None:
        """Bytes of the whole file as this response states them."""
        if response.status_code in (206, 416):
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            total = response.headers.get("Content-Length", "")
        return int(total) if total.isdigit() else None


def _passing(state: tenacity.RetryCallState) -> _Passing:
    assert state.outcome is not None
    fault = state.outcome.exception()
    assert isinstance(fault, _Passing)
    return fault


def _range_start(response: httpx.Response) -> int | None:
    """First byte of a 206: `Content-Range: bytes 100-199/200`."""
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


def _strong_tag(response: httpx.Response) -> str | None:
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else None


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of Retry-After, given as seconds or as a date (RFC 9110, 10.2.3); None without."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return min(float(text), LONGEST_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return None
    return min(max(0.0, until - time.time()), LONGEST_RETRY_AFTER_S)
