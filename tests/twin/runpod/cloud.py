"""The emulated provider as servers: plain HTTP for pods, an HTTPS proxy for unmodified clients."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from graphql import GraphQLError

from tests.twin.runpod import catalog, graphql
from tests.twin.runpod.account import Account, Fault, Refused
from tests.twin.runpod.pods import GATEWAY, Pods

HOSTS = ("api.runpod.io", "rest.runpod.io", "raw.githubusercontent.com")
CATALOG = "/skypilot-org/skypilot-catalog/master/catalogs/v8/"
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


class Cloud:
    """Provider, network and certificates of one test session; everything is removed on exit."""

    def __init__(self, image: str, port: int = 0) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="runpod-"))
        self.session = uuid.uuid4().hex[:12]
        self.engine = Pods(self.session)
        try:
            self._certificates()
            self.foreign: list[str] = []
            """Hosts that a client asked the proxy for, other than the emulated ones."""
            handler = _handler(self)
            self._local = ThreadingHTTPServer(("127.0.0.1", port), handler)
            self.port = self._local.server_address[1]
            self._bridge = ThreadingHTTPServer((GATEWAY, self.port), handler)
        except BaseException:
            self.engine.close()
            raise
        self.url = f"http://127.0.0.1:{self.port}"
        self.account = Account(self.engine, image, f"http://{GATEWAY}:{self.port}")
        for server in (self._local, self._bridge):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Cloud":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers; remove pods, volumes and certificates."""
        for server in (self._local, self._bridge):
            server.shutdown()
            server.server_close()
        self.engine.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def client_env(self, home: Path) -> dict[str, str]:
        """Environment of a client on this machine that knows nothing of the emulator."""
        config = home / ".runpod" / "config.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(f'[default]\napi_key = "{self.account.key}"\n')
        return {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HTTPS_PROXY": self.url,
            "NO_PROXY": f"127.0.0.1,localhost,{GATEWAY}",
            "REQUESTS_CA_BUNDLE": str(self.bundle),
            "SSL_CERT_FILE": str(self.bundle),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            # pip's word for --no-build-isolation: SkyPilot's wheel is built without an index
            "PIP_NO_BUILD_ISOLATION": "false",
        }

    def _certificates(self) -> None:
        """A throw-away authority, and one certificate for all emulated hosts."""
        at = self._folder

        def openssl(words: str) -> None:
            subprocess.run(["openssl", *words.split()], check=True, capture_output=True, cwd=at)

        name = "-newkey rsa:2048 -nodes -subj /CN=emulated"
        openssl(f"req -x509 {name} -days 2 -keyout ca.key -out ca.pem")
        openssl(f"req {name} -keyout key.pem -out csr.pem")
        (at / "ext").write_text("subjectAltName=" + ",".join(f"DNS:{h}" for h in HOSTS))
        signed = "-CA ca.pem -CAkey ca.key -CAcreateserial"
        openssl(f"x509 -req -in csr.pem {signed} -days 2 -extfile ext -out cert.pem")
        self.bundle = at / "bundle.pem"
        known = SYSTEM_BUNDLE.read_text() if SYSTEM_BUNDLE.exists() else ""
        self.bundle.write_text(known + (at / "ca.pem").read_text())
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(at / "cert.pem", at / "key.pem")


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_CONNECT(self) -> None:
            host, _, _ = self.path.partition(":")
            if host not in HOSTS:
                cloud.foreign.append(host)
                self._answer(403, {"error": f"{host} is not emulated"})
                return
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                wrapped = cloud.tls.wrap_socket(self.connection, server_side=True)
                self.connection = wrapped
                self.rfile, self.wfile = wrapped.makefile("rb"), wrapped.makefile("wb", 0)
                self.close_connection = False
                while not self.close_connection:
                    self.handle_one_request()
                wrapped.close()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(CATALOG):
                text = catalog.files().get(path.removeprefix(CATALOG))
                self._text(200 if text else 404, text or "")
            elif path == "/_emu/state":
                self._answer(200, cloud.account.state())
            elif path == "/v1/networkvolumes":
                self._answer(200, list(cloud.account.volumes.values()))
            else:
                self._answer(404, {"error": path})

        def do_HEAD(self) -> None:
            """A host of the internet, for whoever looks whether it is there."""
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            path = self.path.partition("?")[0]
            if path == "/graphql":
                self._graphql(str(body["query"]))
            elif path == "/v1/networkvolumes":
                made = cloud.account.make_volume(body["name"], body["dataCenterId"], body["size"])
                self._answer(200, made)
            elif path == "/_emu/fault":
                cloud.account.faults[body.pop("operation")] = Fault(**body)
                self._answer(200, {})
            elif path == "/_emu/preempt":
                self._answer(200, cloud.account.preempt(body["id"]))
            elif path == "/_emu/exit":
                self._answer(200, cloud.account.exit_pod(body["id"]))
            elif path == "/_emu/price":
                self._answer(200, cloud.account.move_price(body["id"], body["usd_per_hour"]))
            else:
                self._answer(404, {"error": path})

        def do_DELETE(self) -> None:
            try:
                cloud.account.remove_volume(self.path.rpartition("/")[2])
            except (Refused, KeyError) as e:
                self._answer(400, {"error": str(e)})
                return
            self._text(204, "")

        def _graphql(self, query: str) -> None:
            if self.headers.get("Authorization") != f"Bearer {cloud.account.key}":
                self._answer(401, {"errors": [{"message": "Unauthorized"}]})
                return
            caller = self.client_address[0]
            try:
                data = graphql.execute(
                    query, lambda name, given: cloud.account.resolve(name, given, caller)
                )
            except (Refused, GraphQLError) as e:
                status = getattr(e, "status", 200)
                self._answer(status, {"errors": [{"message": str(e)}], "data": None})
                return
            self._answer(200, {"data": data})

        def _answer(self, status: int, document: Any) -> None:
            self._text(status, json.dumps(document), "application/json")

        def _text(self, status: int, text: str, kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    return Handler
