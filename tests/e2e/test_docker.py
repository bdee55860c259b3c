"""The image on a real engine: users, places, stops, kills, full disks, and that runs go on."""

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from docker.models.containers import Container

from infra.launch.docker import how_it_ended
from tests.twin.engine import MOUNT, ROOT, Ended, Engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TOY = ("run", "@configs/e2e.toml")
SHORT = ("run", "@/short.toml")
"""The toy run without what comes between base training and report: half of its time."""
LONGER = "base_train.num_steps=300"
"""So that it is still training when something has happened to it."""
RUN = f"{MOUNT}/nanochat/runs/e2e"
OFFLINE = {"network_mode": "none", "read_only": True}
START_S = 600.0
"""Until a stage's first step on two cores that others use too."""


def mounted(volume: str, mode: str = "rw", short: Path | None = None) -> dict[str, Any]:
    volumes = {volume: {"bind": MOUNT, "mode": mode}}
    if short is not None:
        volumes[str(short)] = {"bind": SHORT[1][1:], "mode": "ro"}
    return {"volumes": volumes}


def shown(container: Container, path: str) -> str:
    """A file of a running container; empty where there is none."""
    code, output = container.exec_run(["cat", path])
    return output.decode() if code == 0 else ""


def last_step(container: Container, stage: str) -> int:
    """The last training step of a stage in metrics.jsonl; 0 before the first."""
    lines = shown(container, f"{RUN}/metrics.jsonl").splitlines()
    wanted = [line for line in lines if '"loss"' in line and f'"{stage}"' in line]
    return max([0, *(json.loads(line)["step"] for line in wanted)])


def wait_for_step(container: Container, stage: str, step: int) -> None:
    def reached() -> bool:
        container.reload()
        assert container.status == "running", container.logs().decode()
        return last_step(container, stage) >= step

    wait_until(reached, START_S, f"{stage} at step {step}")


def weights(engine: Engine, volume: str) -> list[str]:
    """sha256 of the last model and optimizer of a run, and its last validation loss."""
    script = (
        f"cd {RUN}/checkpoints/chat_sft && cd $(cat latest) && sha256sum model-* optimizer-* && "
        f"grep val_bpb {RUN}/metrics.jsonl | sed 's/.*\\(\"val_bpb\": [0-9.]*\\).*/\\1/' | tail -1"
    )
    lines = engine.shell(volume, script).splitlines()
    assert len(lines) >= 3, lines
    return lines


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of SHORT on this machine."""
    spec = tomllib.loads((ROOT / "configs" / "e2e.toml").read_text())
    for stage in ("mid_train", "chat_sft", "chat_rl", "evaluate"):
        del spec[stage]
    path = tmp_path_factory.mktemp("short") / "short.toml"
    path.write_text(tomli_w.dumps(spec))
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def finished(engine: Engine, image: str) -> Iterator[tuple[str, Ended]]:
    """The toy run from start to report, without network, read-only: its volume and its end."""
    with engine.volume() as volume:
        yield volume, engine.run(*TOY, **OFFLINE, **mounted(volume))


# -- the whole run


def test_the_run_ends_with_a_report_offline_and_read_only(
    engine: Engine, finished: tuple[str, Ended]
) -> None:
    volume, ended = finished
    assert ended.exit_code == 0, ended.output
    assert "lost" not in ended.output
    report = engine.shell(volume, f"cat {RUN}/report.md")
    assert "val_bpb" in report
    status = json.loads(engine.shell(volume, f"cat {RUN}/status.json"))
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)


def test_everything_it_left_belongs_to_the_user(
    engine: Engine, finished: tuple[str, Ended]
) -> None:
    owners = engine.shell(finished[0], f"find {MOUNT} -printf '%U:%G\\n' | sort | uniq -c")
    assert {line.split()[1] for line in owners.splitlines()} == {"1000:0"}


def test_another_user_of_the_group_goes_on_with_it(
    engine: Engine, finished: tuple[str, Ended]
) -> None:
    again = engine.run(*TOY, user="12345:0", **OFFLINE, **mounted(finished[0]))
    assert again.exit_code == 0, again.output
    assert "base_train starts" not in again.output


@pytest.mark.parametrize(
    "is_whole", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "whole"]
)
def test_any_user_runs_it(
    engine: Engine, image: str, volume: str, short: Path, is_whole: bool
) -> None:
    words = TOY if is_whole else SHORT
    ended = engine.run(*words, user="12345:0", **OFFLINE, **mounted(volume, short=short))
    assert ended.exit_code == 0, ended.output
    owners = engine.shell(volume, f"find {MOUNT}/nanochat -printf '%U\\n' | sort -u")
    assert owners.split() == ["12345"]


def test_without_a_volume_it_runs_and_warns(engine: Engine, image: str) -> None:
    ended = engine.run(*TOY, network_mode="none")
    assert ended.exit_code == 0, ended.output
    assert re.search(r"warning: .*lost with.*-v nanochat:/workspace", ended.output), ended.output
    assert "report done" in ended.output


@pytest.mark.long
def test_the_smoke_run_offline_and_read_only_in_five_minutes(
    engine: Engine, image: str, volume: str
) -> None:
    """As a user types it, without a command."""
    started = time.monotonic()
    container = engine.start(**OFFLINE, **mounted(volume))
    progress = f"{MOUNT}/nanochat/runs/smoke/stages/data_fetch.json"
    wait_until(lambda: bool(shown(container, progress)), START_S, "the first stage")
    processes = container.top(ps_args="-eo pid,uid,args")["Processes"]
    assert {uid for _, uid, words in processes if "tini" not in words} == {"1000"}, processes
    ended = engine.wait(container)
    assert ended.exit_code == 0, ended.output
    assert time.monotonic() - started < 300
    assert "SFT" in engine.shell(volume, f"cat {MOUNT}/nanochat/runs/smoke/report.md")


# -- users


def test_a_shell_is_root_and_gets_its_words_unchanged(engine: Engine, image: str) -> None:
    ended = engine.run("bash", "-c", "id -u; echo ok; exit 42")
    assert (ended.exit_code, ended.output) == (42, "0\nok\n")


def test_a_run_is_the_user_on_a_volume_of_root(engine: Engine, image: str, volume: str) -> None:
    engine.shell(volume, f"chown 0:0 {MOUNT} && chmod 755 {MOUNT}")
    container = engine.start(*TOY, **OFFLINE, **mounted(volume))
    wait_for_step(container, "base_train", 1)
    processes = container.top(ps_args="-eo pid,uid,args")["Processes"]
    ours = [words for words in processes if "nanochat" in words[2] and "tini" not in words[2]]
    assert len(ours) >= 2
    assert {uid for _, uid, _ in ours} == {"1000"}, processes
    code, said = container.exec_run(["python3", "-P", "-m", "infra.image.health"])
    assert (code, said.startswith(f"{RUN}: base_train".encode())) == (0, True), said
    container.stop()
    assert engine.wait(container).exit_code == 75
    owners = engine.shell(volume, f"find {MOUNT} -mindepth 1 -printf '%U\\n' | sort -u")
    assert owners.split() == ["1000"]


def test_ssh_past_the_entry_point_drops_root_too(engine: Engine, image: str, volume: str) -> None:
    script = """
    mkdir -p /run/sshd ~/.ssh && cd /etc/ssh && ssh-keygen -A >/dev/null && service ssh restart
    ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && cp ~/.ssh/id_ed25519.pub \
      ~/.ssh/authorized_keys
    ssh -o StrictHostKeyChecking=no localhost 'id -u; nanochat doctor --json >/dev/null'
    stat -c %u /workspace/nanochat/home
    """
    ended = engine.run("bash", "-c", script, network_mode="none", **mounted(volume))
    assert ended.output.splitlines()[-2:] == ["0", "1000"], ended.output


# -- stops and kills


def test_docker_stop_saves_and_the_next_run_ends_with_the_same_bits(
    engine: Engine, finished: tuple[str, Ended], volume: str
) -> None:
    container = engine.start(*TOY, **OFFLINE, **mounted(volume))
    wait_for_step(container, "base_train", 15)
    reached = last_step(container, "base_train")
    started = time.monotonic()
    container.stop(timeout=10)
    assert time.monotonic() - started < 10.0
    ended = engine.wait(container)
    assert ended.exit_code == 75, ended.output
    script = f"cd {RUN}/checkpoints/base_train && cat latest && ls $(cat latest)/manifest.json"
    latest, _ = engine.shell(volume, script).split()
    assert int(latest.removeprefix("step_")) >= reached, "saved when it was stopped, not before"
    again = engine.run(*TOY, **OFFLINE, **mounted(volume))
    assert again.exit_code == 0, again.output
    assert weights(engine, volume) == weights(engine, finished[0])


def test_docker_kill_loses_at_most_an_interval(
    engine: Engine, finished: tuple[str, Ended], volume: str
) -> None:
    often = "budget.checkpoint_every_s=1.0"
    container = engine.start(*TOY, often, **OFFLINE, **mounted(volume))
    latest = f"{RUN}/checkpoints/base_train/latest"
    wait_until(lambda: "step_" in shown(container, latest), START_S, "a first checkpoint")
    wait_for_step(container, "base_train", 30)
    container.kill()
    assert engine.wait(container).exit_code == 137
    script = f"cd {RUN} && stat -c %Y metrics.jsonl checkpoints/base_train/latest"
    logged_s, saved_s = map(int, engine.shell(volume, script).split())
    assert logged_s - saved_s <= 5
    again = engine.run(*TOY, often, **OFFLINE, **mounted(volume))
    assert again.exit_code == 0, again.output
    assert weights(engine, volume) == weights(engine, finished[0])


@pytest.mark.long
def test_out_of_memory_is_said_and_more_memory_resumes(
    engine: Engine, image: str, volume: str
) -> None:
    run = (*TOY, "runtime.max_restarts=1")
    container = engine.start(*run, **OFFLINE, **mounted(volume))
    wait_for_step(container, "base_train", 5)
    container.stop()
    assert engine.wait(container).exit_code == 75
    # A new run would be refused: the plan sees the limit.
    ended = engine.run(*run, mem_limit="200m", memswap_limit="200m", **OFFLINE, **mounted(volume))
    assert ended.attrs["State"]["OOMKilled"]
    code, message = how_it_ended(ended.attrs)
    assert (code, "out of memory at its limit of 0.2 GiB" in message) == (77, True), ended.output
    again = engine.run(*run, **OFFLINE, **mounted(volume))
    assert again.exit_code == 0, again.output


# -- volumes


def test_a_read_only_volume_is_refused_with_the_fix(
    engine: Engine, finished: tuple[str, Ended]
) -> None:
    ended = engine.run(*TOY, **OFFLINE, **mounted(finished[0], "ro"))
    assert ended.exit_code == 78, ended.output
    assert "cannot be written" in ended.output


def test_a_volume_that_fills_up_keeps_the_last_complete_checkpoint(
    engine: Engine, image: str, short: Path
) -> None:
    small = {"type": "tmpfs", "device": "tmpfs", "o": "size=64m"}
    with engine.volume(driver="local", driver_opts=small) as volume:
        holder = engine.start("sleep", "infinity", **mounted(volume))
        run = (*SHORT, "checkpoint.free_floor_gib=0.0", "budget.checkpoint_every_s=1.0", LONGER)
        container = engine.start(*run, **OFFLINE, **mounted(volume, short=short))
        latest = f"{RUN}/checkpoints/base_train/latest"
        wait_until(lambda: "step_" in shown(container, latest), START_S, "a first checkpoint")
        holder.exec_run(["bash", "-c", f"head -c 64M /dev/zero > {MOUNT}/filler"])
        ended = engine.wait(container)
        assert ended.exit_code == 78, ended.output
        # The supervisor finds it full, or what a failed save gives back is no room for the next.
        told = r"is full; the last complete checkpoint is kept|no space for .* is complete and kept"
        assert re.search(told, ended.output), ended.output
        holder.exec_run(["rm", f"{MOUNT}/filler"])
        again = engine.run(*run, **OFFLINE, **mounted(volume, short=short))
        assert again.exit_code == 0, again.output


@pytest.fixture
def disk(engine: Engine, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A volume on a disk of its own, and that disk."""
    image = tmp_path / "disk.img"
    subprocess.run(["truncate", "--size=256M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    attach = ["losetup", "--find", "--show", image]
    loop = Path(subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip())
    options = {"type": "ext4", "device": str(loop), "o": "errors=remount-ro"}
    try:
        with engine.volume(driver="local", driver_opts=options) as volume:
            yield volume, loop
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.mark.long
def test_a_volume_that_turns_read_only_is_told_and_mended_the_run_goes_on(
    engine: Engine, image: str, disk: tuple[str, Path], short: Path
) -> None:
    """As Linux does with a disk that has an error."""
    volume, loop = disk
    run = (*SHORT, "budget.checkpoint_every_s=1.0", "checkpoint.free_floor_gib=0.0", LONGER)
    container = engine.start(*run, **OFFLINE, **mounted(volume, short=short))
    latest = f"{RUN}/checkpoints/base_train/latest"
    wait_until(lambda: "step_" in shown(container, latest), START_S, "a first checkpoint")
    Path(f"/sys/fs/ext4/{loop.name}/trigger_fs_error").write_text("a test")
    ended = engine.wait(container)
    assert ended.exit_code == 78, ended.output
    assert "has become read-only; the last complete checkpoint is kept" in ended.output
    engine.remove(container)  # which unmounts the disk
    subprocess.run(["e2fsck", "-p", loop], stdout=subprocess.DEVNULL)
    assert engine.shell(volume, f"ls {RUN}/checkpoints/base_train/*/manifest.json")
    again = engine.run(*run, **OFFLINE, **mounted(volume, short=short))
    assert again.exit_code == 0, again.output


def test_a_volume_that_vanishes_is_told_and_where_it_is_back_the_run_goes_on(
    engine: Engine, image: str, volume: str, short: Path
) -> None:
    """As with a network file system: its mount goes, and what is open there stays open."""
    run = (*SHORT, "budget.checkpoint_every_s=1.0", LONGER)
    container = engine.start(*run, **OFFLINE, **mounted(volume, short=short))
    latest = f"{RUN}/checkpoints/base_train/latest"
    wait_until(lambda: "step_" in shown(container, latest), START_S, "a first checkpoint")
    unmount = ("nsenter", "--target", "1", "--mount", "umount", "--lazy", MOUNT)
    unmounted = engine.run(
        *unmount,
        pid_mode=f"container:{container.id}",
        cap_add=["SYS_ADMIN", "SYS_PTRACE"],
        security_opt=["seccomp=unconfined", "apparmor=unconfined"],
    )
    assert unmounted.exit_code == 0, unmounted.output
    ended = engine.wait(container)
    assert ended.exit_code == 77, ended.output
    assert f"the volume of {RUN} is gone" in ended.output
    assert engine.shell(volume, f"ls {RUN}/checkpoints/base_train/$(cat {latest})/manifest.json")
    again = engine.run(*run, **OFFLINE, **mounted(volume, short=short))
    assert again.exit_code == 0, again.output


# -- two at once


def test_a_second_container_on_a_run_is_refused_and_harms_nothing(
    engine: Engine, image: str, volume: str, short: Path
) -> None:
    endless = (*SHORT, "base_train.num_steps=1000000")
    container = engine.start(*endless, **OFFLINE, **mounted(volume, short=short))
    wait_for_step(container, "base_train", 1)
    second = engine.run(*endless, **OFFLINE, **mounted(volume, short=short))
    assert second.exit_code == 78, second.output
    assert "is in use by pid" in second.output and "nanochat stop" in second.output
    container.stop()
    assert engine.wait(container).exit_code == 75


# -- health


def test_docker_sees_whether_the_run_gives_signs_of_life(
    engine: Engine, image: str, volume: str, short: Path
) -> None:
    second = 1_000_000_000
    often = {"interval": second, "timeout": 10 * second, "start_period": second, "retries": 1}
    endless = (*SHORT, "base_train.num_steps=1000000")
    container = engine.start(*endless, healthcheck=often, **OFFLINE, **mounted(volume, short=short))

    def health() -> dict[str, Any]:
        container.reload()
        assert container.status == "running", container.logs().decode()
        return dict(container.attrs["State"]["Health"])

    def is_seen(status: str, said: str) -> bool:
        found = health()
        return found["Status"] == status and said in found["Log"][-1]["Output"]

    wait_for_step(container, "base_train", 1)
    wait_until(lambda: is_seen("healthy", f"{RUN}: base_train, last sign"), 60.0, "healthy")
    supervisor = json.loads(shown(container, f"{RUN}/status.json"))["pid"]
    # It stands still, and as if for long.
    old = f"""sed -i 's/"heartbeat": [0-9.]*/"heartbeat": 1.0/' {RUN}/status.json"""
    hang = f"kill -STOP {supervisor} && {old} && grep '\"heartbeat\": 1.0' {RUN}/status.json"
    code, output = container.exec_run(["bash", "-c", hang])
    assert code == 0, output
    wait_until(lambda: is_seen("unhealthy", "no sign of life"), 60.0, "unhealthy")


# -- the launcher


def test_launch_streams_the_log_and_ctrl_c_stops_with_a_checkpoint(
    image: str, volume: str, short: Path, request: pytest.FixtureRequest
) -> None:
    name = f"launch-{volume[:12]}"
    launch = ["launch", f"@{short}", f'name="{name}"', "--to", "docker"]
    options = ["--volume", volume, "--image", image, "--no-network"]
    command = [sys.executable, "entrypoint.py"]
    process = subprocess.Popen(
        [*command, *launch, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    request.addfinalizer(process.kill)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "base_train start" in line:
            break
    process.send_signal(signal.SIGINT)
    seen += process.stderr.readlines()
    process.stderr.close()
    assert process.wait(60) == 75, "".join(seen)
    assert "stopping with a checkpoint" in "".join(seen)
    status = subprocess.run(
        [*command, "status", name, "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert status.returncode == 75, status.stderr
    assert json.loads(status.stdout)["exit_code"] == 75
    again = subprocess.run(
        [*command, *launch, *options], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    assert "report" in again.stderr


# -- start


def test_help_is_quick(engine: Engine, image: str) -> None:
    def seconds(*command: str) -> float:
        started = time.monotonic()
        assert engine.run(*command).exit_code == 0
        return time.monotonic() - started

    # The best of some: others use this machine too.
    assert min(seconds("--help") for _ in range(5)) < 1.5


def test_a_signal_before_the_run_has_started_ends_it(engine: Engine, image: str) -> None:
    container = engine.start("sleep", "1000")
    started = time.monotonic()
    container.kill(signal.SIGTERM)
    assert engine.wait(container, 30.0).exit_code == 143
    assert time.monotonic() - started < 5.0
