"""Serve a trained model: `python -m nanochat.chat.web RUN_DIR`, page and API on port 8000.

Listens on loopback unless told otherwise. SIGTERM: no new requests, those in flight are answered
(up to --drain-s), then exit 0. Exits 78 with a message for wrong arguments or a run that has
nothing to serve yet.
"""

import argparse
import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from nanochat.arguments import serve_parser
from nanochat.chat.server import Limits, Server
from nanochat.checkpoint import CheckpointError
from nanochat.load import dtype_named, open_trained
from nanochat.offline import install_guard
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, RunDirError
from nanochat.spec import SpecError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code of the contract."""
    args = serve_parser().parse_args(argv)
    install_guard()
    try:
        with listen(args.host, args.port) as listener:
            server = make_server(args)
            announce(server, listener, args)
            run(server, listener, args.drain_s)
    except (SpecError, RunDirError, CheckpointError) as e:
        print(f"nanochat serve: {e}", file=sys.stderr)
        return EXIT_SPEC
    return EXIT_DONE


def announce(server: Server, listener: socket.socket, args: argparse.Namespace) -> None:
    """Say what is served and where."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {server.model_id} (step {server.loaded.step}) at http://{shown}:{port}")
    if not _is_loopback(args.host) and args.api_key_file is None:
        print("Anyone who reaches this address can use it; --api-key-file FILE asks for a key.")
    sys.stdout.flush()


def make_server(args: argparse.Namespace) -> Server:
    """Load what the arguments name. Raises SpecError, RunDirError, CheckpointError."""
    for name in ("max_batch", "max_tokens", "max_body_kib"):
        if getattr(args, name) < 1:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    loaded = open_trained(
        args.run_dir,
        args.stage,
        which="best" if args.best else "latest",
        device=args.device,
        dtype=dtype_named(args.dtype),
    )
    limits = Limits(
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_kib * 1024,
        max_tokens=args.max_tokens,
        time_limit_s=args.time_limit_s,
    )
    local_names = ("localhost", "127.0.0.1", "[::1]", args.host)  # in a Host header
    return Server(
        loaded,
        args.max_batch,
        limits,
        api_key=read_key(args.api_key_file),
        cors_origins=args.cors_origin,
        allowed_hosts=local_names if _is_loopback(args.host) else None,
        compile=args.compile,
        keep_weights=False,
    )


def read_key(path: Path | None) -> str | None:
    """The key in a file, without blanks around it. Raises SpecError."""
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"--api-key-file {path} cannot be read: {e}") from None
    if not key:
        raise SpecError(f"--api-key-file {path} is empty")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SpecError where the address cannot be had."""
    if not 0 <= port <= 65535:
        raise SpecError(f"--port {port}: 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        raise SpecError(
            f"cannot listen on {host}, port {port}: {e}; --host and --port choose another place"
        ) from None


class _DrainingServer(uvicorn.Server):
    """Tells the application that the end has begun."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._server.draining = True
        super().handle_exit(sig, frame)


def run(server: Server, listener: socket.socket, drain_s: int) -> None:
    """Answer requests until SIGTERM or SIGINT, then drain."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        timeout_graceful_shutdown=drain_s,
        h11_max_incomplete_event_size=64 * 1024,
    )
    # uvicorn raises the signal again when it has drained; the process is to end with 0 then
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _DrainingServer(config, server).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
