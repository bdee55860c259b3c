"""The offline guard: with NANOCHAT_OFFLINE=1 any connection that leaves the run is an error.

A compute node without internet does not refuse a connection, it lets it hang; a download hidden in
a library then costs a night. The guard is a Python audit hook (PEP 578), so it sees every library
that goes through Python's sockets, and its error names the line that asked. Allowed are loopback,
Unix sockets and the rendezvous peers of torchrun. Connections made by C++ (gloo, NCCL) are between
ranks only and do not pass here.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import sysconfig
from typing import Any


class OfflineError(RuntimeError):
    """A connection was attempted although the run is offline; names the caller.

    No OSError, because libraries catch those, wait and try again.
    """


def install_guard() -> None:
    """Switch the guard on for this process if NANOCHAT_OFFLINE=1; it cannot be switched off."""
    if os.environ.get("NANOCHAT_OFFLINE") != "1":
        return
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    peers = _peers()

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = args[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            if not isinstance(args[1], tuple):
                return
            host = args[1][0]
        else:
            return
        if isinstance(host, bytes):
            host = host.decode(errors="replace")
        if host is None or host in peers or _is_local(str(host)):
            return
        raise OfflineError(
            f"{_caller()} tried to reach {host!r}, but this run is offline (NANOCHAT_OFFLINE=1). "
            "Bring what is missing with `nanochat fetch` on a machine that has network."
        )

    sys.addaudithook(guard)


def _peers() -> set[str]:
    """Names and addresses of the machines that run ranks of this job."""
    peers = {socket.gethostname(), ""}
    if master := os.environ.get("MASTER_ADDR"):
        peers.add(master)
        with contextlib.suppress(OSError):
            peers |= {str(info[4][0]) for info in socket.getaddrinfo(master, None)}
    return peers


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _caller() -> str:
    """The nearest line of the stack that is not Python's own library."""
    stdlib = sysconfig.get_path("stdlib")
    frame = sys._getframe(2)
    nearest = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages" in name or not name.startswith((stdlib, "<frozen", __file__)):
            nearest = frame
            break
        frame = frame.f_back  # type: ignore[assignment]
    return f"{nearest.f_code.co_filename}:{nearest.f_lineno} ({nearest.f_code.co_name})"
