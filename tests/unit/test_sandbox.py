"""Hostile programs: nothing escapes, nothing keeps running, nothing is written, nothing is read."""

import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanochat import sandbox, sandbox_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")

REFUSED = [
    "os.fork()",
    "threading.Thread(target=print).start()",
    "__import__('subprocess').run(['true'])",
    "os.execv('/bin/true', ['true'])",
    "__import__('socket').socket()",
    "__import__('socket').create_connection(('127.0.0.1', {port}))",
    "open('{folder}/written', 'w')",
    "open('{folder}/there', 'a')",
    "open('{folder}/there')",
    "open(f'/proc/{{os.getppid()}}/environ')",
    "os.listdir('{folder}')",
    "os.remove('{folder}/there')",
    "os.rename('{folder}/there', '{folder}/moved')",
    "os.symlink('/etc', '{folder}/link')",
    "os.mkdir('{folder}/made')",
    "os.chmod('{folder}/there', 0o777)",
    "os.kill(os.getppid(), 9)",
    "os.kill(-1, 9)",
    "os.setuid(0)",
    "resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
    "__import__('sqlite3')",
    "__import__('ctypes')",
]
"""Each of these is refused by an exception, and the program goes on."""

TRY_ALL = """
import os, resource, threading
for attempt in {attempts}:
    try:
        exec(attempt)
    except (OSError, RuntimeError, ImportError, ValueError):
        continue
    raise AssertionError(attempt)
"""

ENDS_BADLY = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: raise SystemExit",
    "memory": "hoard = [bytearray(1 << 20) for _ in range(4096)]",
    "nested memory": "x = 'a'\nwhile True: x += x",
    "recursion": "def f(): f()\nf()",
    "endless sleep": "import time\ntime.sleep(1000)",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: pass",
    "deaf to exceptions": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "endless at exit": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])\n"
    "raise SystemExit",
    "endless output": "while True: print('x' * 100000)",
    "leave early": "import sys\nsys.exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "no program": "this is no program",
    "deep nesting": "x = " + "(" * 100_000 + ")" * 100_000,
}
"""Programs that must not be taken for right, and must not outlive their time."""

RAW_CALLS = """
import gc
(libc_class,) = [o for o in gc.get_objects() if isinstance(o, type) and o.__name__ == "CDLL"][:1]
libc = libc_class(None)
for call, *arguments in (
    ("socket", 2, 1, 0), ("fork",), ("kill", 1, 0), ("ptrace", 0, 0, 0, 0),
    ("open", b"/etc/passwd", 0), ("unshare", 0x10000000), ("setuid", 0), ("mount", 0, 0, 0, 0, 0),
):
    assert getattr(libc, call)(*arguments) == -1, call
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").write_text("secret")
    return tmp_path


def test_it_runs_here() -> None:
    assert sandbox.problem() is None


def test_every_way_out_is_refused_and_leaves_nothing(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        attempts = [attempt.format(folder=folder, port=port) for attempt in REFUSED]
        assert sandbox.passes(TRY_ALL.format(attempts=attempts))
        with pytest.raises(TimeoutError):
            server.accept()
    assert [p.name for p in folder.iterdir()] == ["there"]
    assert (folder / "there").read_text() == "secret"
    assert (folder / "there").stat().st_mode & 0o777 != 0o777


@pytest.mark.parametrize("name", sorted(ENDS_BADLY))
def test_a_bad_end_is_no_pass_and_nothing_runs_on(name: str) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    started_s = time.monotonic()
    assert not sandbox.passes(ENDS_BADLY[name], timeout_s=0.3)
    assert time.monotonic() - started_s < sandbox.START_S + 5
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before


def test_the_system_calls_themselves_are_refused() -> None:
    """Also where a program gets hold of ctypes by the back door."""
    assert sandbox.passes(RAW_CALLS)


def test_no_secret_is_in_its_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert sandbox.passes("import os\nassert not [k for k in os.environ if k != 'LC_CTYPE']")
    open_files = (
        "import errno, os\n"
        "def is_open(d):\n"
        "    try: os.lseek(d, 0, 1)\n"
        "    except OSError as e: return e.errno != errno.EBADF\n"
        "    return True\n"
        "assert [d for d in range(256) if is_open(d)] == [0, 1, 2, 3]"
    )
    assert sandbox.passes(open_files)


def test_what_programs_need_they_have() -> None:
    program = """
from typing import List
import math, re, collections, itertools, heapq, hashlib, string, random, time, datetime, warnings
assert math.gcd(12, 18) == 6 and hashlib.md5(b"").hexdigest().startswith("d41d")
random.random(); time.sleep(0.01); datetime.datetime.now(); warnings.warn("no reason to fail")
print("what a program prints goes nowhere")
def f(n): return 1 if n == 0 else n * f(n - 1)
assert f(2000) > 0
try:
    open("/etc/passwd")
except PermissionError:
    pass
"""
    assert sandbox.passes(program)
    assert not sandbox.passes(program + "assert f(3) == 7")


def test_the_program_is_killed_with_the_rank_that_waits_for_it() -> None:
    """PR_SET_PDEATHSIG: a rank that is killed leaves no program behind."""
    child_of_child = (
        "from nanochat import sandbox\nsandbox.problem()\nprint('up', flush=True)\n"
        "sandbox.passes('while True: pass', 60.0)"
    )
    rank = psutil.Popen(
        [sys.executable, "-c", child_of_child], stdout=-1, cwd=Path(__file__).parents[2]
    )
    assert rank.stdout.readline() == b"up\n"
    deadline = time.monotonic() + 30
    while not (programs := rank.children()) or programs[0].cpu_times().user < 0.5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank.kill()
    gone, alive = psutil.wait_procs(programs, timeout=10)
    rank.wait()
    rank.stdout.close()
    assert not alive


def test_without_seccomp_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = Path(sandbox_child.__file__).read_text()
    refuses = text.replace("_prctl(libc, PR_SET_SECCOMP", "_prctl(libc, 9999")
    assert refuses != text
    (tmp_path / "child.py").write_text(refuses)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    sandbox.problem.cache_clear()
    try:
        assert "prctl(9999)" in (sandbox.problem() or "")
        with pytest.raises(AssertionError, match="never run bare"):
            sandbox.passes("pass")
    finally:
        sandbox.problem.cache_clear()


def test_the_filter_allows_nothing_that_opens_or_starts_anything() -> None:
    forbidden = {"open", "openat", "openat2", "socket", "connect", "clone", "clone3", "fork",
                 "vfork", "execve", "execveat", "kill", "tkill", "tgkill", "ptrace", "mount",
                 "unlink", "rename", "bpf", "setrlimit", "prlimit64", "io_uring_setup", "prctl",
                 "process_vm_readv", "memfd_create", "sendmsg", "pidfd_open"}  # fmt: skip
    assert not forbidden & set(sandbox_child.ALLOWED)
    program = sandbox_child.filter_program()
    assert len(program) % 8 == 0 and len(program) // 8 < 4096


def test_it_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.problem.cache_clear()
    try:
        assert sandbox.problem() == "darwin has no seccomp"
    finally:
        sandbox.problem.cache_clear()
