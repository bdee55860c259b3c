"""Faults inside of a real training stage, and a record of the documents it draws.

FAULTS names a folder. `plan.json` there may hold {"act", "call", "delay_s"}:

* pause: rank 0's checkpoint stops in its call number `call` to the file layer, says so by a file
  `paused`, and waits to be killed. A write is torn in half before that.
* full: from that call on, a write finds no space.
* slow: every call takes `delay_s` longer.

`drawn.jsonl` gets a line per batch that rank 0 draws: {"pid", "cursor", "documents"}; `saves.jsonl`
one when a save is asked for and one when it is complete: {"pid", "step", "is_complete"}.
"""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

from nanochat.checkpoint import Checkpointer
from nanochat.checkpoint_dir import CheckpointDir, Manifest
from nanochat.data import Loader, StepBatch
from nanochat.storage import Storage

CALLS = ("make_dir", "open_new", "write", "sync", "rename", "sync_dir", "remove", "remove_tree")


def install() -> None:
    """Put the faults of the plan and the record in place, on rank 0."""
    if os.environ["RANK"] != "0":
        return
    folder = Path(os.environ["FAULTS"])
    _record_documents(folder / "drawn.jsonl")
    _record_saves(folder / "saves.jsonl")
    plan_file = folder / "plan.json"
    if plan_file.exists():
        faults = _Faults(folder, json.loads(plan_file.read_text()))
        for name in CALLS:
            setattr(Storage, name, faults.around(name, getattr(Storage, name)))


class _Faults:
    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._num_calls = 0

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(storage: Storage, *args: Any) -> Any:
            self._num_calls += 1
            is_due = self._num_calls >= self._plan.get("call", 0)
            act = self._plan["act"]
            if act == "slow":
                sleep(self._plan["delay_s"])
            elif act == "pause" and is_due:
                if name == "write":
                    os.write(args[0], args[1][: len(args[1]) // 2])
                (self._folder / "paused").write_text(name)
                while True:
                    signal.pause()
            elif act == "full" and is_due and name == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(storage, *args)

        return faulty


def _record_documents(path: Path) -> None:
    draw = Loader.__next__
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def drawn(loader: Loader) -> StepBatch:
        batch = draw(loader)
        line = {"pid": os.getpid(), "cursor": batch.cursor, "documents": batch.documents}
        os.write(fd, (json.dumps(line) + "\n").encode())
        return batch

    Loader.__next__ = drawn  # type: ignore[method-assign]


def _record_saves(path: Path) -> None:
    save, commit = Checkpointer.save, CheckpointDir.commit
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(step: int, is_complete: bool) -> None:
        line = {"pid": os.getpid(), "step": step, "is_complete": is_complete}
        os.write(fd, (json.dumps(line) + "\n").encode())

    def asked(checkpointer: Checkpointer, step: int, *args: Any, **options: Any) -> None:
        note(step, False)
        save(checkpointer, step, *args, **options)

    def complete(folder: CheckpointDir, manifest: Manifest) -> None:
        commit(folder, manifest)
        note(manifest.step, True)

    Checkpointer.save = asked  # type: ignore[method-assign]
    CheckpointDir.commit = complete  # type: ignore[method-assign]
