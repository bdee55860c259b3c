"""Notices tell what matters and can never hold a run up."""

import json
import threading
import time

from infra import notices
from infra.notices import Notices


def test_what_is_told_arrives_as_json() -> None:
    got: list[dict[str, object]] = []
    sent = threading.Event()

    def send(url: str, body: bytes) -> None:
        got.append(json.loads(body) | {"url": url})
        sent.set()

    told = Notices("http://hook", "d20", send)
    told.tell("start", "started", exit_code=None)
    assert sent.wait(10.0)
    told.close()
    assert got[0]["event"] == "start" and got[0]["text"] == "d20: started"
    assert got[0]["url"] == "http://hook"


def test_budget_marks_are_told_once_and_not_again_after_a_restart() -> None:
    events: list[str] = []
    told = Notices("http://hook", "d20", lambda _, body: events.append(json.loads(body)["text"]))
    told.skip_budget(0.55)
    for share in (0.55, 0.6, 0.85, 0.9, 1.0, 1.2):
        told.budget(share, "$1")
    told.close()
    assert [e.split()[1] for e in events] == ["80%", "100%"]


def test_a_webhook_that_fails_or_hangs_does_not_stop_anything(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(notices, "LAST_WAIT_S", 0.2)
    hang = threading.Event()

    def send(_url: str, _body: bytes) -> None:
        hang.wait(30.0)
        raise OSError("unreachable")

    told = Notices("http://hook", "d20", send)
    start = time.monotonic()
    for _ in range(2 * notices.QUEUE_LENGTH):
        told.tell("start", "x")
    told.close()
    assert time.monotonic() - start < 5.0
    hang.set()


def test_without_an_address_nothing_is_sent() -> None:
    told = Notices(None, "d20", lambda *_: (_ for _ in ()).throw(AssertionError))
    told.tell("start", "x")
    told.close()
