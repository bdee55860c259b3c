"""Exports of the metrics to TensorBoard and Weights & Biases; none of them can hold or end a run.

* A tracker works in a thread of its own behind a bounded queue, so a file system that hangs or a
  service that does not answer costs the training loop nothing.
* Its first exception, or a full queue, switches it off and is reported once. metrics.jsonl is the
  truth; both exports can be made again from it.
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

QUEUE_LENGTH = 10_000
CLOSE_TIMEOUT_S = 10.0
WANDB_INIT_TIMEOUT_S = 60.0


class Sink(Protocol):
    """Where a tracker writes; every method may raise."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, tag: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files of one stage; steps after `resume_step` of a killed run are purged."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per run directory, continued by every stage and every restart.

    Each stage has its own step axis, so that rows of a resumed stage need not rise. The key comes
    from WANDB_API_KEY alone; offline files lie in RUN/wandb until `nanochat sync`.
    """

    def __init__(self, folder: Path, stage: str, mode: str) -> None:
        import wandb

        if os.environ.get("NANOCHAT_OFFLINE") == "1":
            mode = "offline"
        self._stage = stage
        self._run = wandb.init(
            project="nanochat",
            name=folder.name,
            id=wandb_run_id(folder),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(
                init_timeout=WANDB_INIT_TIMEOUT_S, console="off", disable_git=True
            ),
        )
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._log(step, dict(values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._log(step, {tag: text})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        row = {f"{self._stage}/{name}": value for name, value in values.items()}
        self._run.log(row | {f"{self._stage}/step": step})


def wandb_run_id(folder: Path) -> str:
    """The W&B id of a run directory: made once, then read, so that a moved directory keeps it."""
    id_file = folder / "wandb" / "run_id"
    if not id_file.is_file():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{folder.resolve()} {os.urandom(16).hex()}".encode())
        id_file.write_text(digest.hexdigest()[:12])
    return id_file.read_text().strip()


class Tracker:
    """A sink behind a queue and a thread. No method of it raises or waits, but `close`.

    `open_sink` runs in the thread; `on_failure` gets one message when the tracker is switched off.
    """

    def __init__(
        self, name: str, open_sink: Callable[[], Sink], on_failure: Callable[[str], None]
    ) -> None:
        self._name = name
        self._open_sink = open_sink
        self._on_failure = on_failure
        self._jobs: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._off = threading.Event()
        self._switching = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._put(lambda sink: sink.scalars(step, values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._put(lambda sink: sink.text(step, tag, text))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued; give up after `timeout_s` seconds."""
        if self._off.is_set():
            return
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._switch_off(f"did not finish within {timeout_s:.0f} s")

    def _put(self, job: Callable[[Sink], None]) -> None:
        if self._off.is_set():
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._switch_off(f"does not keep up ({QUEUE_LENGTH} records are waiting)")

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (job := self._jobs.get()) is not None and not self._off.is_set():
                job(sink)
            sink.close()
        except BaseException as e:  # a tracker may even call sys.exit
            self._switch_off(f"{type(e).__name__}: {e}")

    def _switch_off(self, why: str) -> None:
        with self._switching:
            if not self._off.is_set():
                self._on_failure(f"{self._name} is switched off for the rest of this stage: {why}")
                self._off.set()
