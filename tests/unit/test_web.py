"""The HTTP API, over real connections: OpenAI's own client, bad requests, crowds, disconnects."""

import concurrent.futures
import gc
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from serving import serving

from nanochat.arguments import serve_parser
from nanochat.chat import gate, web
from nanochat.chat.server import Limits, Server
from nanochat.engine import Engine
from nanochat.load import load_trained
from nanochat.rundir import EXIT_SPEC, RunDir
from nanochat.text import visible_text
from nanochat.tokenizer import render_for_completion

ROOT = Path(__file__).resolve().parent.parent.parent
KNOWN = {
    "Who are you?": "A tiny model, très petit.",
    "Say hi.": "hi",
    "What is 27 + 45?": "It is 72.",
}


@pytest.fixture(scope="module")
def server(tiny_run: RunDir) -> Server:
    return Server(load_trained(tiny_run), 4, Limits(max_waiting=100, max_tokens=64))


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    with serving(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str, **options: object) -> str:
    answer = client.chat.completions.create(
        model="tiny-sft",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        **options,  # type: ignore[arg-type]
    )
    content = answer.choices[0].message.content
    assert content is not None
    return content


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while server.num_open() or server.num_rows():
        assert time.monotonic() < deadline, "a slot has leaked"
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# OpenAI's client


def test_models(client: openai.OpenAI) -> None:
    model = client.models.list().data[0]
    assert model.id == "tiny-sft"
    assert client.models.retrieve("tiny-sft").to_dict() == model.to_dict()
    with pytest.raises(openai.NotFoundError, match="there is 'tiny-sft'"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("question", KNOWN)
def test_an_answer(client: openai.OpenAI, question: str) -> None:
    answer = client.chat.completions.create(
        model="tiny-sft", messages=[{"role": "user", "content": question}], temperature=0
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (KNOWN[question], "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens > 0


def test_a_conversation_with_parts_and_a_system_message(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-sft",
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}],
            },
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "Again?"},
        ],
        temperature=0,
    )
    assert answer.choices[0].message.content == "hi hi"
    with_system = client.chat.completions.create(
        model="tiny-sft",
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "Say hi."}],
        max_completion_tokens=1,
    )
    without = client.chat.completions.create(
        model="tiny-sft",
        messages=[{"role": "user", "content": "Say hi."}],
        max_completion_tokens=1,
    )
    assert with_system.usage is not None and without.usage is not None
    assert with_system.usage.prompt_tokens > without.usage.prompt_tokens
    assert without.choices[0].finish_reason == "length"


def test_a_stream_holds_the_same_text_in_whole_characters(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-sft",
            messages=[{"role": "user", "content": "Who are you?"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == KNOWN["Who are you?"]
    assert len([p for p in pieces if p]) > 5 and not any("\ufffd" in p for p in pieces)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_text_completion(client: openai.OpenAI, server: Server) -> None:
    one = client.completions.create(
        model="tiny-sft", prompt="the cat", max_tokens=5, temperature=0, seed=1
    )
    tokenizer = server.loaded.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    same = client.completions.create(model="tiny-sft", prompt=ids, max_tokens=5, temperature=0)
    assert one.choices[0].text == same.choices[0].text
    streamed = client.completions.create(
        model="tiny-sft", prompt="the cat", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == one.choices[0].text


def test_stop_strings_end_the_answer_before_them(client: openai.OpenAI) -> None:
    assert ask(client, "Who are you?", stop="model") == "A tiny "
    assert ask(client, "Who are you?", stop=["never", ", t", "petit"]) == "A tiny model"
    assert ask(client, "Who are you?", stop="petit!") == KNOWN["Who are you?"]
    stream = client.chat.completions.create(
        model="tiny-sft",
        messages=[{"role": "user", "content": "Who are you?"}],
        temperature=0,
        stop="très",
        stream=True,
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "A tiny model, "


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny-sft",
            messages=[{"role": "user", "content": "abc"}],
            temperature=2,
            max_tokens=12,
            n=3,
            seed=seed,
        )
        assert [c.index for c in answer.choices] == [0, 1, 2]
        return [c.message.content for c in answer.choices]

    first = sample(1)
    assert sample(1) == first and sample(50) != first and len(set(first)) > 1


# -----------------------------------------------------------------------------
# What is refused

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*HELLO, *HELLO]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages"),
    ],
)
def test_bad_parameters_are_named(url: str, change: dict, param: str | None) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"] and (param is None or error["param"].startswith(param))


@pytest.mark.parametrize(
    ("method", "path", "content", "content_type", "status"),
    [
        ("POST", "/v1/chat/completions", b"{no json", "application/json", 400),
        ("POST", "/v1/chat/completions", b'{"messages": []}', "text/plain", 415),
        ("POST", "/v1/completions", b'{"prompt": [9999]}', "application/json", 400),
        ("GET", "/v1/chat/completions", b"", "application/json", 405),
        ("GET", "/nowhere", b"", "application/json", 404),
        ("POST", "/v1/completions", b"x" * (2 << 20), "application/json", 413),
    ],
)
def test_errors_have_one_form(
    url: str, method: str, path: str, content: bytes, content_type: str, status: int
) -> None:
    headers = {"content-type": content_type}
    answer = httpx.request(method, url + path, content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "The body is missing."), (b"{no", "The body is no JSON")]
)
def test_a_body_that_is_no_json_is_called_so(url: str, content: bytes, message: str) -> None:
    headers = {"content-type": "application/json"}
    error = httpx.post(f"{url}/v1/completions", content=content, headers=headers).json()["error"]
    assert error["message"].startswith(message) and error["param"] is None


def test_a_probe_may_ask_by_head(url: str) -> None:
    for path in ("/", "/health"):
        answer = httpx.head(url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_large_body_without_a_declared_length_is_refused(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=endless(), headers=headers)
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_TIME_LIMIT_S", 0.1)
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + b'Content-Length: 99\r\n\r\n{"prompt')
        assert connection.recv(4000).startswith(b"HTTP/1.1 408")


def test_the_context_and_the_model_are_checked(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "a" * 300)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="leaves room for"):
        ask(client, "Say hi.", max_tokens=90)
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="gpt-4", prompt="x")
    assert not_found.value.code == "model_not_found"


def test_a_key_is_asked_for(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run), 1, Limits(), api_key="secret")
    with serving(server) as url:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as right:
            assert ask(right, "Say hi.") == "hi"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(url).status_code == 200


def test_other_sites_are_kept_out_unless_named(url: str, tiny_run: RunDir) -> None:
    origin = {"origin": "https://elsewhere.example"}
    preflight = {**origin, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=origin).headers
    assert httpx.options(f"{url}/v1/completions", headers=preflight).status_code == 405
    server = Server(
        load_trained(tiny_run),
        1,
        Limits(),
        cors_origins=["https://elsewhere.example"],
        allowed_hosts=["127.0.0.1"],
    )
    with serving(server) as other:
        allowed = httpx.options(f"{other}/v1/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://elsewhere.example"
        assert httpx.get(f"{other}/health", headers={"host": "rebound.example"}).status_code == 421


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"


# -----------------------------------------------------------------------------
# Crowds


def test_fifty_clients_get_what_each_would_get_alone(client: openai.OpenAI, server: Server) -> None:
    rng = random.Random(0)
    questions = ["".join(rng.choices("abcdefgh ?", k=rng.randint(1, 30))) for _ in range(47)]
    questions += list(KNOWN)
    tokenizer = server.loaded.tokenizer
    alone = Engine(server.loaded.model, tokenizer, max_batch=1)
    expected = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = render_for_completion(tokenizer, {"messages": messages})
        room = min(64, alone.max_seq_len - len(prompt))
        expected.append(visible_text(tokenizer, alone.generate([prompt], max_tokens=room)[0]))
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda question: ask(client, question), questions))
    assert answers == expected
    wait_until_idle(server)


def test_a_full_queue_is_429_with_a_time_to_try_again(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run, "base"), 1, Limits(max_waiting=1, max_tokens=90))
    body = {"prompt": "x", "temperature": 0}
    with serving(server) as url, concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(16)
            )
        )
    by_status = {status: [a for a in answers if a.status_code == status] for status in (200, 429)}
    assert len(by_status[200]) + len(by_status[429]) == 16
    assert by_status[200] and by_status[429]
    assert all(int(a.headers["retry-after"]) > 0 for a in by_status[429])
    assert by_status[429][0].json()["error"]["type"] == "rate_limit_error"


def test_the_time_limit_ends_an_answer(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run, "base"), 1, Limits(time_limit_s=0.0))
    with serving(server) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "temperature": 0})
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        wait_until_idle(server)


def disconnect_somewhere(url: str, rng: random.Random) -> None:
    """Ask, streaming or not, and perhaps close the connection before the answer has ended."""
    body = {"prompt": "x" * rng.randint(1, 40), "max_tokens": 40, "stream": rng.random() < 0.7}
    data = json.dumps(body).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        if rng.random() < 0.1:
            connection.sendall(request[: rng.randrange(len(request))])
            return
        connection.sendall(request)
        for _ in range(rng.choice((0, 0, 1, 3, 1000))):
            if not connection.recv(300):
                return


def test_a_client_that_cancels_its_stream_frees_the_row(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run), 1, Limits())
    step, steps = server.engine.step, itertools.count()

    def held_step() -> list:
        """The third one waits until the answer has been given up."""
        deadline = time.monotonic() + 20
        while next(steps) >= 2 and server.num_open() and time.monotonic() < deadline:
            time.sleep(0.01)
        return step()

    server.engine.step = held_step  # type: ignore[method-assign]
    with serving(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="tiny-sft",
            messages=[{"role": "user", "content": "Who are you?"}],
            temperature=0,
            stream=True,
        )
        text = next(c.choices[0].delta.content for c in stream if c.choices[0].delta.content)
        assert KNOWN["Who are you?"].startswith(text) and server.num_rows() == 1
        stream.close()
        wait_until_idle(server)
        assert server.metrics.cancelled.values[""] == 1
        server.engine.step = step  # type: ignore[method-assign]
        assert ask(client, "Say hi.") == "hi"


@pytest.mark.parametrize("num_requests", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_disconnects_leak_no_slot_and_no_memory(tiny_run: RunDir, num_requests: int) -> None:
    server = Server(load_trained(tiny_run, "base"), 4, Limits(max_waiting=1000))
    with serving(server) as url:

        def many(count: int, seed: int) -> None:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                list(
                    pool.map(
                        lambda i: disconnect_somewhere(url, random.Random(seed * 10_000 + i)),
                        range(count),
                    )
                )
            wait_until_idle(server)

        def growth(seed: int) -> int:
            gc.collect()
            before = psutil.Process().memory_info().rss
            many(num_requests // 3, seed)
            gc.collect()
            return psutil.Process().memory_info().rss - before

        many(num_requests // 3, seed=1)
        # a leak shows in every round, the allocator's arenas only in some
        assert min(growth(seed) for seed in (2, 3)) < 10 << 20
        assert server.metrics.cancelled.values[""] > 0
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3


def test_a_failing_step_is_an_error_for_those_in_it_and_not_the_end(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run), 2, Limits())
    step, engine = server.engine.step, server.engine

    def failing() -> list:
        engine.step = step  # type: ignore[method-assign]
        raise RuntimeError("out of memory, say")

    with serving(server) as url:
        engine.step = failing  # type: ignore[method-assign]
        body = {"messages": [{"role": "user", "content": "Say hi."}], "temperature": 0}
        failed = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        assert "memory" not in failed.text  # nothing of the inside is shown
        engine.step = failing  # type: ignore[method-assign]
        streamed = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True})
        assert "error" in json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
        again = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert again.json()["choices"][0]["message"]["content"] == "hi"
        wait_until_idle(server)


def test_metrics_count(tiny_run: RunDir) -> None:
    server = Server(load_trained(tiny_run), 2, Limits())
    with serving(server) as url:
        for _ in range(3):
            httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 4})
        httpx.get(f"{url}/nowhere")
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['nanochat_requests_total{status="200"}'] == "3"
    assert values['nanochat_requests_total{status="404"}'] == "1"
    assert values["nanochat_answer_seconds_count"] == "3"
    assert values['nanochat_answer_seconds_bucket{le="+Inf"}'] == "3"
    assert values["nanochat_rows_in_use"] == values["nanochat_requests_open"] == "0"


# -----------------------------------------------------------------------------
# The command


def test_best_of_a_char_model_is_served(char_run: RunDir) -> None:
    server = web.make_server(serve_parser().parse_args([str(char_run.path), "--best"]))
    with serving(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert client.models.list().data[0].to_dict()["step"] == 7
        answer = client.chat.completions.create(
            model=server.model_id, messages=[{"role": "user", "content": "Say hi."}], temperature=0
        )
        assert answer.choices[0].message.content == "hi"
        with pytest.raises(openai.BadRequestError, match="not in the char vocabulary"):
            client.completions.create(model=server.model_id, prompt="Who?")


def test_sigterm_answers_what_is_in_flight_and_exits_0(tiny_run: RunDir) -> None:
    command = [sys.executable, "-m", "nanochat.chat.web", str(tiny_run.path), "-i", "base"]
    with subprocess.Popen(
        [*command, "--port", "0", "--max-tokens", "90"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving tiny-base (step 7) at http://127.0.0.1:")
        url = line.split()[-1]
        body = {"prompt": "x", "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = [event for event in events if event]
        assert rest[-1] == "data: [DONE]" and len(rest) > 80
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "mid"], "no complete checkpoint of mid_train"),
        (["--port", "99999"], "0 to 65535"),
        (["--host", "203.0.113.7"], "cannot listen"),
        (["--max-batch", "0"], "--max-batch 0"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
    ],
)
def test_wrong_arguments_exit_78(
    tiny_run: RunDir, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert web.main([str(tiny_run.path), "--port", "0", *arguments]) == EXIT_SPEC
    assert message in capsys.readouterr().err


def test_a_taken_port_is_said(tiny_run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with web.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert web.main([str(tiny_run.path), "--port", str(port)]) == EXIT_SPEC
    assert f"port {port}" in capsys.readouterr().err
