"""The image's `serve` as a user starts it: the port published on the host's loopback."""

from pathlib import Path

import httpx
import pytest

from tests.twin.engine import Engine, wait_until
from tests.unit.tiny_run import make_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_published_port_answers_and_docker_stop_ends_it_with_0(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    run = make_run(str(tmp_path / "run")).path
    for path in (run, *run.rglob("*")):
        path.chmod(0o755)  # the container's user is another one
    container = engine.start(
        "serve",
        "/run/tiny",
        volumes={str(run): {"bind": "/run/tiny", "mode": "ro"}},
        ports={"8000/tcp": ("127.0.0.1", None)},
    )
    wait_until(lambda: b"Serving tiny-sft (step 7)" in container.logs(), 300, "the server")
    container.reload()
    (published,) = container.ports["8000/tcp"]
    assert published["HostIp"] == "127.0.0.1"
    url = f"http://127.0.0.1:{published['HostPort']}"
    transport = httpx.HTTPTransport(retries=5)  # the line is printed just before it accepts
    with httpx.Client(base_url=url, transport=transport, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": "Say hi."}], "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == "hi", answer.text
        assert "<title>nanochat" in client.get("/").text
    container.stop(timeout=60)
    assert engine.wait(container).exit_code == 0
    engine.remove(container)
