"""Several nodes: the supervisor of the first one starts a stage's ranks on all of them.

The nodes share the run directory, and that is how they meet: the supervisor writes each attempt of
a stage to RUN/attempt.json, with a rendezvous of its own (torchrun, static, one port per attempt).
On every other node this module, `python -m infra.nodes RUN --node-rank N`, starts what stands
there, ends it when another attempt stands there, and ends itself when the run's lease is gone. The
only reader of SLURM_NNODES; without it there is one node and nothing here is used.
"""

import argparse
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from infra.privileges import enter_image
from infra.processes import StageProcess, stage_command, stage_env
from nanochat.rundir import RunDir, atomic_write_json, read_json
from nanochat.spec import WEIGHT_STAGES

ATTEMPT = "attempt.json"
POLL_S = 0.2
STALE_S = 60.0
"""Age of a lease whose supervisor is dead."""
FIRST_WORD_S = 900.0
"""From the start of a job to the supervisor's lease: preflight, and waiting for an old lease."""


def num_nodes() -> int:
    """Nodes of this job."""
    return int(os.environ.get("SLURM_NNODES", 1))


def first_node_command(stage: str, run_dir: Path, ranks_per_node: int) -> list[str]:
    """Command line of a stage on the first node; where it has ranks on others, they are told."""
    nodes = num_nodes()
    if nodes == 1 or stage not in (*WEIGHT_STAGES, "evaluate"):
        return stage_command(stage, run_dir, ranks_per_node)
    attempt = {
        "id": uuid.uuid4().hex,
        "stage": stage,
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "address": os.environ.get("MASTER_ADDR") or socket.gethostname(),
        "port": _free_port(),
    }
    atomic_write_json(run_dir / ATTEMPT, attempt)
    return _torchrun(attempt, 0, run_dir)


def follow(run_dir: RunDir, node_rank: int) -> int:
    """Start every attempt's ranks on this node until the run has ended; the exit code is 0."""
    # What a killed job has left is no attempt of this one.
    done_id = (read_json(run_dir.path / ATTEMPT) or {}).get("id")
    started_s = time.monotonic()
    process: StageProcess | None = None
    try:
        while True:
            is_led = _has_lease(run_dir)
            is_late = process is None and time.monotonic() - started_s > FIRST_WORD_S
            if not is_led and (process is not None or is_late):
                return 0
            attempt = read_json(run_dir.path / ATTEMPT)
            if is_led and isinstance(attempt, dict) and attempt["id"] != done_id:
                if process is not None:
                    process.kill()
                done_id = attempt["id"]
                process = _start(attempt, node_rank, run_dir)
            if process is not None:
                process.poll()
            time.sleep(POLL_S)
    finally:
        if process is not None:
            process.kill()


def _start(attempt: dict[str, Any], node_rank: int, run_dir: RunDir) -> StageProcess:
    ranks = attempt["ranks_per_node"]
    env = stage_env(ranks, run_dir.spec().runtime.num_threads)
    log = run_dir.log_file(f"{attempt['stage']}.node{node_rank}")
    return StageProcess(_torchrun(attempt, node_rank, run_dir.path), log, env)


def _torchrun(attempt: dict[str, Any], node_rank: int, run_dir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={attempt['nodes']}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={attempt['ranks_per_node']}",
        f"--master-addr={attempt['address']}",
        f"--master-port={attempt['port']}",
        *("-m", f"nanochat.stages.{attempt['stage']}", str(run_dir)),
    ]


def _has_lease(run_dir: RunDir) -> bool:
    """Whether a supervisor is at work. By the file's time, since clocks of nodes differ little."""
    try:
        return time.time() - run_dir.lease_file.stat().st_mtime < STALE_S
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    """Follow the run until it ends."""
    enter_image(argv)
    parser = argparse.ArgumentParser(prog="python -m infra.nodes", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--node-rank", type=int, required=True)
    args = parser.parse_args(argv)

    def end(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)  # the ranks here end in `follow`; the supervisor owns the checkpoint

    signal.signal(signal.SIGTERM, end)
    return follow(RunDir(args.run_dir), args.node_rank)


if __name__ == "__main__":
    sys.exit(main())
