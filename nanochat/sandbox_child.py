"""The inside of the sandbox: locks its own process in, then runs one program.

Run by nanochat/sandbox.py as `python -I -S -B sandbox_child.py PIPE`, with an empty environment
and no open file but a program on stdin and a pipe to tell the outcome. It imports nothing but the
standard library, and that all beforehand: once locked in, it can open nothing any more. Its locks:

* no_new_privs, without which the next two are not permitted to a normal user, and the end with the
  parent's end (prctl(2));
* Landlock (landlock(7)), where the kernel has it: no file system at all;
* limits of time, memory, files and their size (setrlimit(2));
* seccomp(2): only the system calls of ALLOWED, every other one fails with EPERM. No opening of
  files, no sockets, no new processes or threads, no signals to others, no tracing. The filter looks
  at the architecture first, so that calls of another ABI do not slip through.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
SECCOMP_MODE_FILTER = 2
SIGKILL = 9
TELL = 3
"""Descriptor of the pipe to the parent."""

# linux/audit.h, and the numbers of the system calls of asm/unistd.h, per architecture
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED: dict[str, tuple[int, int | None]] = {
    # name: (x86_64, aarch64); None where the architecture has it not
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "getcwd": (79, 17),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}

PRELOADED = (
    "abc argparse array ast base64 bisect calendar cmath codecs collections collections.abc "
    "contextlib copy csv dataclasses datetime decimal difflib enum fractions functools gc glob "
    "graphlib hashlib heapq hmac html inspect io itertools json keyword linecache locale logging "
    "math numbers operator os pathlib pickle platform pprint queue random re reprlib secrets "
    "statistics string struct sys textwrap threading time timeit token tokenize traceback types "
    "typing unicodedata unittest uuid warnings weakref zlib encodings.ascii encodings.latin_1 "
    "encodings.utf_16 encodings.idna"
)
"""What programs may import."""


def main() -> None:
    """Read {"program", "cpu_s", "memory_bytes"} from stdin; tell `ready`, then `passed`."""
    task = json.load(sys.stdin)
    for name in PRELOADED.split():
        __import__(name)
    arrange_descriptors(int(sys.argv[1]))
    try:
        lock_in(task["cpu_s"], task["memory_bytes"])
    except OSError as e:
        os.write(TELL, str(e).encode())
        os._exit(1)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    sys.setrecursionlimit(10_000)
    os.write(TELL, b"ready ")
    exec(compile(task["program"], "<program>", "exec"), {"__name__": "__main__"})
    os.write(TELL, b"passed")
    os._exit(0)


def arrange_descriptors(tell: int) -> None:
    """Nothing to read, what is printed goes nowhere, and the pipe has the number TELL."""
    if tell != TELL:
        os.dup2(tell, TELL, inheritable=False)
        os.close(tell)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def lock_in(cpu_s: int, memory_bytes: int) -> None:
    """From here on only ALLOWED. Raises OSError where the kernel cannot do it."""
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, PR_SET_PDEATHSIG, SIGKILL)
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    landlock(libc)
    limit(cpu_s, memory_bytes)
    program = filter_program()
    buffer = ctypes.create_string_buffer(program, len(program))

    class Fprog(ctypes.Structure):
        """struct sock_fprog of linux/filter.h."""

        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    fprog = Fprog(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p).value)
    _prctl(libc, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog))


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Hard limits; a process may lower them further, and never raise them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s += int(used.ru_utime + used.ru_stime) + 1
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, TELL + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _prctl(libc: ctypes.CDLL, option: int, *arguments: object) -> None:
    padded = [*arguments, 0, 0, 0][:4]
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]
    if libc.prctl(option, *wide) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def filter_program() -> bytes:
    """The seccomp filter as classic BPF (linux/filter.h): allow ALLOWED, else EPERM.

    Each instruction is {u16 code, u8 jt, u8 jf, u32 k}; seccomp_data has the number of the call at
    byte 0 and the architecture at byte 4.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(38, f"no filter is known for the processor {machine}")
    column = list(ARCHITECTURES).index(machine)
    numbers = [n for pair in ALLOWED.values() if (n := pair[column]) is not None]
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 1
    steps = [
        (load, 0, 0, 4),
        (jump_if_equal, 1, 0, ARCHITECTURES[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    for i, number in enumerate(numbers):
        steps.append((jump_if_equal, len(numbers) - i, 0, number))
    steps += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def landlock(libc: ctypes.CDLL) -> None:
    """Forbid every access to files, where the kernel has Landlock; seccomp forbids it anyway."""
    create, restrict = 444, 446  # the same on all architectures
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return
    # access rights of linux/landlock.h by the version of the ABI that brought them
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(min(version, 5), 16)
    handled = struct.pack("=Q", (1 << rights) - 1)
    ruleset = libc.syscall(create, handled, len(handled), 0)
    if ruleset < 0 or libc.syscall(restrict, ruleset, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock: {os.strerror(error)}")
    os.close(ruleset)


if __name__ == "__main__":
    main()
