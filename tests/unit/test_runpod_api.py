"""Whatever the provider answers is a ProviderError, and who waits for it goes on."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import deadman, podrun
from infra.deadman import Switch
from infra.meter import Price, meter_of_this_pod
from infra.runpod_api import ProviderError, RunPodApi, api_key

CUT = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"data":'
BROKEN = {
    "cut": CUT,
    "cut chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nab",
    "no status line": b"hello\r\n\r\n",
    "nothing": b"",
    "cut error page": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 500\r\n\r\nxx",
    "cut chunk of an error page": (
        b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nab"
    ),
}


def whole(data: dict[str, Any]) -> bytes:
    body = json.dumps({"data": data}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Server:
    """Sends its answers in turn, byte for byte, the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[bytes] = [b""]
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(_request(connection))
                left = len(self.answers) > 1
                connection.sendall(self.answers.pop(0) if left else self.answers[0])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _request(connection: socket.socket) -> bytes:
    """All of it: a connection that is closed with a rest unread is reset."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    (length,) = (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x[:15] == b"Content-Length:")
    while len(body) < length:
        body += connection.recv(65536)
    return body


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


CALLS: dict[str, Callable[[RunPodApi], object]] = {
    "pods": lambda api: api.pods(),
    "pod": lambda api: api.pod("p"),
    "terminate": lambda api: api.terminate("p"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_a_provider_error(
    server: Server, answer: bytes, call: Callable[[RunPodApi], object]
) -> None:
    server.answers = [answer]
    with pytest.raises(ProviderError, match="HTTP 502" if b"502" in answer else "does not answer"):
        call(RunPodApi("k", server.url))


@pytest.mark.parametrize("data", ([1], {"pod": {"costPerHr": 1}}, {"pod": {"id": 1, "env": 5}}))
def test_an_answer_of_another_shape_is_a_provider_error(data: Any) -> None:
    api = RunPodApi("k", post=lambda *_: json.dumps({"data": data}).encode())
    with pytest.raises(ProviderError, match="cannot be read"):
        api.pod("p")


def test_a_config_that_is_no_text_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / ".runpod").mkdir()
    (tmp_path / ".runpod" / "config.toml").write_bytes(b'api_key = "\xff\xfe"\n')
    assert api_key({"HOME": str(tmp_path)}) is None


class Gone(BaseException):
    """The pod is ended, and with it whatever runs there."""


@pytest.fixture
def ends_when_terminated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits, and the pod ends with the answer that takes its end."""

    def sleep(_seconds: float) -> None:
        if len(server.asked) == 4:
            raise Gone

    monkeypatch.setattr(time, "sleep", sleep)
    server.answers = [CUT, BROKEN["cut error page"], CUT, whole({"podTerminate": None})]


@pytest.mark.usefixtures("ends_when_terminated")
def test_the_switch_asks_on_over_broken_answers(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    switch = Switch(tmp_path, "p", RunPodApi("k", server.url), silence_s=-1.0)
    with pytest.raises(Gone):
        deadman.watch(switch, said.append)
    assert ["podTerminate" in str(body) for body in server.asked] == [False, True, True, True]
    assert len(said) == 3 and "ends itself" in said[0]


@pytest.mark.usefixtures("ends_when_terminated")
def test_a_pod_asks_for_its_end_over_broken_answers(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Gone):
        podrun.end_pod("p", RunPodApi("k", server.url), tmp_path)
    assert ["podTerminate" in str(body) for body in server.asked] == [True] * 4


def test_the_meter_asks_on_over_broken_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.meter.ASK_EVERY_S", 0.01)
    monkeypatch.setenv("RUNPOD_POD_ID", "p")
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    monkeypatch.setenv("RUNPOD_API_BASE_URL", server.url)
    server.answers = [*BROKEN.values(), whole({"pod": {"id": "p", "costPerHr": 30.0}})]
    meter = meter_of_this_pod(Price(20.0, "plan"))
    assert meter().usd_per_hour == 20.0
    deadline = time.monotonic() + 20
    while meter().usd_per_hour == 20.0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert meter().usd_per_hour == 30.0
