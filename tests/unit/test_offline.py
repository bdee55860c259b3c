"""The offline guard names whoever reaches out, and leaves loopback alone."""

import http.client
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest

from nanochat.offline import OfflineError, install_guard

install_guard()


@pytest.mark.parametrize("host", ["example.org", "192.0.2.1", "2001:db8::1"])
def test_a_connection_that_leaves_names_its_caller(host: str) -> None:
    with pytest.raises(OfflineError, match=rf"test_offline\.py:\d+ .*{host}.*nanochat fetch"):
        socket.create_connection((host, 80), timeout=1)


def test_a_library_in_between_does_not_hide_the_caller() -> None:
    with pytest.raises(OfflineError, match=r"test_offline\.py:\d+ \(test_a_library"):
        urllib.request.urlopen("http://example.org/", timeout=1)


def test_udp_is_guarded_too() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, pytest.raises(OfflineError):
        s.sendto(b"x", ("192.0.2.1", 53))


def test_a_message_with_parts_is_guarded_too() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, pytest.raises(OfflineError):
        s.sendmsg([b"x"], [], 0, ("192.0.2.1", 53))


@pytest.mark.parametrize("ask", [socket.gethostbyname, socket.gethostbyname_ex])
def test_asking_for_a_name_the_old_way_is_guarded_too(ask: Callable[[str], object]) -> None:
    with pytest.raises(OfflineError, match="example.org"):
        ask("example.org")
    assert ask("localhost")


def test_loopback_and_unix_sockets_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port), timeout=5) as s:
            assert s.getpeername()[1] == port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    with pytest.raises(ConnectionRefusedError):
        connection.connect()
    a, b = socket.socketpair()
    with a, b:
        a.send(b"x")
        assert b.recv(1) == b"x"
        a.sendmsg([b"y"])
        assert b.recv(1) == b"y"


def test_without_the_variable_there_is_no_guard() -> None:
    code = (
        "import os; os.environ['NANOCHAT_OFFLINE'] = '0'\n"
        "from nanochat.offline import install_guard, OfflineError\n"
        "install_guard()\n"
        "import socket\n"
        "try: socket.create_connection(('192.0.2.1', 9), timeout=0.01)\n"
        "except OfflineError: print('guarded')\n"
        "except OSError: print('free')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "free"
