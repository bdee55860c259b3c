"""A server of ours in a thread, on loopback."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from nanochat.chat import web
from nanochat.chat.server import Server


@contextlib.contextmanager
def serving(server: Server, port: int = 0) -> Iterator[str]:
    """Serve on a port (0: a free one) until the end of the block; yields the address."""
    with web.listen("127.0.0.1", port) as listener:
        config = uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=1)
        runner = uvicorn.Server(config)
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not runner.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            runner.should_exit = True
            thread.join()
