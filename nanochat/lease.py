"""One writer per run directory: a lease that its holder renews, and that a dead holder loses.

* flock and pids mean nothing across containers and nodes, and clocks of two nodes may differ. So
  who wants a lease that somebody holds watches it: if the holder writes within `expiry_s`, it
  lives; if it does not, the lease is over. A holder that is known to be dead is not waited for.
* The holder writes through the file that it made, never over the name: a writer that slept through
  its own expiry touches a file that is no longer there, and finds that the name is another's.
* The holder asks every HEARTBEAT_S and ends its run when the lease is another's, before it writes
  anything else.

No torch here, also indirectly.
"""

import contextlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.rundir import RunDir, RunDirError

HEARTBEAT_S = 2.0
EXPIRY_S = 20.0
"""Ten heartbeats. A network file system that holds one write up for longer costs its run the lease,
but only if somebody starts that run a second time meanwhile."""
SETTLE_S = 1.0
"""Two that find the same lease over may both write theirs: the later one has it after this time."""
POLL_S = 0.2


class LeaseLost(RunDirError):
    """Another run has taken this run directory over."""


class Lease:
    """Says who writes in a run directory."""

    def __init__(self, run: RunDir, expiry_s: float = EXPIRY_S, settle_s: float = SETTLE_S) -> None:
        self._run = run
        self._file = run.lease_file
        self._expiry_s = expiry_s
        self._settle_s = settle_s
        self._id = uuid.uuid4().hex
        self.is_held = False

    def acquire(
        self,
        tell: Callable[[str], None] = lambda _: None,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Take the lease: a free one at once, another's when it has shown no life for its expiry.

        `tell` is given what is waited for. False where `is_given_up` became true meanwhile. Raises
        RunDirError where the holder lives.
        """
        found: bytes | None = None
        quiet_since = 0.0
        while not is_given_up():
            now = self._read()
            if now is None:
                if self._create():
                    return True
                continue
            is_first_look = found is None
            if is_first_look:
                quiet_since = time.monotonic() - self._age_s()
            elif now != found:
                raise RunDirError(
                    f"{self._run.path} is in use by {_holder(now)}, which goes on writing; stop "
                    f"it first (`nanochat stop {self._run.path}`), or give this run another name "
                    "or --run-dir"
                )
            found = now
            left_s = self._expiry_s - (time.monotonic() - quiet_since)
            if left_s <= 0.0 or self._is_dead(found):
                self._take_over()
                return True
            if is_first_look:
                tell(self._waiting(found, left_s))
            time.sleep(min(POLL_S, left_s))
        return False

    def renew(self) -> None:
        """Give a sign of life; takes no space. Raises LeaseLost when another has taken over."""
        try:
            with open(self._file, "r+b", buffering=0) as f:
                held = _parsed(f.read())
                if held.get("id") != self._id:
                    raise LeaseLost(
                        f"{self._run.path} was taken over by {_holder(held)} after this run had "
                        f"given no sign of life for {self._expiry_s:.0f} s; nothing more is written"
                    )
                f.seek(0)
                f.write(self._document())
        except FileNotFoundError:
            # Removed by hand: it is ours again, unless another was faster. A folder that is gone
            # raises here too.
            if not self._create():
                raise LeaseLost(f"{self._run.path} was taken over by another run") from None

    def release(self) -> None:
        """Give the lease back if it is ours; on a volume that takes nothing any more it expires."""
        self.is_held = False
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and _parsed(found).get("id") == self._id:
                self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file where there is none; False where there is one."""
        staged = self._staged()
        try:
            os.link(staged, self._file)
        except FileExistsError:
            return False
        except OSError:  # no hard links here: FUSE, some network volumes
            try:
                with open(self._file, "xb") as f:
                    f.write(self._document())
            except FileExistsError:
                return False
        finally:
            staged.unlink(missing_ok=True)
        self.is_held = True
        return True

    def _take_over(self) -> None:
        os.replace(self._staged(), self._file)
        time.sleep(self._settle_s)
        found = self._read()
        if found is None or _parsed(found).get("id") != self._id:
            raise RunDirError(
                f"{self._run.path}: another run started at the same moment and has it now"
            )
        self.is_held = True

    def _staged(self) -> Path:
        """The lease under a name of its own: two containers may have the same pid."""
        staged = self._file.with_name(f".{self._file.name}.{self._id}")
        staged.write_bytes(self._document())
        return staged

    def _document(self) -> bytes:
        """The lease; always of the same length, because it is written over the one before."""
        holder = {
            "id": self._id,
            "host": socket.gethostname(),
            "boot": boot_id(),
            "pid": os.getpid(),
            "heartbeat": f"{time.time():.6f}",
        }
        return (json.dumps(holder) + "\n").encode()

    def _read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None

    def _age_s(self) -> float:
        """Seconds since the lease was written, by the clock of the file system itself."""
        probe = self._file.with_name(f".lease.{self._id}.now")
        probe.touch()
        now_s = probe.stat().st_mtime
        probe.unlink()
        try:
            return max(0.0, now_s - self._file.stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def _is_dead(self, found: bytes) -> bool:
        """Whether the holder is known to have ended; a file that is no lease has no holder."""
        holder = _parsed(found)
        try:
            if holder["boot"] != boot_id() or holder["boot"] == UNKNOWN_BOOT:
                return False
            return holder["id"] != self._id and not _is_alive(int(holder["pid"]))
        except (KeyError, TypeError, ValueError):
            return True

    def _waiting(self, found: bytes, seconds: float) -> str:
        return (
            f"{self._run.path} was last in use by {_holder(found)}; waiting up to {seconds:.0f} s "
            "for a sign of life from it, then this run takes over"
        )


UNKNOWN_BOOT = "unknown"


def boot_id() -> str:
    """What tells two boots, or two containers, of one host name apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return UNKNOWN_BOOT


def _parsed(document: bytes) -> dict[str, Any]:
    """The lease in a file; empty where it is none."""
    try:
        holder = json.loads(document)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(found: bytes | dict[str, Any]) -> str:
    holder = _parsed(found) if isinstance(found, bytes) else found
    return f"pid {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _is_alive(pid: int) -> bool:
    # The number of a namespace is given again: in the next container the holder's pid is our own.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie has ended, whoever has yet to wait for it
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()[:64]
    except OSError:
        return sys.platform != "linux"
