"""The batch shell that the SLURM launcher renders, with stand-ins for SLURM's commands and
Apptainer; tests/e2e/test_slurm.py has the real ones."""

import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_jobs import CPU_PLAN, GPU_PLAN, TOY, job, put_modules

import entrypoint
from infra.launch import slurm
from nanochat.rundir import RunDir


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

    def stand_in(self, name: str, body: str) -> None:
        """Another stand-in for a command, in place of the one that there is."""
        tool = self.folder / "bin" / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(0o755)

    def render(self, *overrides: str, plan: dict[str, Any] = CPU_PLAN, **fields: Any) -> None:
        """Another job in place of the one that there is."""
        at_hand = {"scratch": str(self.folder / "scratch"), "max_jobs": 4}
        made = job(self.folder, at_hand | fields, *overrides, plan=plan)
        self.script.write_text(slurm.render(made, "student").text)

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
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1000",
        "SLURM_JOB_NODELIST": "c1",
        "READY": str(tmp_path / "ready"),
    }
    made = Shell(tmp_path, tmp_path / "job.sbatch", env)
    made.render()
    return made


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


def test_the_next_job_has_what_its_user_chose_and_nothing_of_this_one(shell: Shell) -> None:
    shell.stand_in("sbatch", f"env > {shell.folder}/env; echo 'sbatch: warning: x' >&2; echo '7;c'")
    chosen = {f"SBATCH_{name}": "mine" for name in ("ACCOUNT", "PARTITION", "QOS", "RESERVATION")}
    chosen |= {"SBATCH_CONSTRAINT": "a100", "SLURM_CONF": "/etc/my.conf"}
    own = {"SBATCH_EXCLUDE": "c9", "SLURM_MEM_PER_NODE": "0"}
    code, output = signalled(shell, signal.SIGUSR2, NO_REQUEUE="1", **chosen, **own)
    assert (code, "goes on in job 7 " in output.replace("\n", " ")) == (75, True), output
    passed = dict(
        line.split("=", 1)
        for line in (shell.folder / "env").read_text().splitlines()
        if line.startswith(("SBATCH_", "SLURM_"))
    )
    assert passed == chosen


@pytest.mark.parametrize("code", [75, 77])
def test_why_sbatch_refused_the_next_job_is_told(shell: Shell, code: int) -> None:
    shell.stand_in(
        "sbatch", "printf 'sbatch: error: x\\nsbatch: error: Invalid \"qos\"\\r\\n' >&2; exit 1"
    )
    if code == 75:
        signalled(shell, signal.SIGUSR2, NO_REQUEUE="1")
    else:
        shell.run(CODE="77")
    assert shell.comment().startswith(f"exit {code}: ")
    assert 'Invalid "qos"' in shell.comment()
    chain = slurm.chain(RunDir(shell.folder / "scratch/nanochat/runs/toy"))
    assert chain is not None and 'Invalid "qos"' in chain["reason"]


CUDA = 'runtime.device="cuda"'
NOTE_GPUS = (
    'echo "$APPTAINERENV_CUDA_VISIBLE_DEVICES $SINGULARITYENV_CUDA_VISIBLE_DEVICES $*" >> {seen}\n'
)


@pytest.mark.parametrize("visible", ["2,3", "GPU-aa,GPU-bb", ""])
def test_the_container_has_the_gpus_of_the_job(shell: Shell, visible: str) -> None:
    """Without them it would take those of another job on the node."""
    shell.render(CUDA, plan=GPU_PLAN)
    seen = shell.folder / "seen"
    shell.stand_in("apptainer", NOTE_GPUS.format(seen=seen))
    assert shell.run(CUDA_VISIBLE_DEVICES=visible).returncode == 0
    assert seen.read_text().startswith(f"{visible} {visible} --quiet exec")


def test_each_node_has_its_own_gpus_and_links(shell: Shell) -> None:
    shell.render(CUDA, plan=GPU_PLAN, nodes=2)
    links, seen = shell.folder / "infiniband", shell.folder / "seen"
    links.mkdir()
    text = shell.script.read_text()
    shell.script.write_text(text.replace("/dev/infiniband", str(links)))
    # Another node, on which SLURM has given other GPUs; the first one's run waits for it.
    shell.stand_in(
        "srun",
        'while [[ $1 == --* ]]; do shift; done\nCUDA_VISIBLE_DEVICES=6,7 SLURM_PROCID=0 exec "$@"',
    )
    shell.stand_in(
        "apptainer",
        f"{NOTE_GPUS.format(seen=seen)}"
        f"for i in $(seq 100); do grep -q infra.nodes {seen} && exit 0; sleep 0.1; done",
    )
    assert shell.run(CUDA_VISIBLE_DEVICES="0,1").returncode == 0
    first, other = sorted(seen.read_text().splitlines())
    assert first.startswith("0,1 0,1 ") and "nanochat run" in first
    assert other.startswith("6,7 6,7 ") and "infra.nodes" in other
    assert all(line.count(f"--bind {links} ") == 1 for line in (first, other))
    links.rmdir()
    seen.unlink()
    assert shell.run(CUDA_VISIBLE_DEVICES="0,1").returncode == 0
    assert str(links) not in seen.read_text()


def test_a_full_tmp_of_the_node_is_not_in_the_way(shell: Shell) -> None:
    """What bash writes for a here-document, and reads again, lies on scratch."""
    shell.stand_in("cat", f"readlink /proc/self/fd/0 > {shell.folder}/read; exec /bin/cat")
    assert shell.run(BASH_COMPAT="5.0").returncode == 0
    own = shell.folder / "scratch" / "nanochat" / "tmp"
    assert (shell.folder / "read").read_text().startswith(f"{own}/")
    assert not list(own.iterdir())


def test_a_text_of_the_user_s_own_is_bound_or_named(shell: Shell) -> None:
    text_file = shell.folder / "my $text.txt"
    text_file.write_text("a text")
    shell.render('data.source="text"', f'data.path="{text_file}"')
    assert shell.run().returncode == 0
    (call,) = [c for c in shell.calls() if c.startswith("apptainer")]
    assert f"--bind {text_file}:{text_file}:ro" in call
    text_file.unlink()
    assert shell.run().returncode == 78
    assert f"there is no {text_file} on" in shell.comment()


@pytest.mark.parametrize(
    ("module", "on_path", "used"),
    [
        (None, "apptainer", "path"),
        (None, "singularity", "apptainer"),  # the module of that name, before an old singularity
        ("apptainer/1.4", "apptainer", "apptainer/1.4"),
        ("gone/1", "apptainer", "path"),
    ],
)
def test_a_module_that_is_asked_for_comes_first(
    shell: Shell, module: str | None, on_path: str, used: str
) -> None:
    modules, load = put_modules(shell.folder, on_path)
    shell.render(module=module)
    done = shell.run(**{"BASH_FUNC_module%%": load})
    assert done.returncode == 0, done.stderr
    place = shell.folder / "bin" if used == "path" else modules / used
    assert f"used {place}\n" in done.stdout
    assert ("there is no module gone/1" in done.stdout) == (module == "gone/1")


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


@pytest.mark.parametrize("stopped_by", ["135", "137", "143", "255"])
def test_a_run_that_is_killed_near_its_wall_time_loses_no_job(
    shell: Shell, stopped_by: str
) -> None:
    """135: the SIF's mount was ended under the run, 137: killed, 143: told before it listened, 255:
    Apptainer's own."""
    code, output = signalled(shell, signal.SIGUSR2, STOPPED_BY=stopped_by)
    assert code == 75, output
    assert "scontrol requeue 1000" in shell.calls()
    assert "last complete checkpoint" in shell.comment()
    shell.folder.joinpath("ready").unlink()
    code, _ = signalled(shell, signal.SIGUSR2, "3", STOPPED_BY=stopped_by)
    assert (code, "4 jobs were not enough" in shell.comment()) == (75, True)


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
