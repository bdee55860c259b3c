"""The run directory: every file of a run, who writes it, and how it survives a kill.

* Small files are replaced atomically (write beside, fsync, rename, fsync the folder); logs are
  append-only, and readers skip a torn last line.
* One writer per run directory: nanochat/lease.py.
* `spent_usd` and `used_s` are derived from ledger.jsonl alone.

No torch here, also indirectly: the supervisor and `status` read run directories on machines that
have none.
"""

import contextlib
import enum
import errno
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.spec import (
    MACHINE_FIELDS,
    STAGES,
    RunSpec,
    SpecError,
    differing_fields,
    spec_from_json,
)

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
IMAGE_DATA = Path("/opt/nanochat/data")

EXIT_DONE = 0
EXIT_FAILED = 70
EXIT_STOPPED = 75
EXIT_BUDGET = 76
EXIT_UNFIT_NODE = 77
EXIT_SPEC = 78


PROBE_BYTES = 1 << 16
"""More than the small files of a run take: their last bytes must not fail when a probe has not."""


class JobStatus(enum.StrEnum):
    """State of a run."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class StopReason(enum.StrEnum):
    """Why a run was asked to stop."""

    SIGNAL = "signal"
    USER = "user"
    BUDGET = "budget"
    WALL_TIME = "wall_time"
    PREEMPTED = "preempted"


class RunDirError(RuntimeError):
    """The run directory cannot be used: of another spec, held by another run, not writable."""


def nanochat_home() -> Path:
    """Where data and runs live: NANOCHAT_HOME, a mounted /workspace, or the user's cache."""
    if home := os.environ.get("NANOCHAT_HOME"):
        return Path(home)
    if os.path.ismount("/workspace"):
        return Path("/workspace/nanochat")
    return Path.home() / ".cache" / "nanochat"


def fsync_dir(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader or a crash sees the old or the new text, never a mix."""
    # Random, as two threads share a pid, and two containers on one volume may too.
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(staged, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def atomic_write_json(path: Path, obj: Any) -> None:
    """`atomic_write_text` of indented JSON."""
    atomic_write_text(path, json.dumps(obj, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any | None:
    """The document in a file, or None where there is no whole document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None


def append_jsonl(path: Path, record: dict[str, Any], durable: bool = False) -> None:
    """Append one line; the line is one write, so that a kill tears at most the last one."""
    line = (json.dumps(record, default=str) + "\n").encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of an append-only log; a torn or damaged line is skipped."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(record, dict):
                    yield record
    except FileNotFoundError:
        return


def cut_torn_tail(path: Path) -> None:
    """Cut a last line without its newline, so that the next append starts on a line of its own."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return
    if size == 0:
        return
    with open(path, "r+b") as f:
        back = min(size, 1 << 20)
        f.seek(size - back)
        tail = f.read(back)
        if not tail.endswith(b"\n"):
            f.truncate(size - back + tail.rfind(b"\n") + 1)
            f.flush()
            os.fsync(f.fileno())


@dataclass
class Outcome:
    """How a stage ended; written by the stage itself as its last act."""

    stage: str
    outcome: str
    """running | done | stopped | failed | again (a new process: smaller batch, or one left out)"""
    message: str = ""
    step: int | None = None
    num_steps: int | None = None
    exit_code: int | None = None
    """For failed: the code of the contract that the failure stands for."""
    seconds: float = 0.0
    """Wall clock of this stage, over all restarts."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers for the report."""


@dataclass
class StopRequest:
    """RUN/stop.json: present only while a stop is asked."""

    reason: StopReason
    deadline_s: float
    """Unix time by which the processes of the run must have ended."""


class RunDir:
    """Paths and files of one run directory. Creating the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec_file = self.path / "spec.json"
        self.plan_file = self.path / "plan.json"
        self.resolved_file = self.path / "resolved.jsonl"
        self.status_file = self.path / "status.json"
        self.ledger_file = self.path / "ledger.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.stop_file = self.path / "stop.json"
        self.lease_file = self.path / "lease.json"
        self.tokenizer_dir = self.path / "tokenizer"
        self.report_dir = self.path / "report"
        self.tensorboard_dir = self.path / "tensorboard"

    def __fspath__(self) -> str:
        return str(self.path)

    def outcome_file(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def progress_file(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.progress.json"

    def log_file(self, stage: str) -> Path:
        return self.path / "logs" / f"{stage}.log"

    def checkpoints_dir(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def create(self) -> None:
        """Make the folders and prove that they can be written. Raises RunDirError."""
        try:
            for folder in ("stages", "logs", "checkpoints"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as e:
            raise RunDirError(
                f"{self.path} cannot be written ({e.strerror}); give a place that can: "
                "--run-dir DIR, or NANOCHAT_HOME for all runs"
            ) from None

    # -- spec and plan: written once, frozen; what the machine changed stands in resolved.jsonl

    def spec(self) -> RunSpec:
        """The spec that holds: what was frozen, with the MACHINE_FIELDS of the last resume.

        Raises RunDirError where this is no run directory.
        """
        try:
            text = self.spec_file.read_text(encoding="utf-8")
            for change in self.resolved("spec")[-1:]:
                text = json.dumps(json.loads(text) | change["fields"])
            return spec_from_json(text, str(self.spec_file))
        except FileNotFoundError:
            raise RunDirError(f"{self.path} is no run directory (it has no spec.json)") from None
        except (SpecError, json.JSONDecodeError) as e:
            raise RunDirError(f"{self.spec_file}: {e}") from None

    def freeze_spec(self, spec: RunSpec) -> None:
        """Write spec.json, or check that the run in this directory is the same one.

        MACHINE_FIELDS may differ, which is noted. Raises RunDirError with what else differs.
        """
        if not self.spec_file.exists():
            atomic_write_text(self.spec_file, spec.model_dump_json(indent=2) + "\n")
            return
        differing = differing_fields(self.spec(), spec)
        if learned := [field for field in differing if self._changes_learning(field)]:
            raise RunDirError(
                f"{self.path} holds a run of another spec; nothing was changed. It differs "
                "in:\n  " + "\n  ".join(learned) + "\nGive the same spec to resume, or "
                "another --run-dir (or name) for a new run."
            )
        if differing:
            tree = json.loads(spec.model_dump_json())
            fields = {name: tree[name] for name in MACHINE_FIELDS}
            self.append_resolved("spec", changes=differing, fields=fields)

    def _changes_learning(self, field: str) -> bool:
        """Whether a difference ("section.field: old -> new") makes it another run."""
        section = field.partition(":")[0].partition(".")[0]
        if section not in MACHINE_FIELDS:
            return True
        base = self.spec().base_train
        is_schedule = base is not None and base.horizon == "budget"
        return is_schedule and field.startswith("budget.max_") and not self.is_done("base_train")

    def plan(self) -> dict[str, Any]:
        """The plan that holds: that of the last machine. Raises RunDirError where it is missing."""
        plan = read_json(self.plan_file)
        if not isinstance(plan, dict):
            raise RunDirError(f"{self.plan_file} is missing or damaged; run the same command again")
        for change in self.resolved("plan")[-1:]:
            plan = change["plan"]
        return plan

    def freeze_plan(self, plan: dict[str, Any]) -> None:
        """Write plan.json; on a resume, note the plan where it is one for another machine."""
        if not self.plan_file.exists():
            atomic_write_json(self.plan_file, plan)
        elif not is_same_machine(self.plan(), plan):
            reason = f"another machine: {plan['offer']}, {plan['world_size']} ranks"
            self.append_resolved("plan", reason=reason, plan=plan)

    def volume_trouble(self) -> tuple[int, str] | None:
        """(exit code, message) where nothing can be written here any more, else None."""
        try:
            if not self.path.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            atomic_write_text(self.path / ".writable", " " * PROBE_BYTES)
            (self.path / ".writable").unlink()
        except OSError as e:
            if e.errno in OUT_OF_SPACE:
                return EXIT_SPEC, (
                    f"the volume of {self.path} is full; the last complete checkpoint is kept. "
                    "Free space or use a larger volume, then run the same command again"
                )
            if e.errno == errno.EROFS:
                return EXIT_SPEC, (
                    f"{self.path} has become read-only; the last complete checkpoint is kept. Make "
                    "it writable, then run the same command again"
                )
            return EXIT_UNFIT_NODE, (
                f"the volume of {self.path} is gone ({e.strerror}); where it is mounted, the same "
                "command resumes from the last complete checkpoint"
            )
        return None

    # -- stop: asked by anyone, answered by the ranks

    def request_stop(self, reason: StopReason, deadline_s: float) -> None:
        """Ask the run to stop with a checkpoint by `deadline_s` (Unix time)."""
        atomic_write_json(self.stop_file, {"reason": reason, "deadline_s": deadline_s})

    def stop_request(self) -> StopRequest | None:
        raw = read_json(self.stop_file)
        if not isinstance(raw, dict):
            return None
        return StopRequest(StopReason(raw["reason"]), float(raw["deadline_s"]))

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    # -- outcomes, progress, status

    def write_outcome(self, outcome: Outcome) -> None:
        atomic_write_json(self.outcome_file(outcome.stage), asdict(outcome))

    def outcome(self, stage: str) -> Outcome | None:
        raw = read_json(self.outcome_file(stage))
        known = Outcome.__dataclass_fields__
        if not isinstance(raw, dict) or "stage" not in raw or "outcome" not in raw:
            return None
        return Outcome(**{k: v for k, v in raw.items() if k in known})

    def is_done(self, stage: str) -> bool:
        outcome = self.outcome(stage)
        return outcome is not None and outcome.outcome == "done"

    def write_progress(self, stage: str, phase: str, **facts: Any) -> None:
        """Tell the supervisor that a stage is alive: phase, step, num_steps, eta_s, …

        One process of a stage writes. A full volume leaves the former facts with a newer time.
        """
        path = self.progress_file(stage)
        staged = path.with_suffix(".tmp")
        try:
            staged.write_text(json.dumps({"phase": phase, "time": time.time(), **facts}))
            os.replace(staged, path)
        except OSError as e:
            if e.errno not in OUT_OF_SPACE:
                raise
            self.give_sign_of_life(stage)

    def give_sign_of_life(self, stage: str) -> None:
        """Tell that a stage is alive where there is nothing new to tell; takes no space."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.progress_file(stage))

    def last_sign_s(self, stage: str) -> float | None:
        """Unix time of a stage's last sign of life, None where it has given none."""
        try:
            return self.progress_file(stage).stat().st_mtime
        except FileNotFoundError:
            return None

    def progress(self, stage: str) -> dict[str, Any]:
        raw = read_json(self.progress_file(stage))
        return raw if isinstance(raw, dict) else {}

    def status(self) -> dict[str, Any] | None:
        return read_json(self.status_file)

    def write_status(self, status: dict[str, Any]) -> None:
        atomic_write_json(self.status_file, status)

    def append_resolved(self, what: str, **facts: Any) -> None:
        """Note what changed after the plan was frozen, and why; durable before use."""
        append_jsonl(
            self.resolved_file,
            {"time": time.time(), "what": what, **facts},
            durable=True,
        )

    def resolved(self, what: str) -> list[dict[str, Any]]:
        return [r for r in read_jsonl(self.resolved_file) if r.get("what") == what]

    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl with the last line per (stage, step, kind) only, in order of writing.

        So a step logged again after a resume replaces the line of the killed run. What a stage had
        measured behind the checkpoint that it went on from is left out, as it may never be logged
        again: those steps are not in its weights. Events stay.
        """
        last: dict[tuple[Any, ...], dict[str, Any]] = {}
        for record in read_jsonl(self.metrics_file):
            if (step := _resume_step(record)) is not None:
                stage = record.get("stage")
                last = {k: r for k, r in last.items() if not _is_behind(r, stage, step)}
            key = (record.get("stage"), record.get("step"), _kind(record))
            last.pop(key, None)
            last[key] = record
        return list(last.values())


def _resume_step(record: dict[str, Any]) -> int | None:
    """Step that the stage goes on from after this line; None for all but starts and roll-backs."""
    return record.get("step" if record.get("event") == "start" else "resume_step")


def _is_behind(record: dict[str, Any], stage: str | None, step: int) -> bool:
    """Whether a line is a measurement of the stage behind a step."""
    return (
        record.get("stage") == stage and "event" not in record and (record.get("step") or 0) > step
    )


def _kind(record: dict[str, Any]) -> tuple[Any, ...]:
    """What of a stage and step a line of metrics.jsonl tells."""
    if "task" in record:
        return ("task", record["task"], record.get("metric"))
    if "event" in record:
        return ("event", record["event"], record.get("message"))
    if "sample" in record:
        return ("sample", record["sample"])
    if "val_bpb" in record:
        return ("val",)
    return ("step",) if "loss" in record else ("other", *sorted(set(record) - {"time_s"}))


def is_same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two plans are for the same machine at the same price."""
    return all(a.get(k) == b.get(k) for k in ("offer", "world_size", "usd_per_hour"))


def find_run(path: Path | str) -> RunDir:
    """The run directory at a path, or the run of that name below NANOCHAT_HOME/runs.

    Raises RunDirError that lists the runs there are.
    """
    for candidate in (Path(path), nanochat_home() / "runs" / str(path)):
        if (candidate / "spec.json").is_file():
            return RunDir(candidate)
    runs = sorted(p.parent.name for p in (nanochat_home() / "runs").glob("*/spec.json"))
    known = f"runs in {nanochat_home() / 'runs'}: {', '.join(runs) or 'none'}"
    raise RunDirError(f"{path} is no run directory (it has no spec.json); {known}")


def newest_stage(run: RunDir, names: tuple[str, ...] = STAGES) -> str | None:
    """The last stage in run order that has a checkpoint folder with a `latest`."""
    for stage in reversed(names):
        if (run.checkpoints_dir(stage) / "latest").is_file():
            return stage
    return None
