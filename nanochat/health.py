"""When a run is not healthy: the thresholds, and who watches them in the stream of records.

A threshold is passed when the median of the last values is beyond it (a step that compiles or
saves is no alarm), and it is told once until the run has recovered.
"""

import collections
import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where a run is not healthy: the figures that the guides for these machines give."""

    gpu_util: float = 80.0
    """Percent; below it something else than the GPU sets the speed."""
    gpu_memory: float = 79 / 80
    """Share of the device's memory in use."""
    mfu: float = 0.15
    """Model FLOP utilisation; looked at on GPUs only."""
    loader_wait: float = 0.05
    """Share of the step time in which the loop waits for data."""
    loss_rise: float = 1.02
    """Mean loss of a window over that of the window before it."""
    val_rise: float = 1.01
    """val_bpb over the best so far, at `val_looks` looks in a row."""
    val_looks: int = 3
    window: int = 20
    """Values whose median is compared."""
    loss_window: int = 50
    """Logged steps of which the mean loss is taken."""


class Watch:
    """Turns records of metrics.jsonl into warnings: sentences for people."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._limits = thresholds or Thresholds()
        self._values: dict[str, collections.deque[float]] = {}
        self._losses: collections.deque[float] = collections.deque(
            maxlen=2 * self._limits.loss_window
        )
        self._best_val = math.inf
        self._looks_above = 0
        self._told: set[str] = set()

    def look(self, record: dict[str, Any]) -> list[str]:
        """What this step record makes newly wrong."""
        self._collect(record)
        limits = self._limits
        found = []
        if (util := self._newly("gpu_util", below=limits.gpu_util)) is not None:
            found.append(
                f"GPU utilisation is {util:.0f} %, below {limits.gpu_util:.0f} %: look at "
                "loader_wait_s and at the batch size"
            )
        if (used := self._newly("gpu_memory", above=limits.gpu_memory)) is not None:
            found.append(
                f"{100 * used:.1f} % of the GPU memory is in use: a larger allocation would fail; "
                "a smaller device_batch_size is safe"
            )
        if (mfu := self._newly("mfu", below=limits.mfu)) is not None:
            found.append(f"MFU is {100 * mfu:.1f} %, below {100 * limits.mfu:.0f} %")
        if (wait := self._newly("loader_wait", above=limits.loader_wait)) is not None:
            found.append(
                f"the loop waits for data {100 * wait:.0f} % of the time, above "
                f"{100 * limits.loader_wait:.0f} %"
            )
        if rise := self._loss_rises(record.get("loss")):
            found.append(rise)
        return found

    def look_val(self, record: dict[str, Any]) -> list[str]:
        """What this validation record makes newly wrong."""
        value = record["val_bpb"]
        if self._is_news("val", value is None):
            return ["val_bpb is not a finite number: no checkpoint of such a look is the best"]
        if value is None:
            return []
        if value <= self._best_val * self._limits.val_rise:
            self._best_val = min(self._best_val, value)
            self._looks_above = 0
            return []
        self._looks_above += 1
        if self._looks_above != self._limits.val_looks:
            return []
        return [
            f"val_bpb has been above its best ({self._best_val:.4f}) at {self._looks_above} looks "
            f"in a row and is {value:.4f}: the model overfits; the best checkpoint is kept"
        ]

    def _collect(self, record: dict[str, Any]) -> None:
        used, total = record.get("gpu_memory_gib"), record.get("gpu_memory_total_gib")
        wait_s, step_s = record.get("loader_wait_s"), record.get("step_s")
        values = {
            "gpu_util": record.get("gpu_util"),
            "gpu_memory": used / total if used and total else None,
            "loader_wait": wait_s / step_s if step_s and wait_s is not None else None,
            # A toy on a CPU has an MFU too, and no use of a warning about it.
            "mfu": record.get("mfu") if "gpu_util" in self._values else None,
        }
        for name, value in values.items():
            if value is not None:
                window = collections.deque[float](maxlen=self._limits.window)
                self._values.setdefault(name, window).append(value)

    def _newly(
        self, name: str, *, below: float = -math.inf, above: float = math.inf
    ) -> float | None:
        """The median of a full window where it has just gone below or above its limit."""
        values = self._values.get(name, ())
        if len(values) < self._limits.window:
            return None
        middle = statistics.median(values)
        return middle if self._is_news(name, not below <= middle <= above) else None

    def _is_news(self, name: str, is_bad: bool) -> bool:
        if not is_bad:
            self._told.discard(name)
            return False
        if name in self._told:
            return False
        self._told.add(name)
        return True

    def _loss_rises(self, loss: float | None) -> str | None:
        if loss is None:
            return None
        self._losses.append(loss)
        half = self._limits.loss_window
        if len(self._losses) < 2 * half:
            return None
        values = list(self._losses)
        before, after = statistics.fmean(values[:half]), statistics.fmean(values[half:])
        if not self._is_news("loss", after > before * self._limits.loss_rise):
            return None
        return f"the loss rises: {before:.4f} -> {after:.4f} (means of {half} logged steps)"
