"""The SLURM path on a real cluster in containers: Apptainer, munge, jobs that end and go on.

The image, its SIF and three nodes come first. The SIF is made of an image that this session builds.
With NANOCHAT_CLUSTER=try the cluster that `make cluster` has started is used, and left. The short
form is a run that finishes and one that a wall time cuts; the rest is long.
"""

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.twin import published
from tests.twin.engine import Engine, build_image, wait_until
from tests.twin.slurm.cluster import (
    ENDED,
    HOME,
    NODES,
    POLL_S,
    SCRATCH,
    SIF,
    SIGNAL_S,
    SMALL,
    START_S,
    USER,
    Cluster,
    build_twin,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

TOY = "@configs/e2e.toml"
FAST_SIGNAL_S = 40
FAST = f"--signal-s {FAST_SIGNAL_S}"
GSM8K = "main/test-00000-of-00001.parquet"
GSM8K_BYTES = published.gsm8k(24)
PUBLISHED = 'evaluate.tasks=["copying", "gsm8k"]'
"""A last stage that opens a published file, which the login node has fetched from its hub."""
RUN_S = 1800.0
STEPS = 3000
"""Of base training: far more than are done in the 30 s in which SLURM notices a job's end."""
TRAINING = (f"base_train.num_steps={STEPS}", "base_train.eval_every_steps=1000", PUBLISHED)
FEWER = "base_train.num_steps=1500"
ENDLESS = "base_train.num_steps=1000000"


@dataclass(frozen=True)
class Setup:
    """What the cluster's start has shown."""

    cluster: Cluster
    up_s: float | None
    """From nothing, images at hand, to idle nodes; None for a cluster that was given."""
    sif_sha256: str


@pytest.fixture(scope="module")
def setup(engine: Engine) -> Iterator[Setup]:
    """Three nodes, the SIF on scratch, the data fetched on the login node."""
    build_twin()
    made = Cluster(os.environ.get("NANOCHAT_CLUSTER", ""))
    is_given, up_s = made.adopt(), None
    try:
        if not is_given:
            started_s = time.monotonic()
            made.up()
            up_s = time.monotonic() - started_s
        if made.run(f"test -f {SIF}").exit_code:
            tag = f"{engine.image}-sif"
            build_image(tag, "--build-arg", "SKYPILOT_RUNTIME=0", "--build-arg", "DATA=none")
            digest = made.make_sif(tag)
        else:
            digest = made.check(f"sha256sum {SIF}").split()[0]
        fetch(made)
        yield Setup(made, up_s, digest)
    finally:
        if not is_given:
            made.down()


@pytest.fixture(scope="module")
def cluster(setup: Setup) -> Cluster:
    return setup.cluster


def fetch(cluster: Cluster) -> None:
    """As a student does, of the hub in the box; a second time there is nothing left to bring."""
    url = cluster.serve({f"openai/gsm8k/{GSM8K}": GSM8K_BYTES})
    cluster.check(f"rm -rf {HOME}/data/gsm8k")
    verb = f"fetch {TOY} '{PUBLISHED}' --json 2>/dev/null"
    for files in (1, 0):
        fetched = cluster.nanochat(verb, f"HF_ENDPOINT={url}")
        assert fetched.exit_code == 0, fetched.output
        assert json.loads(fetched.output)["files_fetched"] == files


def launch(cluster: Cluster, words: str, signal_s: int = FAST_SIGNAL_S) -> str:
    """Id of the job that a student's `launch` has submitted."""
    said = cluster.nanochat(f"launch {TOY} --to slurm --signal-s {signal_s} {words}")
    found = re.search(r"^job (\d+) is queued", said.output, re.MULTILINE)
    assert said.exit_code == 0 and found, said.output
    return found[1]


def named(name: str, *overrides: str) -> str:
    """Overrides as typed: the run's name and others."""
    return " ".join(f"'{word}'" for word in (f'name="{name}"', *overrides))


def steps(cluster: Cluster, name: str, stage: str = "base_train") -> int:
    """The last step of a stage in a run's metrics; 0 before the first."""
    file = f"{HOME}/runs/{name}/metrics.jsonl"
    text = cluster.run(f'grep \'"{stage}".*"loss"\' {file} 2>/dev/null | tail -n 3').output
    lines = text.splitlines()
    return max([0, *(json.loads(line)["step"] for line in lines if line.endswith("}"))])


def wait_for_step(cluster: Cluster, job: str, name: str, step: int) -> None:
    def reached() -> bool:
        assert cluster.job(job)["JobState"] not in ENDED, cluster.log(job)
        return steps(cluster, name) >= step

    wait_until(reached, RUN_S, f"{name} at step {step}", POLL_S)


def checkpoint_step(cluster: Cluster, name: str, stage: str = "base_train") -> int:
    """Step of the newest complete checkpoint of a run's stage; 0 before the first."""
    folder = f"{HOME}/runs/{name}/checkpoints/{stage}"
    done = cluster.run(f"cd {folder} && test -f $(cat latest)/manifest.json && cat latest")
    return 0 if done.exit_code else int(done.output.strip().rpartition("_")[2])


def weights(cluster: Cluster, name: str) -> list[str]:
    """sha256 of the last model and optimizer of a run."""
    folder = f"{HOME}/runs/{name}/checkpoints/chat_sft"
    lines = cluster.check(f"cd {folder} && cd $(cat latest) && sha256sum model-* optimizer-*")
    assert len(lines.splitlines()) >= 2
    return lines.splitlines()


def run_in_parts(cluster: Cluster, job: str, name: str, requeues: int) -> int:
    """End the wall time of a job so many times, each time after it has trained some more.

    By the job's progress and not by the clock: a job of two minutes may train 3,000 steps, or
    none on a machine that is busy. Returns the step that all but the last job have reached.
    """
    done = 0
    for _ in range(requeues):
        wait_for_step(cluster, job, name, done + 50)
        cluster.end_wall_time(job, RUN_S)
        done = steps(cluster, name)
    return done


def events(cluster: Cluster, name: str) -> list[str]:
    text = cluster.check(f"cat {HOME}/runs/{name}/slurm.jsonl")
    return [json.loads(line)["event"] for line in text.splitlines()]


# -- the short form: both runs side by side, one per compute node


@dataclass(frozen=True)
class Pair:
    """Jobs of the same run in one piece and in parts."""

    whole: str
    parts: str
    packets: dict[str, int]
    """The nodes' counters before both."""
    step: int
    """That the first part has reached."""


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> Pair:
    """The same run in one piece and in parts, side by side."""
    before = {node: cluster.packets_without_route(node) for node in NODES}
    whole = launch(cluster, "--time 60 " + named("whole", *TRAINING))
    parts = launch(cluster, "--time 60 " + named("parts", *TRAINING), SIGNAL_S)
    return Pair(whole, parts, before, run_in_parts(cluster, parts, "parts", 1))


def test_the_cluster_is_up_within_two_minutes(setup: Setup) -> None:
    if setup.up_s is None:
        pytest.skip("the cluster was given")
    print(f"up after {setup.up_s:.1f} s")
    assert setup.up_s < START_S


def test_a_run_finishes_without_a_packet_to_the_outside(
    cluster: Cluster, setup: Setup, pair: Pair
) -> None:
    whole, before = pair.whole, pair.packets
    ended = cluster.wait_for_job(whole, RUN_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.log(whole)
    assert ended["Comment"] == f"exit 0: done: {HOME}/runs/whole/report.md"
    report = cluster.check(f"cat {HOME}/runs/whole/report.md")
    assert "val_bpb" in report and "| GSM8K |" in report
    assert f"nanochat.sif@sha256:{setup.sif_sha256}" in report
    assert hashlib.sha256(GSM8K_BYTES).hexdigest() in report
    for node in ("login", *NODES):
        used = int(cluster.check("du -sk ~", node).split()[0])
        assert used < 1024, cluster.check("find ~", node)
    assert {node: cluster.packets_without_route(node) for node in NODES} == before
    # The counter does count: what no route leads to is one more, also by IPv6 where there is any.
    addresses = ["192.0.2.1"]
    if cluster.run("test -e /proc/net/snmp6", "c1").exit_code == 0:
        addresses.append("2001:db8::1")
    for address in addresses:
        counted = cluster.packets_without_route("c1")
        cluster.run(f"(: > /dev/tcp/{address}/80) 2>/dev/null", "c1")
        assert cluster.packets_without_route("c1") > counted, address


def test_status_knows_the_chain(cluster: Cluster, pair: Pair) -> None:
    cluster.wait_for_job(pair.whole, RUN_S)
    said = cluster.nanochat("status whole")
    assert (said.exit_code, "SUCCEEDED" in said.output) == (0, True), said.output
    assert re.search(rf"jobs +1, the last is {pair.whole}", said.output), said.output


def test_a_wall_time_shorter_than_the_run(cluster: Cluster, pair: Pair) -> None:
    whole, parts = pair.whole, pair.parts
    ended = cluster.wait_for_job(parts, RUN_S)
    log = cluster.log(parts)
    assert ended["JobState"] == "COMPLETED", log
    assert ended["Restarts"] == "1", log
    assert log.count("got USR2; asking for a checkpoint") == 1, log
    assert events(cluster, "parts") == ["start", "requeue", "start", "end"]
    assert 0 < pair.step < steps(cluster, "parts"), "each of the two jobs has trained"
    cluster.wait_for_job(whole, RUN_S)
    assert weights(cluster, "parts") == weights(cluster, "whole")


# -- the long form


@pytest.mark.long
def test_four_jobs_give_the_same_bits(cluster: Cluster) -> None:
    training = f"base_train.num_steps={2 * STEPS}", "base_train.eval_every_steps=1000"
    whole = launch(cluster, "--time 60 " + named("whole4", *training))
    parts = launch(cluster, "--time 60 " + named("parts4", *training), SIGNAL_S)
    done = run_in_parts(cluster, parts, "parts4", 3)
    ended = cluster.wait_for_job(parts, RUN_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "3"), cluster.log(parts)
    assert done < steps(cluster, "parts4"), "the last job has trained too"
    assert cluster.wait_for_job(whole, RUN_S)["JobState"] == "COMPLETED", cluster.log(whole)
    assert weights(cluster, "parts4") == weights(cluster, "whole4")


@pytest.mark.long
@pytest.mark.parametrize("how", ["", "--batch --signal=TERM"], ids=["at_once", "asked"])
def test_scancel_keeps_a_checkpoint_and_the_run_goes_on(
    cluster: Cluster, pair: Pair, how: str
) -> None:
    """The same weights in the end. Asked first, the run saves before it ends."""
    name = f"cancelled{len(how)}"
    words = "--time 30 " + named(name, *TRAINING)
    job = launch(cluster, words)
    wait_for_step(cluster, job, name, 50)
    wait_until(lambda: checkpoint_step(cluster, name) > 0, RUN_S, "a checkpoint", POLL_S)
    cluster.check(f"scancel {how} {job}")
    ended = cluster.wait_for_job(job, 120)
    assert ended["JobState"] == ("FAILED" if how else "CANCELLED"), ended
    assert ended["ExitCode"] == "75:0", cluster.log(job)
    assert checkpoint_step(cluster, name) > 0
    assert not how or checkpoint_step(cluster, name) == steps(cluster, name)
    assert cluster.run(f"squeue --noheader --user={USER}").output.strip() == ""
    again = launch(cluster, words)
    assert cluster.wait_for_job(again, RUN_S)["JobState"] == "COMPLETED", cluster.log(again)
    assert weights(cluster, name) == weights(cluster, "whole")


@pytest.mark.long
def test_a_node_that_dies_hands_its_run_to_the_other(cluster: Cluster) -> None:
    job = launch(cluster, "--time 30 " + named("node_died", FEWER))
    wait_for_step(cluster, job, "node_died", 50)
    node = cluster.job(job)["NodeList"]
    cluster.nodes[node].remove(force=True)
    try:
        wait_until(lambda: cluster.job(job).get("Restarts") == "1", 240, "the requeue")
        ended = cluster.wait_for_job(job, RUN_S)
        assert ended["JobState"] == "COMPLETED", cluster.log(job)
        assert ended["NodeList"] != node
    finally:
        cluster.start_node(node)
        wait_until(lambda: cluster.sinfo().split().count("idle") == 2, 120, "both nodes")


@pytest.mark.long
def test_a_full_scratch_is_78_and_goes_on_once_there_is_room(cluster: Cluster) -> None:
    words = f"--time 30 --scratch {SMALL}/{USER} --sif {SIF} " + named(
        "full", FEWER, "checkpoint.free_floor_gib=0.0"
    )
    cluster.check(f"mkdir -p {SMALL}/{USER}/nanochat && cp -r {HOME}/data {SMALL}/{USER}/nanochat/")
    job = launch(cluster, words)
    metrics = f"{SMALL}/{USER}/nanochat/runs/full/metrics.jsonl"
    wait_until(
        lambda: (
            cluster.run(f"grep -c loss {metrics}").output.strip().isdigit()
            and int(cluster.run(f"grep -c loss {metrics}").output) > 50
        ),
        RUN_S,
        "a step",
        POLL_S,
    )
    cluster.run(f"head -c 64M /dev/zero > {SMALL}/filler", user="root")
    ended = cluster.wait_for_job(job, RUN_S)
    assert ended["ExitCode"] == "78:0", cluster.run(f"tail -n 20 {SMALL}/{USER}/*.out").output
    assert "is full" in ended["Comment"]
    cluster.check(f"rm {SMALL}/filler", user="root")
    again = launch(cluster, words)
    ended = cluster.wait_for_job(again, RUN_S)
    assert ended["JobState"] == "COMPLETED", cluster.run(f"tail -n 20 {SMALL}/{USER}/*.out").output


@pytest.mark.long
def test_a_missing_sif_is_named(cluster: Cluster) -> None:
    words = f"{TOY} --to slurm {FAST} --time 30 {named('no_sif')} --sif {SCRATCH}/none.sif"
    said = cluster.nanochat(f"launch {words} --dry-run")
    job = cluster.check(f"sbatch --parsable << 'END'\n{said.output}\nEND").strip()
    ended = cluster.wait_for_job(job, 60)
    assert ended["ExitCode"] == "78:0"
    assert f"there is no image {SCRATCH}/none.sif" in ended["Comment"]


@pytest.mark.long
@pytest.mark.parametrize("damage", ["rm", "truncate -s 100"])
def test_a_data_file_that_is_not_whole_is_refused_before_any_step(
    cluster: Cluster, damage: str
) -> None:
    file = f"{HOME}/data/gsm8k/{GSM8K}"
    name = f"damaged-{damage.split()[0]}"
    cluster.check(f"cp {file} {SCRATCH}/kept && {damage} {file}")
    try:
        job = launch(cluster, f"--time 30 {named(name, PUBLISHED)}")
        ended = cluster.wait_for_job(job, 120)
        assert ended["ExitCode"] == "78:0", cluster.log(job)
        assert os.path.basename(file) in ended["Comment"], ended
        # The reason, and the command, which is right as it stands: pasted it says the same.
        said = cluster.nanochat(f"status {name}")
        assert (said.exit_code, os.path.basename(file) in said.output) == (78, True), said.output
        assert json.loads(cluster.nanochat(f"status {name} --json").output)["exit_code"] == 78
        command = re.search(r"nanochat (fetch @.*)$", said.output.strip())
        assert command, said.output
        checked = cluster.nanochat(f"{command[1]} --check")
        assert (checked.exit_code, os.path.basename(file) in checked.output) == (78, True)
        lines = cluster.check(f"cat {HOME}/runs/{name}/slurm.jsonl").splitlines()
        started_s, ended_s = (json.loads(line)["time"] for line in lines)
        assert ended_s - started_s < 10
        assert steps(cluster, name) == 0
    finally:
        cluster.check(f"cp {SCRATCH}/kept {file}")


@pytest.mark.long
def test_two_submissions_of_a_run_do_not_meet(cluster: Cluster) -> None:
    words = f"{TOY} --to slurm {FAST} --time 30 {named('twice', *TRAINING)}"
    first = launch(cluster, "--time 30 " + named("twice", *TRAINING))
    refused = cluster.nanochat(f"launch {words}")
    assert refused.exit_code == 78
    assert f"queued already: job {first}" in refused.output
    script = cluster.nanochat(f"launch {words} --dry-run").output
    second = cluster.check(f"sbatch --parsable << 'END'\n{script}\nEND").strip()
    assert cluster.wait_for_job(first, RUN_S)["JobState"] == "COMPLETED", cluster.log(first)
    assert cluster.wait_for_job(second, 120)["JobState"] == "COMPLETED", cluster.log(second)
    assert "base_train starts" not in cluster.log(second)


@pytest.mark.long
def test_a_chain_ends_at_its_bound(cluster: Cluster) -> None:
    words = "--time 2 --max-jobs 2 " + named("bound", ENDLESS)
    job = launch(cluster, words)
    ended = cluster.wait_for_job(job, RUN_S)
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "1"), cluster.log(job)
    assert "2 jobs were not enough" in ended["Comment"]


@pytest.mark.long
def test_where_requeueing_is_forbidden_the_next_job_follows(cluster: Cluster) -> None:
    words = "--time 2 --no-requeue --max-jobs 2 " + named("chain", ENDLESS)
    job = launch(cluster, words)
    ended = cluster.wait_for_job(job, RUN_S)
    found = re.search(r"goes on in job (\d+)", ended["Comment"])
    assert found, cluster.log(job)
    last = cluster.wait_for_job(found[1], RUN_S)
    assert "2 jobs were not enough" in last["Comment"]
    assert events(cluster, "chain").count("start") == 2


@pytest.mark.long
def test_two_nodes_have_the_losses_of_one_process(cluster: Cluster) -> None:
    def losses(name: str) -> dict[int, float]:
        text = cluster.check(f"cat {HOME}/runs/{name}/metrics.jsonl")
        rows = [json.loads(line) for line in text.splitlines()]
        return {r["step"]: r["loss"] for r in rows if r["stage"] == "base_train" and "loss" in r}

    alone = launch(cluster, "--time 30 " + named("alone"))
    assert cluster.wait_for_job(alone, RUN_S)["JobState"] == "COMPLETED", cluster.log(alone)
    words = "--time 30 --nodes 2 " + named("both", "runtime.num_ranks=2")
    both = launch(cluster, words)
    ended = cluster.wait_for_job(both, RUN_S)
    assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "2"), cluster.log(both)
    assert cluster.run(f"ls {HOME}/runs/both/logs").output.count(".node1.log") >= 3
    expected = losses("alone")
    assert losses("both") == pytest.approx(expected, rel=1e-3) and len(expected) == 60


@pytest.mark.long
def test_launch_over_ssh(cluster: Cluster, tmp_path: Path) -> None:
    """From this machine, which has no SLURM: sbatch runs on the login node."""
    key = os.path.join(tmp_path, "key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = Path(f"{key}.pub").read_text().strip()
    cluster.check(f"mkdir -p -m 700 ~/.ssh && echo '{public}' > ~/.ssh/authorized_keys")
    login = cluster.nodes["login"]
    login.reload()
    address = login.attrs["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
    ssh = os.path.join(tmp_path, "ssh")
    with open(ssh, "w") as f:
        options = f"-i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        f.write(f'#!/bin/sh\nexec /usr/bin/ssh {options} -o LogLevel=ERROR "$@"\n')
    os.chmod(ssh, 0o755)
    command = ["launch", TOY, *FAST.split(), "--time", "30", 'name="over_ssh"', "--to", "slurm"]
    command += ["--scratch", "/scratch/$USER", "--ssh", f"{USER}@{address}"]
    # A classmate has a run of that name in the queue, which is not in the way.
    held = "sbatch --parsable --hold --output=/dev/null --job-name=nanochat-over_ssh --wrap=true"
    classmates = cluster.check(f"cd / && {held}", user="other").strip()
    done = subprocess.run(
        [".venv/bin/nanochat", *command],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    found = re.search(r"job (\d+) is queued", done.stderr)
    assert done.returncode == 0 and found, done.stderr
    assert cluster.wait_for_job(found[1], RUN_S)["JobState"] == "COMPLETED", cluster.log(found[1])
    assert cluster.job(classmates)["JobState"] == "PENDING"
    cluster.check(f"scancel {classmates}", user="other")


@pytest.mark.long
def test_stop_from_the_login_node_ends_the_chain(cluster: Cluster) -> None:
    job = launch(cluster, "--time 30 " + named("stopped", ENDLESS))
    wait_for_step(cluster, job, "stopped", 20)
    stopped = cluster.nanochat("stop stopped")
    assert stopped.exit_code == 0, stopped.output
    ended = cluster.wait_for_job(job, 120)
    assert ended["ExitCode"] == "75:0" and "by request" in ended["Comment"]
    assert checkpoint_step(cluster, "stopped") == steps(cluster, "stopped")


@pytest.mark.long
def test_a_run_that_waits_is_seen_and_stopped(cluster: Cluster) -> None:
    cluster.check("scontrol update NodeName=c1,c2 State=DRAIN Reason=test", user="root")
    try:
        job = launch(cluster, "--time 30 " + named("waits"))
        said = cluster.nanochat("status waits")
        assert said.exit_code == 0, said.output
        assert re.search(rf"waits: job {job} PENDING \(.*\), 0 jobs ahead, start ", said.output)
        cluster.run(f"scancel {job}", user="other")
        assert cluster.job(job)["JobState"] == "PENDING", "it is nobody else's to end"
        stopped = cluster.nanochat("stop waits")
        assert stopped.exit_code == 0, stopped.output
        assert cluster.wait_for_job(job, 60)["JobState"] == "CANCELLED"
    finally:
        cluster.check("scontrol update NodeName=c1,c2 State=RESUME", user="root")
