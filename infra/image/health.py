"""The image's health check: does the run of this container give signs of life?

* The run is found by the pointer that the supervisor of this container writes (infra/pointer.py).
  It may point to a run that another container has gone on with, or whose supervisor was killed;
  only a status written by a living process of this container counts.
* No such run is healthy: a shell, `serve`, or a run that has not started or has ended.
* The supervisor beats every second, also while ranks load, compile or evaluate; hung ranks are its
  business. Only a supervisor that stands still makes the container unhealthy.

Exit code 0 or 1, and one line that `docker inspect` shows. Only the standard library and no
pydantic: it is started every 30 s beside the training.
"""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from infra.pointer import current_run
from infra.privileges import image_home

SILENCE_S = 60.0
"""Also a slow network volume lets the supervisor write once in this time."""


def health(home: Path, hostname: str, now: float) -> tuple[bool, str]:
    """(healthy, why) of the run that this container works on. `now` is Unix time."""
    run = current_run(home, hostname)
    if run is None:
        return True, "no run"
    status = _read(run / "status.json")
    if not isinstance(status, dict) or status.get("state") != "RUNNING":
        return True, "no run is going on"
    if status.get("host") != hostname or not _is_alive(int(status["pid"])):
        return True, f"no run is going on here; {run} was run elsewhere"
    silence_s = now - float(status["heartbeat"])
    where = f"{run}: {status.get('stage')}"
    if silence_s > SILENCE_S:
        return False, f"{where}: no sign of life for {silence_s:.0f} s"
    return True, f"{where}, last sign of life {max(silence_s, 0.0):.0f} s ago"


def _read(path: Path) -> Any | None:
    """The document in a file, or None where there is no whole document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").is_dir()


def main() -> int:
    """Print one line; 0 where healthy."""
    try:
        healthy, why = health(image_home(), socket.gethostname(), time.time())
    except OSError as e:
        healthy, why = False, f"the volume cannot be read: {e}"
    sys.stdout.write(why + "\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
