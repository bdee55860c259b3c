"""metrics.jsonl as the contract has it; trackers that fail, hang or are absent cost nothing."""

import errno
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat import machine, trackers
from nanochat import metrics as metrics_module
from nanochat.health import Thresholds, Watch
from nanochat.machine import IMAGE_NAME, MachineStats, git_state, machine_facts
from nanochat.metrics import Metrics
from nanochat.rundir import RunDir


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def of_kind(run: RunDir, key: str) -> list[dict[str, Any]]:
    return [r for r in run.metrics() if key in r]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "toy")
    run.create()
    return run


def test_every_kind_of_line(run: RunDir) -> None:
    m = Metrics(run, "base_train")
    m.log_step(1, loss=torch.tensor(3.5), lr=np.float32(0.5), grad_norm=1.0, tokens_per_s=10)
    m.log_val(1, val_bpb=2.25)
    m.log_task("chat_sft", "copying", "accuracy", 0.9, 0.04, 60, 0.1)
    m.log_sample(1, "Once", "Once upon")
    m.log_event("rollback", "the loss was 9.0", skipped=[4, 5])
    m.close()
    step = of_kind(run, "loss")[0]
    assert {k: step[k] for k in ("stage", "step", "loss", "lr", "grad_norm", "tokens_per_s")} == {
        "stage": "base_train",
        "step": 1,
        "loss": 3.5,
        "lr": 0.5,
        "grad_norm": 1.0,
        "tokens_per_s": 10,
    }
    assert step["host_memory_gib"] > 0 and step["time_s"] > 1e9
    assert [r["val_bpb"] for r in of_kind(run, "val_bpb")] == [2.25]
    assert of_kind(run, "task") == [
        {
            "stage": "chat_sft",
            "task": "copying",
            "metric": "accuracy",
            "value": 0.9,
            "stderr": 0.04,
            "n": 60,
            "chance": 0.1,
        }
    ]
    assert [(r["sample"], r["text"]) for r in of_kind(run, "sample")] == [("Once", "Once upon")]
    start, rollback = of_kind(run, "event")
    assert start["event"] == "start" and start["machine"]["cores"] >= 1
    assert rollback["skipped"] == [4, 5] and rollback["step"] == 1


def test_lines_are_strict_json_whatever_the_numbers(run: RunDir) -> None:
    m = Metrics(run, "base_train")
    m.log_step(1, loss=float("nan"), grad_norm=float("inf"))
    m.log_val(1, val_bpb=float("nan"))
    m.close()
    assert "NaN" not in run.metrics_file.read_text()
    assert "Infinity" not in run.metrics_file.read_text()
    assert of_kind(run, "loss")[0]["loss"] is None


def test_a_resumed_stage_cuts_the_torn_tail_and_logs_steps_again(run: RunDir) -> None:
    first = Metrics(run, "base_train")
    for step in (1, 2, 3):
        first.log_step(step, loss=float(step))
    with open(run.metrics_file, "a") as f:
        f.write('{"stage": "base_train", "step": 4, "lo')
    second = Metrics(run, "base_train", resume_step=2)
    second.log_step(3, loss=30.0)
    second.log_step(4, loss=40.0)
    second.close()
    assert len(lines(run)) == 7  # every line is whole: two starts, three and two steps
    assert [(r["step"], r["loss"]) for r in of_kind(run, "loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]


def test_only_rank_0_writes(run: RunDir) -> None:
    m = Metrics(run, "base_train", rank=1, tensorboard=True)
    m.log_step(1, loss=1.0)
    m.log_val(1, val_bpb=1.0)
    m.log_sample(1, "a", "b")
    m.log_task("base_train", "copying", "accuracy", 1.0, 0.0, 1, None)
    m.log_event("rollback", "x")
    m.close()
    assert not run.metrics_file.exists() and not run.tensorboard_dir.exists()


def test_lines_wait_while_the_disk_is_full(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m = Metrics(run, "base_train")
    append = metrics_module.append_jsonl

    def full(path: Path, record: dict[str, Any]) -> None:
        with open(path, "a") as f:  # what a short write leaves
            f.write('{"stage": "ba')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_module, "append_jsonl", full)
    m.log_step(1, loss=1.0)
    m.log_step(2, loss=2.0)
    monkeypatch.setattr(metrics_module, "append_jsonl", append)
    m.log_step(3, loss=3.0)
    m.close()
    assert [r.get("loss") for r in lines(run)] == [None, 1.0, 2.0, 3.0]
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_tensorboard_has_the_scalars_and_forgets_steps_behind_the_resume(run: RunDir) -> None:
    first = Metrics(run, "base_train", tensorboard=True)
    for step in (1, 2, 3, 4):
        first.log_step(step, loss=float(step))
    first.close()
    second = Metrics(run, "base_train", resume_step=2, tensorboard=True)
    second.log_step(3, loss=30.0)
    second.log_val(3, val_bpb=1.5)
    second.log_sample(3, "Once", "Once upon")
    second.close()
    events = EventAccumulator(str(run.tensorboard_dir / "base_train"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]
    assert [e.value for e in events.Scalars("val_bpb")] == [1.5]
    assert any("Once" in tag for tag in events.Tags()["tensors"])


class BadSink:
    """A tracker that breaks at its third number."""

    def __init__(self) -> None:
        self.seen = 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.seen += 1
        if self.seen == 3:
            raise ConnectionError("the service is gone")

    def text(self, step: int, tag: str, text: str) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_noted_once_and_switched_off(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = BadSink()
    monkeypatch.setattr(metrics_module, "TensorBoardSink", lambda *_: sink)
    m = Metrics(run, "base_train", tensorboard=True)
    for step in range(1, 8):
        m.log_step(step, loss=1.0)
    m.close()
    off = [r for r in of_kind(run, "event") if r["event"] == "tracker_off"]
    assert sink.seen == 3 and len(off) == 1
    assert "TensorBoard" in off[0]["message"] and "the service is gone" in off[0]["message"]
    assert len(of_kind(run, "loss")) == 7


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError("x")])
def test_a_tracker_that_cannot_start_is_switched_off(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(metrics_module, "WandbSink", broken)
    m = Metrics(run, "base_train", wandb="online")
    m.log_step(1, loss=1.0)
    m.close()
    assert [r["event"] for r in of_kind(run, "event")].count("tracker_off") == 1
    assert len(of_kind(run, "loss")) == 1


def test_wandb_that_is_not_installed_says_what_to_do(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    m = Metrics(run, "base_train", wandb="offline")
    m.close()
    (off,) = [r for r in of_kind(run, "event") if r["event"] == "tracker_off"]
    assert "Weights & Biases" in off["message"] and "wandb" in off["message"]


def test_a_tracker_that_hangs_holds_neither_the_loop_nor_the_end() -> None:
    release = threading.Event()
    failures: list[str] = []

    class Stuck(BadSink):
        def scalars(self, step: int, values: dict[str, float]) -> None:
            release.wait()

    tracker = trackers.Tracker("Stuck", Stuck, failures.append)
    for step in range(trackers.QUEUE_LENGTH + 10):
        tracker.scalars(step, {"loss": 1.0})
    assert len(failures) == 1 and "does not keep up" in failures[0]
    tracker.close(timeout_s=0.01)
    release.set()


def test_a_tracker_that_does_not_finish_is_left_behind() -> None:
    release = threading.Event()
    failures: list[str] = []

    class Slow(BadSink):
        def close(self) -> None:
            release.wait()

    tracker = trackers.Tracker("Slow", Slow, failures.append)
    tracker.close(timeout_s=0.01)
    assert failures and "did not finish" in failures[0]
    release.set()


class FakeWandb:
    """The three calls of wandb that the sink makes, recorded."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> "FakeWandb":
        self.inits.append(given)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None: ...


def test_every_stage_and_restart_continues_one_wandb_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    for stage, step in (("base_train", 1), ("base_train", 1), ("chat_sft", 1)):
        m = Metrics(run, stage, wandb="online")
        m.log_step(step, loss=2.0)
        m.close()
    assert len({i["id"] for i in fake.inits}) == 1 and fake.inits[0]["resume"] == "allow"
    assert fake.rows[0]["base_train/loss"] == 2.0 and fake.rows[0]["base_train/step"] == 1
    assert fake.rows[2]["chat_sft/loss"] == 2.0


def test_wandb_stays_offline_in_an_offline_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    Metrics(run, "base_train", wandb="online").close()
    assert fake.inits[0]["mode"] == "offline"


# -- thresholds

SMALL = Thresholds(window=3, loss_window=4)


@pytest.mark.parametrize(
    ("healthy", "sick", "word"),
    [
        ({"gpu_util": 97.0}, {"gpu_util": 60.0}, "utilisation is 60 %"),
        ({"gpu_util": 97.0, "mfu": 0.4}, {"gpu_util": 97.0, "mfu": 0.1}, "MFU is 10.0 %"),
        (
            {"gpu_memory_gib": 70.0, "gpu_memory_total_gib": 80.0},
            {"gpu_memory_gib": 79.5, "gpu_memory_total_gib": 80.0},
            "99.4 % of the GPU memory",
        ),
        (
            {"step_s": 1.0, "loader_wait_s": 0.01},
            {"step_s": 1.0, "loader_wait_s": 0.2},
            "waits for data 20 %",
        ),
    ],
)
def test_a_passed_threshold_is_told_once_until_it_is_over(
    healthy: dict[str, float], sick: dict[str, float], word: str
) -> None:
    watch = Watch(SMALL)
    told = [w for record in [healthy] * 5 + [sick] * 9 for w in watch.look(record)]
    assert len(told) == 1 and word in told[0]
    assert [w for record in [healthy] * 5 for w in watch.look(record)] == []
    assert len([w for record in [sick] * 5 for w in watch.look(record)]) == 1


def test_one_slow_step_is_no_alarm() -> None:
    watch = Watch(SMALL)
    records = [{"gpu_util": 97.0}] * 3 + [{"gpu_util": 0.0}] + [{"gpu_util": 97.0}] * 3
    assert [w for r in records for w in watch.look(r)] == []


def test_the_mfu_of_a_cpu_is_no_alarm() -> None:
    watch = Watch(SMALL)
    assert [w for _ in range(9) for w in watch.look({"mfu": 0.01})] == []


def test_a_rising_loss_is_told_and_a_falling_one_is_not() -> None:
    watch = Watch(SMALL)
    assert [w for i in range(20) for w in watch.look({"loss": 5 - i / 10})] == []
    rising = [w for i in range(20) for w in watch.look({"loss": 3 + i / 10})]
    assert len(rising) == 1 and "the loss rises" in rising[0]


def test_val_bpb_above_its_best_three_times_in_a_row_is_overfitting() -> None:
    watch = Watch(SMALL)
    values = [2.0, 1.0, 1.1, 1.2, 0.9, 1.1, 1.2, 1.3, 1.4]
    told = [w for v in values for w in watch.look_val({"val_bpb": v})]
    assert len(told) == 1 and "0.9000" in told[0] and "1.3000" in told[0]


def test_a_val_bpb_that_is_not_finite_is_told_once_until_it_is_over() -> None:
    watch = Watch(SMALL)
    told = [len(watch.look_val({"val_bpb": v})) for v in (2.0, None, None, 1.0, None)]
    assert told == [0, 1, 0, 0, 1]


# -- the machine


def test_gpu_statistics_that_fail_are_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    stats = MachineStats(["GPU-of-another-machine"])
    assert set(stats.sample()) == {"host_memory_gib"}
    assert "switched off" in caplog.text
    assert stats.sample() == {}  # two seconds have not passed


class FakeNvml:
    """Two GPUs behind the calls of NVML that are used, numbered otherwise than CUDA does."""

    NVMLError = RuntimeError

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> int:
        return {b"GPU-b": 0, b"GPU-a": 1}[uuid]

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * 2**30, used=(10 + gpu) * 2**30)

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=90 + 10 * gpu)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return 600_000 + gpu


def test_gpu_statistics_are_of_the_gpus_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    both = MachineStats(["GPU-a", "GPU-b"]).sample()
    assert both["gpu_util"] == 95.0 and both["gpu_power_w"] == 1200.0
    assert both["gpu_memory_gib"] == 11.0 and both["gpu_memory_total_gib"] == 80.0
    assert MachineStats(["GPU-b"]).sample()["gpu_util"] == 90.0
    gpu = {"name": "H100", "memory_gib": 80.0, "driver": "570.1"}
    assert machine_facts()["gpus"] == [gpu, gpu]


def test_machine_facts_are_json_and_name_versions() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["memory_gib"] > 0 and facts["python"].startswith("3.")


def test_in_an_image_the_facts_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image.json"
    monkeypatch.setattr(machine, "IMAGE_FILE", image)
    assert machine_facts()["image"] is None
    image.write_text('{"version": "0.1.0", "revision": "abc"}')
    assert machine_facts()["image"] == {"version": "0.1.0", "revision": "abc"}
    monkeypatch.setenv(IMAGE_NAME, "nanochat@sha256:77")
    assert machine_facts()["image"]["name"] == "nanochat@sha256:77"


def test_a_folder_that_is_no_checkout_has_no_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
