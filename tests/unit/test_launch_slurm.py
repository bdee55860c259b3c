"""The SLURM launcher: its script against golden files and shellcheck, and stand-ins for SLURM's
commands; test_slurm_job.py runs the script, and tests/e2e/test_slurm.py has the real ones."""

import io
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_jobs import CPU_PLAN, GPU_PLAN, job

import entrypoint
from infra import planner, verbs
from infra.hardware import parse_offer
from infra.launch import slurm
from infra.launch.base import Job, LaunchError
from infra.layout import make_layout
from infra.memory import step_memory
from nanochat.scaling import gpt_config
from nanochat.spec import Slurm, SpecError, load_spec

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one_node": ({"scratch": "/scratch/$USER", "partition": "cpu"}, CPU_PLAN),
    "two_nodes": (
        {
            "scratch": "/scratch/$USER",
            "sif": "/shared/nanochat.sif",
            "account": "class-101",
            "partition": "gpu-a100",
            "qos": "normal",
            "gres": "gpu:a100:4",
            "time": "0-12:00:00",
            "nodes": 2,
            "requeue": False,
            "max_jobs": 6,
            "memory_gib": 400,
            "module": "apptainer/1.4",
        },
        GPU_PLAN,
    ),
}


PTOLEMY = "ptolemy_d20"


def rendered(case: str, folder: Path) -> str:
    if case == PTOLEMY:
        config = ROOT / "configs" / f"{PTOLEMY}.toml"
        fields = {"scratch": "/scratch/$USER", "account": "class", "partition": "gpu-a100"}
        spec = slurm.with_fields(load_spec(config, []), fields)
        made = Job(config=str(config), overrides=(), spec=spec, plan=GPU_PLAN)
        folder = ROOT
    else:
        fields, plan = CASES[case]
        made = job(folder, fields, "base_train.num_steps=7", 'name="it-is"', plan=plan)
    text = slurm.render(made, "student").dry_run()
    version = slurm.importlib.metadata.version("nanochat-kit")
    return text.replace(version, "VERSION").replace(str(folder), "/folder") + "\n"


@pytest.mark.parametrize("case", [*CASES, PTOLEMY])
def test_the_script_is_the_golden_one(case: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"slurm_{case}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered(case, tmp_path))
    assert rendered(case, tmp_path) == golden.read_text()


@pytest.mark.parametrize("case", [*CASES, PTOLEMY])
def test_the_script_passes_shellcheck(case: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "CI installs shellcheck"
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(case, tmp_path))
    scripts = [script, *(ROOT / "infra" / "slurm").glob("*.sh")]
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_gpu_node_is_asked_for_whole(tmp_path: Path) -> None:
    lines = rendered(PTOLEMY, tmp_path).splitlines()
    wanted = ["gres=gpu:8", "cpus-per-task=64", "mem=0", "time=12:00:00", "signal=B:USR2@150"]
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    assert any(line.startswith("container=(") and " --nv " in line for line in lines)


def test_a_memory_of_the_command_line_is_sbatchs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "@configs/e2e.toml", "--to", "slurm", "--scratch", "/s", "--dry-run"]
    assert entrypoint.main([*words, "--memory-gib", "16"]) == 0
    assert "#SBATCH --mem=16G\n" in capsys.readouterr().out
    assert entrypoint.main([*words, "--memory-gib", "1.5"]) == 78
    assert "memory_gib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "slurm.scratch"),
        ({"scratch": "/s/$HOME"}, r"only \$USER"),
        ({"scratch": "/s/$USER", "signal_s": 150}, "no shell would leave alone"),
        ({"scratch": "/s", "signal_s": 31}, "stop_grace_s"),
        ({"scratch": "/s", "time": "2"}, "not longer than"),
        ({"scratch": "/s", "nodes": 3}, "num_ranks"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    user = "a b; touch x" if "$USER" in str(fields) else "student"
    with pytest.raises(LaunchError, match=said):
        slurm.render(job(tmp_path, fields), user)


@pytest.mark.parametrize(
    "fields",
    [
        {"account": "x\n#SBATCH --uid=0"},
        {"partition": "a b"},
        {"scratch": "/s; rm -rf /"},
        {"scratch": "relative"},
        {"time": "soon"},
        {"ssh": "-oProxyCommand=id"},
    ],
)
def test_a_field_cannot_smuggle_anything_in(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=next(iter(fields))):
        job(tmp_path, fields)


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_sbatchs_times(d: int, h: int, m: int, s: int) -> None:
    assert slurm.seconds(f"{d}-{h:02}:{m:02}:{s:02}") == ((d * 24 + h) * 60 + m) * 60 + s
    assert slurm.seconds(f"{h}:{m:02}:{s:02}") == (h * 60 + m) * 60 + s
    assert slurm.seconds(f"{m}:{s:02}") == m * 60 + s
    assert slurm.seconds(f"{d}-{h:02}") == (d * 24 + h) * 3600
    assert slurm.seconds(str(m)) == m * 60


def test_jobs_that_a_run_takes() -> None:
    cluster = Slurm(time="12:00:00", signal_s=150)
    assert [slurm.num_jobs(h, cluster) for h in (0.1, 8.2, 11.9, 12.0, 23.0, 30.0)] == [
        1, 1, 1, 2, 2, 3,
    ]  # fmt: skip


def test_the_outlook_bounds_the_gpu_hours(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "ptolemy_d20.toml"
    assert entrypoint.main(["plan", f"@{config}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    told = document["slurm"]
    assert told["jobs"] == slurm.num_jobs(document["hours"], load_spec(config, []).slurm) == 1
    assert told["gpu_hours"] == pytest.approx(8 * document["hours"])
    assert told["max_gpu_hours"] == 8 * 24.0  # budget.max_hours, below 6 jobs of 12 h
    jobs_only = slurm.with_fields(load_spec(config, []), {"time": "2:00:00", "max_jobs": 5})
    assert slurm.outlook(jobs_only, document).max_gpu_hours == 8 * 5 * 2.0
    assert slurm.outlook(jobs_only, document).jobs == 5


def test_the_dry_run_of_the_verb_is_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "@configs/e2e.toml", "--to", "slurm", "--scratch", "/scratch", "--dry-run"]
    assert entrypoint.main(words) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert script.rstrip().splitlines()[-1] == "# worst case: $0.00"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_ptolemys_plan_fits_40_gb_where_32_rows_do_not() -> None:
    spec = load_spec(ROOT / "configs" / "ptolemy_d20.toml")
    plan = planner.make_plan(spec, parse_offer(spec.offer)).to_json()
    assert plan["verdict"] == "ok"
    base = plan["stages"][0]
    assert (base["stage"], base["device_batch_size"] < 32) == ("base_train", True)
    assert slurm.num_jobs(plan["hours"], spec.slurm) == 1
    config = gpt_config(spec.model)
    layout = make_layout(spec, parse_offer(spec.offer))
    assert step_memory(config, layout, base["device_batch_size"], parse_offer(spec.offer)).fits
    assert not step_memory(config, layout, 32, parse_offer(spec.offer)).fits


def test_the_command_for_missing_data_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    spec = ["@configs/e2e.toml", 'name="it-is"', 'evaluate.tasks=["copying", "gsm8k"]']
    assert entrypoint.main(["run", *spec]) == 78
    said = capsys.readouterr().err
    _, found, command = said.rpartition("nanochat fetch ")
    assert found, said
    assert shlex.split(command.strip()) == spec
    assert entrypoint.main(["fetch", *shlex.split(command), "--check"]) == 78
    assert "gsm8k/main/test-00000-of-00001.parquet" in "".join(capsys.readouterr())


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch with a SIF; stand-ins for what a login node has and for ssh to it. What sbatch is
    given lies in `given`."""
    for name, body in {
        "ssh": 'eval "${@: -1}"',
        "id": "echo student",
        "squeue": "exit 0",
        "sbatch": f"cat > {tmp_path}/given; echo 1001",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nanochat.sif").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_over_ssh_only_the_users_own_jobs_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classmate's run of the same name is queued; `student` is who ssh logs in as."""
    tools = {
        "ssh": 'echo 9; printf "You have 3 jobs. "; eval "${@: -1}"',  # a banner for everybody
        "id": "echo student",
        "squeue": f'case "$*" in *--user=student*) cat {tmp_path}/mine ;; '
        "*) echo '9|PENDING|(Priority)|N/A|1:00|gpu' ;; esac",
        "sbatch": "echo 1001",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mine").write_text("")
    (tmp_path / "nanochat.sif").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = job(tmp_path, {"scratch": str(tmp_path), "ssh": "student@login"})
    said = io.StringIO()
    assert slurm.submit(made, said) == 0
    assert "job 1001 is queued; on student@login: nanochat status toy" in said.getvalue()
    (tmp_path / "mine").write_text("8|RUNNING|c1|x|1:00|gpu\n")
    with pytest.raises(LaunchError, match="queued already: job 8"):
        slurm.submit(made, said)


@pytest.mark.parametrize("host", [None, "student@login"])
def test_a_text_of_the_user_s_own_is_looked_for_where_the_job_reads_it(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    monkeypatch.chdir(cluster)
    text_file = cluster / "mine.txt"
    words = ['data.source="text"', f'data.path="{text_file}"']
    fields = {"scratch": str(cluster), "ssh": host}
    with pytest.raises(LaunchError, match=f"there is no {text_file} there"):
        slurm.submit(job(cluster, fields, *words), io.StringIO())
    assert not (cluster / "given").exists()
    text_file.write_text("a text")
    assert slurm.submit(job(cluster, fields, *words), io.StringIO()) == 0
    relative = job(cluster, fields, words[0], 'data.path="mine.txt"')
    if host is None:
        assert slurm.submit(relative, io.StringIO()) == 0
        assert f"text_file={text_file}\n" in (cluster / "given").read_text()
    else:
        with pytest.raises(LaunchError, match="relative to a folder of this machine"):
            slurm.submit(relative, io.StringIO())


def test_data_that_are_not_there_yet_are_named_before_the_queue(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a word: the image may have them, and they may come while the job waits."""
    words = ['data.source="fineweb_edu"', "data.num_shards=4"]
    made = job(cluster, {"scratch": str(cluster)}, *words)
    monkeypatch.setenv("NANOCHAT_HOME", str(cluster / "nanochat"))
    said = io.StringIO()
    assert slurm.submit(made, said) == 0
    shard = "fineweb_edu/shard_00000.parquet"
    assert shard in said.getvalue() and "and 2 more" in said.getvalue()
    _, _, command = said.getvalue().partition("nanochat fetch ")
    assert shlex.split(command.partition("\n")[0]) == [f"@{made.config}", *words]
    (line,) = [n for n in (cluster / "given").read_text().splitlines() if shard in n]
    assert line.startswith("# Missing: ")
    # Another home than the job's says nothing of what the job will find.
    monkeypatch.setenv("NANOCHAT_HOME", str(cluster / "other" / "nanochat"))
    assert slurm.submit(made, said := io.StringIO()) == 0
    assert shard not in said.getvalue()


def test_stop_ends_what_waits_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job, or one that has not begun, would go on with a run that was stopped."""
    queue, calls = tmp_path / "queue", tmp_path / "calls"
    queue.write_text("1000|PENDING|(Dependency)|N/A|12:00:00|gpu\n")
    for name, body in {
        "squeue": f'[[ "$*" == *format=%i\\|* ]] && cat {queue} || echo 1000',
        "scancel": f'echo "$*" >> {calls}; : > {queue}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert entrypoint.main(["stop", "only-queued"]) == 0
    assert calls.read_text() == "1000\n"
    assert "cancelled job 1000" in capsys.readouterr().err
    assert entrypoint.main(["stop", "only-queued"]) == 78  # there is none of that name any more
    # A run on a dead node does not answer; its next job goes all the same.
    (tmp_path / "runs" / "dead").mkdir(parents=True)
    (tmp_path / "runs" / "dead" / "spec.json").write_text("{}")
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(verbs, "_stop_here", lambda _: 1)
    queue.write_text("1000|PENDING|(BeginTime)|N/A|12:00:00|gpu\n")
    assert entrypoint.main(["stop", "dead"]) == 1
    assert calls.read_text() == "1000\n1000\n"
