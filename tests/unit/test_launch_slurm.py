"""The SLURM launcher: its script against golden files, shellcheck, and stand-ins for SLURM's
commands; tests/e2e/test_slurm.py has the real ones."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import entrypoint
from infra import planner, verbs
from infra.hardware import parse_offer
from infra.launch import slurm
from infra.launch.base import Job, LaunchError
from infra.layout import make_layout
from infra.memory import step_memory
from nanochat.rundir import RunDir
from nanochat.scaling import gpt_config
from nanochat.spec import Slurm, SpecError, load_spec

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOY = """\
name = "toy"            # it's "quoted" $HOME `id`
stop_grace_s = 8.0
[model]
depth = 2
vocab_size = 512
[runtime]
device = "cpu"
num_ranks = 2
[base_train]
num_steps = 5
total_batch_size = 4096
"""
GPU_PLAN = {"usd_per_hour": 0.0, "hours": 8.0, "world_size": 8, "offer": "8xA100-40GB"}
CPU_PLAN = {"usd_per_hour": 0.0, "hours": 0.1, "world_size": 1, "offer": "cpu"}


def job(
    folder: Path, fields: dict[str, Any], *overrides: str, plan: dict[str, Any] = CPU_PLAN
) -> Job:
    config = folder / "toy.toml"
    config.write_text(TOY)
    spec = slurm.with_fields(load_spec(config, list(overrides)), fields)
    return Job(config=str(config), overrides=overrides, spec=spec, plan=plan)


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


# -- the batch shell, with stand-ins for SLURM's commands and Apptainer


@dataclass
class Shell:
    """Runs a script as slurmd would. Every stand-in notes its arguments in `calls`."""

    folder: Path
    script: Path
    env: dict[str, str]

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.script, *args],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def comment(self) -> str:
        return [c for c in self.calls() if "Comment=" in c][-1].partition("Comment=")[2]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    scratch = tmp_path / "scratch"
    tools = tmp_path / "bin"
    for folder in (scratch, tools):
        folder.mkdir()
    (scratch / "nanochat.sif").write_text("")
    note = f'#!/bin/bash\necho "$(basename "$0") $*" >> {tmp_path}/calls\n'
    stand_ins = {
        # what it is told to end with, perhaps only when it is told to stop
        "apptainer": "[ -z \"${WAIT:-}\" ] || { trap 'exit ${STOPPED_BY:-75}' TERM; touch $READY; "
        'for i in $(seq 300); do sleep 0.1; done; }\nexit "${CODE:-0}"\n',
        # like SLURM, it ends the shell that asks, and whatever that has started
        "scontrol": 'case "$1" in '
        'requeue) kill -TERM $PPID; kill -TERM $$; exit "${NO_REQUEUE:-0}" ;; '
        'show) echo "JobState=${STATE:-RUNNING}" ;; esac\n',
        "sbatch": "echo 1001\n",
    }
    for name, body in stand_ins.items():
        (tools / name).write_text(note + body)
        (tools / name).chmod(0o755)
    made = job(tmp_path, {"scratch": str(scratch), "max_jobs": 4})
    script = tmp_path / "job.sbatch"
    script.write_text(slurm.render(made, "student").text)
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1000",
        "SLURM_JOB_NODELIST": "c1",
        "READY": str(tmp_path / "ready"),
    }
    return Shell(tmp_path, script, env)


@pytest.mark.parametrize("code", [0, 70, 75, 76, 78, 1, 255])
def test_an_end_that_is_no_wall_time_ends_the_chain(shell: Shell, code: int) -> None:
    ended = shell.run(CODE=str(code))
    assert ended.returncode == code, ended.stderr
    assert not any(call.startswith(("sbatch", "scontrol requeue")) for call in shell.calls())
    assert shell.comment().startswith(f"exit {code}: ")
    assert "launch it again" in shell.comment() or code != 75


def test_the_container_sees_scratch_and_nothing_else(shell: Shell) -> None:
    shell.run(WANDB_API_KEY="secret")
    (call,) = [c for c in shell.calls() if c.startswith("apptainer")]
    scratch = shell.folder / "scratch"
    assert "apptainer --quiet exec --containall --no-home" in call
    assert call.count("--bind") == 1 and f"--bind {scratch} " in call
    assert "NANOCHAT_OFFLINE=1" in call and "secret" not in call
    assert f"nanochat run @{scratch}/nanochat/launched/toy.toml" in call


def test_the_spec_arrives_unchanged(shell: Shell) -> None:
    copier = shell.folder / "bin" / "apptainer"
    copier.write_text(
        f"#!/bin/bash\ncp {shell.folder}/scratch/nanochat/launched/*.toml {shell.folder}/got\n"
    )
    assert shell.run().returncode == 0
    assert (shell.folder / "got").read_text() == TOY


@pytest.mark.parametrize(("code", "stays"), [("0", False), ("75", False), ("78", True)])
def test_a_refused_spec_stays_for_the_command_that_names_it(
    shell: Shell, code: str, stays: bool
) -> None:
    shell.run(CODE=code)
    home = shell.folder / "scratch" / "nanochat"
    assert (home / "launched" / "toy.toml").exists() == stays


def test_a_spec_of_the_user_s_own_in_the_home_is_left_alone(shell: Shell) -> None:
    own = shell.folder / "scratch" / "nanochat" / "toy.toml"
    own.parent.mkdir()
    own.write_text("mine")
    assert shell.run().returncode == 0
    assert own.read_text() == "mine"


def signalled(shell: Shell, signum: int, *args: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a job that gets a signal once its container runs."""
    process = subprocess.Popen(
        ["bash", shell.script, *args],
        env=shell.env | env | {"WAIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (shell.folder / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_slurms_signal_requeues_the_job(shell: Shell) -> None:
    code, output = signalled(shell, signal.SIGUSR2)
    assert code == 75, output
    assert "scontrol requeue 1000" in shell.calls()


def test_where_requeueing_is_refused_the_next_job_is_submitted(shell: Shell) -> None:
    code, output = signalled(shell, signal.SIGUSR2, "1", "c7", NO_REQUEUE="1")
    assert (code, "goes on in job 1001" in output) == (75, True), output
    (call,) = [c for c in shell.calls() if c.startswith("sbatch")]
    assert call == f"sbatch --parsable --exclude=c7 {shell.script} 2 c7 0"


@pytest.mark.parametrize(("before", "restarts"), [("0", "3"), ("3", "0"), ("1", "2")])
def test_a_chain_ends_at_its_bound(shell: Shell, before: str, restarts: str) -> None:
    code, _ = signalled(shell, signal.SIGUSR2, before, SLURM_RESTART_COUNT=restarts)
    assert code == 75
    assert "4 jobs were not enough" in shell.comment()
    assert not any(call.startswith(("sbatch", "scontrol requeue")) for call in shell.calls())


def test_a_job_beyond_the_bound_does_not_begin(shell: Shell) -> None:
    """SLURM requeues by itself, and without asking, where nodes die."""
    assert shell.run("1", SLURM_RESTART_COUNT="3").returncode == 75
    assert "4 jobs were not enough" in shell.comment()
    assert not any(call.startswith("apptainer") for call in shell.calls())


def test_a_signal_before_the_run_listens_loses_no_job(shell: Shell) -> None:
    """Apptainer, or Python before its handlers, ends by a TERM: 143, and nothing was begun."""
    code, output = signalled(shell, signal.SIGUSR2, STOPPED_BY="143")
    assert code == 75, output
    assert "scontrol requeue 1000" in shell.calls()


@pytest.mark.parametrize("stopped_by", ["75", "135", "137"])
def test_scancel_ends_the_chain(shell: Shell, stopped_by: str) -> None:
    """135: the SIF's mount was ended under the run, 137: the run was killed."""
    code, _ = signalled(shell, signal.SIGTERM, STOPPED_BY=stopped_by)
    assert code == 75
    assert ("last complete" in shell.comment()) == (stopped_by != "75")
    assert "TERM" in shell.comment() and "launch it again" in shell.comment()
    assert not any(call.startswith(("sbatch", "scontrol requeue")) for call in shell.calls())


def test_a_job_cancelled_after_slurms_signal_is_not_requeued(shell: Shell) -> None:
    signalled(shell, signal.SIGUSR2, STATE="CANCELLED")
    assert "cancelled" in shell.comment()
    assert "scontrol requeue 1000" not in shell.calls()


@pytest.mark.parametrize("nodes", ["c1", "c[1-2]", "c[1,3]"])
def test_unfit_nodes_are_avoided_at_most_twice(shell: Shell, nodes: str) -> None:
    """However SLURM writes them: c[1,3] is one job's nodes, and so is c[1-2]."""
    args = ["0", "", "0"]
    for jobs in (1, 2):
        ended = shell.run(*args, CODE="77", SLURM_JOB_NODELIST=nodes)
        assert ended.returncode == 77, ended.stderr
        last = [c for c in shell.calls() if c.startswith("sbatch")][-1]
        excluded = f"{args[1]},{nodes}" if args[1] else nodes
        args = [str(jobs), excluded, str(jobs)]
        assert last == f"sbatch --parsable --exclude={excluded} {shell.script} {' '.join(args)}"
    submitted = sum(c.startswith("sbatch") for c in shell.calls())
    assert shell.run(*args, CODE="77", SLURM_JOB_NODELIST=nodes).returncode == 77
    assert sum(c.startswith("sbatch") for c in shell.calls()) == submitted
    assert f"unfit on {nodes} too" in shell.comment()


@pytest.mark.parametrize(
    ("missing", "said"), [("nanochat.sif", "build_sif.sh docker://HOST/NAME"), ("", "not a folder")]
)
def test_what_is_missing_on_the_node_is_named(shell: Shell, missing: str, said: str) -> None:
    target = shell.folder / "scratch" / missing
    target.rename(shell.folder / "away")
    assert shell.run().returncode == 78
    assert said in shell.comment()


def test_the_comment_has_the_reason_that_the_run_gave(shell: Shell) -> None:
    log = shell.folder / "scratch" / "nanochat-toy-1000.out"
    log.write_text("nanochat run: data: base_train needs shard 7\nnanochat job 1000 (1): x\n")
    shell.run(CODE="78")
    assert shell.comment() == "exit 78: nanochat run: data: base_train needs shard 7"
    events = (shell.folder / "scratch/nanochat/runs/toy/slurm.jsonl").read_text().splitlines()
    assert [json.loads(e)["event"] for e in events] == ["start", "end"]
    run = RunDir(shell.folder / "scratch/nanochat/runs/toy")
    chain = slurm.chain(run)
    assert chain is not None and (chain["jobs"], chain["last"]) == (1, "end")


def test_what_srun_says_at_the_end_is_not_the_reason(shell: Shell) -> None:
    log = shell.folder / "scratch" / "nanochat-toy-1000.out"
    log.write_text(
        "base_train failed: the loss is NaN at step 12\n"
        "srun: forcing job termination\n"
        "slurmstepd: error: *** STEP 1000.0 ON c2 CANCELLED ***\n"
    )
    assert shell.run(CODE="70").returncode == 70
    assert shell.comment() == (
        "exit 70: the training failed: base_train failed: the loss is NaN at step 12"
    )


def test_status_knows_why_a_chain_ended_after_the_run_s_own_last_word(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second job was refused: what the first one has left in status.json is not the end."""
    home = shell.folder / "scratch" / "nanochat"
    run = RunDir(home / "runs" / "toy")
    run.create()
    run.spec_file.write_text("{}")
    stopped = {"name": "toy", "state": "STOPPED", "exit_code": 75, "heartbeat": 1000.0}
    run.status_file.write_text(json.dumps(stopped | {"message": "stopped with a checkpoint"}))
    (shell.folder / "scratch" / "nanochat.sif").unlink()
    assert shell.run("1").returncode == 78
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    assert entrypoint.main(["status", "toy", "--json"]) == 78
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["exit_code"]) == ("FAILED", 78)
    assert "ended the chain: there is no image" in told["message"]
    # What went on after that, by hand, has the last word again.
    later = stopped | {"state": "SUCCEEDED", "exit_code": 0, "heartbeat": time.time() + 60}
    run.status_file.write_text(json.dumps(later))
    assert entrypoint.main(["status", "toy"]) == 0


@pytest.mark.parametrize("is_there", [True, False], ids=["by_the_run", "without_a_sif"])
def test_status_knows_why_a_run_never_began(
    shell: Shell,
    is_there: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = 'data: a\tb "c" \\n: nanochat fetch @x \'name="toy"\''
    (shell.folder / "scratch" / "nanochat-toy-1000.out").write_text(f"{why}\n")
    if not is_there:
        (shell.folder / "scratch" / "nanochat.sif").unlink()
        why = "there is no image"
    assert shell.run(CODE="78").returncode == 78
    monkeypatch.setenv("NANOCHAT_HOME", str(shell.folder / "scratch" / "nanochat"))
    assert entrypoint.main(["status", "toy"]) == 78
    assert "has ended with 78: " + why.replace("\t", " ") in capsys.readouterr().out
    assert entrypoint.main(["status", "toy", "--json"]) == 78
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["exit_code"], told["slurm"]["chain"]["job"]) == (
        "FAILED",
        78,
        "1000",
    )
    # Launched again, and seen outside the SIF by nanochat.sh:
    seen = "other|8|RUNNING|c2|x|1:00|;toy|1001|PENDING|Resources, or so|N/A|12:00:00|3"
    monkeypatch.setenv(slurm.SEEN_QUEUE, seen)
    assert entrypoint.main(["status", "toy", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["exit_code"]) == ("PENDING", None)
    (waiting,) = told["slurm"]["queue"]
    assert (waiting["job_id"], waiting["num_ahead"], waiting["start"]) == ("1001", 3, None)


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


def test_so_can_the_command_of_a_stage_that_knows_no_config(tmp_path: Path, shell: Shell) -> None:
    words = ['name="toy"', "base_train.num_steps=7"]
    made = job(tmp_path, {"scratch": str(tmp_path / "scratch")}, *words)
    shell.script.write_text(slurm.render(made, "student").text)
    log = shell.folder / "scratch" / "nanochat-toy-1000.out"
    log.write_text("tok_train: x is missing. Bring it: nanochat fetch @CONFIG\n")
    assert shell.run(CODE="78").returncode == 78
    chain = slurm.chain(RunDir(shell.folder / "scratch/nanochat/runs/toy"))
    assert chain is not None
    _, _, command = chain["reason"].partition("nanochat fetch ")
    config, *overrides = shlex.split(command)
    assert overrides == words
    assert Path(config.removeprefix("@")).read_text() == TOY


def test_over_ssh_only_the_users_own_jobs_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classmate's run of the same name is queued; `student` is who ssh logs in as."""
    tools = {
        "ssh": 'eval "${@: -1}"',
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
    assert "job 1001 is queued" in said.getvalue()
    (tmp_path / "mine").write_text("8|RUNNING|c1|x|1:00|gpu\n")
    with pytest.raises(LaunchError, match="queued already: job 8"):
        slurm.submit(made, said)


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
