"""One writer per run directory, over containers, nodes, kills and sleeps."""

import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.lease import Lease, LeaseLost, boot_id
from nanochat.rundir import RunDir, RunDirError

HOUR_S = 3600.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def of_another_machine(run: RunDir, age_s: float = 0.0, **fields: Any) -> None:
    """The lease of a holder whose process cannot be looked up here."""
    holder = {"id": "1", "host": "c1", "boot": "other", "pid": 7, "heartbeat": "1"} | fields
    run.lease_file.write_text(json.dumps(holder))
    written_s = time.time() - age_s
    os.utime(run.lease_file, (written_s, written_s))


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at this machine finds another one, so that no process can be looked up."""
    boots = itertools.count()
    monkeypatch.setattr("nanochat.lease.boot_id", lambda: f"{next(boots):09d}")


@pytest.fixture
def elsewhere(run: RunDir, strangers: None) -> Iterator[Callable[[float], None]]:
    """A holder on another machine that writes every so many seconds until the test ends."""
    over = threading.Event()
    threads = []

    def start(every_s: float) -> None:
        holder = Lease(run, settle_s=0.0)
        holder.acquire()

        def beat() -> None:
            while not over.wait(every_s):
                holder.renew()

        threads.append(threading.Thread(target=beat))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join()


def test_a_free_lease_is_taken_at_once_and_given_back(run: RunDir) -> None:
    lease, told = Lease(run, expiry_s=HOUR_S), []
    assert lease.acquire(told.append) and lease.is_held
    lease.renew()
    assert json.loads(run.lease_file.read_text())["boot"] == boot_id()
    lease.release()
    assert not run.lease_file.exists() and not lease.is_held and told == []
    assert [p.name for p in run.path.iterdir() if "lease" in p.name] == []


def test_giving_back_to_a_volume_that_takes_nothing_is_silent(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    lease = Lease(run, expiry_s=HOUR_S)
    assert lease.acquire(lambda message: None)
    monkeypatch.setattr(Path, "unlink", refuse)
    lease.release()
    assert not lease.is_held and run.lease_file.exists()


def test_a_holder_that_writes_is_refused_at_its_next_heartbeat(
    run: RunDir, elsewhere: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(0.05)
    monkeypatch.setattr("nanochat.lease.POLL_S", 0.01)
    told: list[str] = []
    with pytest.raises(
        RunDirError, match=rf"pid {os.getpid()} on .*, which goes on.*nanochat stop"
    ):
        Lease(run, expiry_s=HOUR_S).acquire(told.append)
    assert len(told) == 1


def test_a_killed_container_is_waited_for_until_its_lease_expires(run: RunDir) -> None:
    of_another_machine(run)
    told: list[str] = []
    started = time.monotonic()
    assert Lease(run, expiry_s=0.5, settle_s=0.0).acquire(told.append)
    assert time.monotonic() - started >= 0.45
    assert len(told) == 1 and "pid 7 on c1; waiting up to" in told[0]


def test_a_lease_that_expired_long_ago_is_not_waited_for(run: RunDir) -> None:
    of_another_machine(run, age_s=HOUR_S + 1)
    told: list[str] = []
    Lease(run, expiry_s=HOUR_S, settle_s=0.0).acquire(told.append)
    assert told == []


def test_a_lease_given_back_meanwhile_is_taken(run: RunDir) -> None:
    of_another_machine(run)
    lease = Lease(run, expiry_s=HOUR_S, settle_s=0.0)
    assert lease.acquire(lambda _: run.lease_file.unlink())
    assert lease.is_held


def test_waiting_can_be_given_up_and_changes_nothing(run: RunDir) -> None:
    of_another_machine(run)
    before = run.lease_file.read_bytes()
    lease = Lease(run, expiry_s=HOUR_S)
    assert not lease.acquire(is_given_up=lambda: True)
    lease.release()
    assert run.lease_file.read_bytes() == before


def test_a_lease_of_a_dead_process_is_not_waited_for(run: RunDir) -> None:
    code = (
        "import os, sys; from nanochat.lease import *; "
        "Lease(RunDir(sys.argv[1])).acquire(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    assert run.lease_file.exists()
    Lease(run, expiry_s=HOUR_S, settle_s=0.0).acquire()


def test_the_next_container_may_get_the_pid_and_the_namespace_of_the_killed_one(
    run: RunDir,
) -> None:
    of_another_machine(run, boot=boot_id(), pid=os.getpid())
    Lease(run, expiry_s=HOUR_S, settle_s=0.0).acquire()


@pytest.mark.parametrize("damaged", [b"", b"{broken", b"[]", b'{"id": "1"}', b"\xff"])
def test_a_file_that_is_no_lease_has_no_holder(run: RunDir, damaged: bytes) -> None:
    run.lease_file.write_bytes(damaged)
    Lease(run, expiry_s=HOUR_S, settle_s=0.0).acquire()


def test_a_writer_that_slept_through_its_lease_finds_it_taken_and_leaves_it_alone(
    run: RunDir,
) -> None:
    first, second = Lease(run, settle_s=0.0), Lease(run, settle_s=0.0)
    first.acquire()
    second.acquire()
    taken = run.lease_file.read_bytes()
    with pytest.raises(LeaseLost, match=f"taken over by pid {os.getpid()}"):
        first.renew()
    first.release()
    assert run.lease_file.read_bytes() == taken
    second.renew()


def test_a_lease_removed_by_hand_is_made_again(run: RunDir) -> None:
    lease = Lease(run)
    lease.acquire()
    run.lease_file.unlink()
    lease.renew()
    assert run.lease_file.exists()


def test_a_folder_that_is_gone_is_an_error_of_the_volume(run: RunDir, tmp_path: Path) -> None:
    lease = Lease(run)
    lease.acquire()
    run.path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        lease.renew()


def test_it_works_without_hard_links(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lease = Lease(run)
    assert lease.acquire()
    run.lease_file.unlink()
    lease.renew()
    assert run.lease_file.exists()


def test_of_many_that_start_at_once_one_has_it(run: RunDir, strangers: None) -> None:
    """Also where all of them find the same lease over."""
    for is_there in (False, True):
        if is_there:
            of_another_machine(run, age_s=HOUR_S)
        leases = [Lease(run, expiry_s=1.0, settle_s=0.3) for _ in range(8)]
        barrier = threading.Barrier(8)

        def start(lease: Lease, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with contextlib.suppress(RunDirError):
                lease.acquire()

        threads = [threading.Thread(target=start, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        still = []
        for lease in leases:
            with contextlib.suppress(LeaseLost):
                if lease.is_held:
                    lease.renew()
                    still.append(lease)
        assert len(still) == 1
        still[0].release()
