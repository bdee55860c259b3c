"""The few calls of RunPod's GraphQL API that must work anywhere: what runs, its price, end it.

Standard library only: the dead man's switch, the supervisor and `reap` need it in the image and on
a laptop, with no SDK. The variables RUNPOD_* are read here and nowhere else.
"""

import contextlib
import http.client
import json
import os
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.launch.base import POD_PREFIX
from nanochat.offline import OfflineError

DEFAULT_URL = "https://api.runpod.io"
TIMEOUT_S = 15.0
POD_FIELDS = (
    "id name desiredStatus imageName costPerHr uptimeSeconds env "
    "runtime { ports { ip isIpPublic privatePort publicPort type } }"
)

Post = Callable[[str, dict[str, str], bytes], bytes]
"""(address, headers, body) -> body of the answer; raises OSError or HTTPException."""


class ProviderError(RuntimeError):
    """The provider cannot be reached, or refuses; the message says what it answered."""


@dataclass(frozen=True)
class Pod:
    """One pod as the provider sees it."""

    id: str
    name: str
    status: str
    """RUNNING, EXITED, …; a stopped pod is still billed for its disk."""
    usd_per_hour: float
    uptime_s: float
    """Seconds for which the pod has been billed."""
    labels: dict[str, str]
    """Its environment variables that are labels of ours; never a secret."""
    address: tuple[str, int] | None = None
    """Public host and port of its sshd, once it is up."""
    image: str = ""


class RunPodApi:
    """RunPod's API with one key. Every method raises ProviderError."""

    def __init__(self, key: str, url: str = DEFAULT_URL, post: Post | None = None) -> None:
        self._key = key
        self._url = url.rstrip("/") + "/graphql"
        self._post = post or _post

    def pods(self) -> list[Pod]:
        """Every pod of the account."""
        data = self._query(f"query {{ myself {{ pods {{ {POD_FIELDS} }} }} }}")
        with _as_provider_error():
            return [_pod(p) for p in (data.get("myself") or {}).get("pods") or []]

    def pod(self, pod_id: str) -> Pod | None:
        """One pod; None where it is gone. A pod's own key may ask this, but not for all pods."""
        quoted = json.dumps(pod_id)
        data = self._query(f"query {{ pod(input: {{ podId: {quoted} }}) {{ {POD_FIELDS} }} }}")
        with _as_provider_error():
            return _pod(data["pod"]) if data.get("pod") else None

    def terminate(self, pod_id: str) -> None:
        """End a pod and its billing."""
        quoted = json.dumps(pod_id)
        self._query(f"mutation {{ podTerminate(input: {{ podId: {quoted} }}) }}")

    def _query(self, query: str) -> dict[str, Any]:
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self._key}",
            "User-Agent": "nanochat-kit",
        }
        try:
            answer = json.loads(
                self._post(self._url, headers, json.dumps({"query": query}).encode())
            )
        except (OSError, ValueError, http.client.HTTPException, OfflineError) as e:
            raise ProviderError(f"RunPod does not answer: {e}") from None
        if not isinstance(answer, dict) or answer.get("errors"):
            errors = answer.get("errors") if isinstance(answer, dict) else answer
            raise ProviderError(f"RunPod refuses: {_first_message(errors)}")
        data = answer.get("data") or {}
        if not isinstance(data, dict):
            raise ProviderError(f"RunPod's answer cannot be read: {str(data)[:200]}")
        return data


def api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key from RUNPOD_API_KEY, else from ~/.runpod/config.toml, where SkyPilot copies it."""
    environ = os.environ if environ is None else environ
    if key := environ.get("RUNPOD_API_KEY"):
        return key
    for home in {Path(environ.get("HOME") or "/root"), Path("/root")}:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            config = tomllib.loads((home / ".runpod" / "config.toml").read_text())
            for section in (config.get("default") or {}, config):
                if key := section.get("api_key"):
                    return str(key)
    return None


def connect(environ: Mapping[str, str] | None = None) -> RunPodApi | None:
    """The API as the environment names it; None without a key."""
    environ = os.environ if environ is None else environ
    key = api_key(environ)
    return RunPodApi(key, environ.get("RUNPOD_API_BASE_URL") or DEFAULT_URL) if key else None


def this_pod(environ: Mapping[str, str] | None = None) -> str | None:
    """Id of the pod that this process runs in; None elsewhere."""
    environ = os.environ if environ is None else environ
    return environ.get("RUNPOD_POD_ID") or None


def label(environ: Mapping[str, str], name: str) -> float | None:
    """A number among the launcher's labels of this pod; None without it."""
    try:
        return float(environ[POD_PREFIX + name])
    except (KeyError, ValueError):
        return None


@contextlib.contextmanager
def _as_provider_error() -> Iterator[None]:
    """An answer of another shape than the query asks for."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ProviderError(f"RunPod's answer cannot be read: {e!r}") from None


def _pod(raw: dict[str, Any]) -> Pod:
    return Pod(
        id=str(raw["id"]),
        name=str(raw.get("name") or ""),
        status=str(raw.get("desiredStatus") or "UNKNOWN"),
        usd_per_hour=float(raw.get("costPerHr") or 0.0),
        uptime_s=float(raw.get("uptimeSeconds") or 0.0),
        labels=labels_of(raw.get("env")),
        address=_address(raw.get("runtime")),
        image=str(raw.get("imageName") or ""),
    )


def labels_of(env: Any) -> dict[str, str]:
    """Labels among the variables of a pod: a list of "KEY=value" or of {key, value}."""
    found: dict[str, str] = {}
    for entry in env or []:
        if isinstance(entry, dict):
            name, value = str(entry.get("key", "")), str(entry.get("value", ""))
        else:
            name, _, value = str(entry).partition("=")
        if name.startswith(POD_PREFIX):
            found[name.removeprefix(POD_PREFIX).lower()] = value
    return found


def _address(runtime: Any) -> tuple[str, int] | None:
    for port in (runtime or {}).get("ports") or []:
        if port.get("privatePort") == 22 and port.get("isIpPublic") and port.get("publicPort"):
            return str(port["ip"]), int(port["publicPort"])
    return None


def _first_message(errors: Any) -> str:
    with contextlib.suppress(TypeError, KeyError, IndexError):
        return str(errors[0]["message"])
    return str(errors)[:200]


def _post(url: str, headers: dict[str, str], body: bytes) -> bytes:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as e:
        text = ""
        with contextlib.suppress(OSError, http.client.HTTPException):  # the status says enough
            text = e.read().decode(errors="replace")
        raise OSError(f"HTTP {e.code}: {text[:200]}") from None
