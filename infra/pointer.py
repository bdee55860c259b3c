"""Which run this machine works on: a file per machine, since a volume may be shared by several.

* In a container the host name is its id, so that each of two pods on one volume has a pointer of
  its own, and a new pod begins without one.
* The supervisor writes it; the dead man's switch, the health check and `stop` read it.

Standard library only: the health check is started every 30 s.
"""

import contextlib
import json
import os
import socket
from pathlib import Path

OLD_S = 86_400.0
"""A living supervisor writes its status every second: after a day of silence it has none."""


def pointer_file(home: Path, hostname: str | None = None) -> Path:
    """Where a machine's pointer stands below NANOCHAT_HOME; default: this machine's."""
    return home / f"current-run.{hostname or socket.gethostname()}.json"


def current_run(home: Path, hostname: str | None = None) -> Path | None:
    """Folder of the run that was last started on a machine, or None. Raises OSError."""
    try:
        run = json.loads(pointer_file(home, hostname).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return Path(run) if isinstance(run, str) else None


def point_to(home: Path, run: Path) -> None:
    """Name the run that this machine works on, and forget machines that are gone.

    Raises OSError.
    """
    home.mkdir(parents=True, exist_ok=True)
    file = pointer_file(home)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(json.dumps(str(run.absolute())), encoding="utf-8")
    os.replace(staged, file)
    now_s = file.stat().st_mtime  # by the volume's own clock
    for other in home.glob(pointer_file(Path(), "*").name):
        with contextlib.suppress(OSError):
            if now_s - _last_sign_s(other) > OLD_S:
                other.unlink()


def _last_sign_s(pointer: Path) -> float:
    signs_s = [pointer.stat().st_mtime]
    with contextlib.suppress(OSError, ValueError):
        run = json.loads(pointer.read_text(encoding="utf-8"))
        signs_s.append((Path(str(run)) / "status.json").stat().st_mtime)
    return max(signs_s)
