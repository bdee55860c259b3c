"""RUN/metrics.jsonl: what a stage measures, one JSON line each; the truth behind every plot.

Kinds of lines (`time_s` is Unix time; non-finite numbers are written as null):

* step    {"stage","step","time_s","loss","lr","grad_norm","tokens_per_s","mfu",…}
* val     {"stage","step","time_s","val_bpb",…}
* reward  {"stage","step","time_s","val_reward","stderr","n"}, of held-out examples
* task    {"stage","task","metric","value","stderr","n","chance"}, stage = whose weights were scored
* sample  {"stage","step","time_s","sample": prompt,"text"}
* event   {"stage","step","time_s","event","message",…}

Only rank 0 writes. The file is append-only: after a resume the steps behind the checkpoint are
logged again, and the last line per (stage, step, kind) wins. `RunDir.metrics` leaves out what lies
behind the `step` of a later "start" of the stage, or the `resume_step` of a later "rollback". A
disk that is full keeps lines in memory until it has space; TensorBoard and W&B are exports
(`nanochat.trackers`).
"""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from nanochat.health import Watch
from nanochat.machine import MachineStats, machine_facts
from nanochat.rundir import RunDir, append_jsonl, cut_torn_tail
from nanochat.trackers import Sink, TensorBoardSink, Tracker, WandbSink

MAX_WAITING = 100_000
"""Lines that are kept while the disk is full."""

log = logging.getLogger(__name__)


class Metrics:
    """The log of one stage. Nothing in here raises into the training loop.

    `resume_step` is the step of the checkpoint that the stage continues from (None: from nothing),
    `gpu_uuids` CUDA's UUIDs of the GPUs of this node that the run uses ("GPU-…").
    """

    def __init__(
        self,
        run_dir: RunDir,
        stage: str,
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
        wandb: Literal["off", "offline", "online"] = "off",
        rank: int = 0,
        gpu_uuids: Sequence[str] = (),
    ) -> None:
        self.stage = stage
        self._step = resume_step or 0
        self._log = _Log(run_dir) if rank == 0 else None
        self._trackers: list[Tracker] = []
        if self._log is None:
            return
        self._machine = MachineStats(list(gpu_uuids))
        self._watch = Watch()
        begun = "from nothing" if resume_step is None else f"from step {resume_step}"
        self.log_event("start", f"{stage} starts {begun}", machine=machine_facts())
        if tensorboard:
            folder = run_dir.tensorboard_dir / stage
            self._track("TensorBoard", lambda: TensorBoardSink(folder, resume_step))
        if wandb != "off":
            self._track("Weights & Biases", lambda: WandbSink(run_dir.path, stage, wandb))

    def _track(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._trackers.append(
            Tracker(name, open_sink, lambda message: self.log_event("tracker_off", message))
        )

    def log_step(self, step: int, **values: Any) -> None:
        """One optimizer step.

        Known keys: loss (nats per target), lr, grad_norm, tokens_per_s (all ranks), mfu (0 to 1),
        step_s, loader_wait_s (of this step), checkpoint_stall_s (of the stage so far), num_tokens
        (read so far), epoch.
        The machine's state is added every two seconds; thresholds that are passed become events.
        """
        if self._log is None:
            return
        self._step = step
        record = self._write(step, values | self._machine.sample())
        for warning in self._watch.look(record):
            self.log_event("warning", warning)

    def log_val(self, step: int, *, val_bpb: float, **values: Any) -> None:
        """A look at the validation split; `val_bpb` is in bits per byte."""
        if self._log is None:
            return
        self._step = step
        record = self._write(step, {"val_bpb": val_bpb} | values)
        for warning in self._watch.look_val(record):
            self.log_event("warning", warning)

    def log_reward(self, step: int, val_reward: float, *, stderr: float, n: int) -> None:
        """A look at the held-out reward: the mean over n examples, and its standard error."""
        if self._log is None:
            return
        self._step = step
        self._write(step, {"val_reward": val_reward, "stderr": stderr, "n": n})

    def log_task(
        self,
        stage: str,
        task: str,
        metric: str,
        value: float,
        stderr: float | None,
        n: int,
        chance: float | None,
    ) -> None:
        """A score of the weights of `stage`; an accuracy, its standard error and chance are 0 to 1.

        `n` is the number of examples; chance is None where guessing has no known score.
        """
        if self._log is None:
            return
        record = {"task": task, "metric": metric, "value": value, "stderr": stderr}
        self._log.append(_plain({"stage": stage} | record | {"n": n, "chance": chance}))
        for tracker in self._trackers:
            tracker.scalars(self._step, _numbers({f"{stage}/{task}/{metric}": value}))

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """What the model writes after a prompt at this step."""
        if self._log is None:
            return
        self._log.append(self._line(step) | {"sample": prompt, "text": text})
        for tracker in self._trackers:
            tracker.text(step, f"sample/{prompt}", text)

    def log_event(self, kind: str, message: str, **facts: Any) -> None:
        """Something that a reader of the report should know.

        Kinds: start, restart, rollback, oom_fit, early_stop, corrupt_checkpoint,
        save_failed, warning, tracker_off; `message` is a sentence for people.
        """
        if self._log is not None:
            self._log.append(
                self._line(self._step) | {"event": kind, "message": message} | _plain(facts)
            )

    def close(self) -> None:
        """Write what waits. Trackers get ten seconds."""
        for tracker in self._trackers:
            tracker.close()
        if self._log is not None:
            self._log.close()

    def _line(self, step: int) -> dict[str, Any]:
        return {"stage": self.stage, "step": step, "time_s": round(time.time(), 3)}

    def _write(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        assert self._log is not None
        record = self._line(step) | _plain(values)
        self._log.append(record)
        for tracker in self._trackers:
            tracker.scalars(step, _numbers(values))
        return record


class _Log:
    """Appends to metrics.jsonl; what a full disk refuses waits in memory for the next line."""

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.metrics_file
        self._waiting: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_WAITING)
        self._is_torn = True
        self._has_complained = False
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._waiting.append(record)
            self._flush()

    def close(self) -> None:
        with self._lock:
            self._flush()
            if self._waiting:
                log.warning("%s: %d lines are lost", self._path, len(self._waiting))

    def _flush(self) -> None:
        try:
            if self._is_torn:
                cut_torn_tail(self._path)
                self._is_torn = False
            while self._waiting:
                append_jsonl(self._path, self._waiting[0])
                self._waiting.popleft()
        except OSError as e:
            self._is_torn = True
            if not self._has_complained:
                self._has_complained = True
                log.warning("%s cannot be written (%s); trying again", self._path, e)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: numbers of torch and numpy as Python's, null for NaN and inf."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        plain = value.item() if hasattr(value, "item") else value
        out[key] = None if isinstance(plain, float) and not math.isfinite(plain) else plain
    return out


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers among the values."""
    plain = _plain(values).items()
    return {k: float(v) for k, v in plain if isinstance(v, int | float) and not isinstance(v, bool)}
