"""What a student calls on a login node, nanochat.sh and build_sif.sh, with stand-ins for SLURM's
commands and Apptainer; tests/e2e/test_slurm.py has the real ones."""

import os
import subprocess
from pathlib import Path

import pytest
from slurm_jobs import put_modules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def login_node(tmp_path: Path) -> dict[str, str]:
    """Environment of a login node with stand-ins: two jobs of ours wait behind others or run."""
    tools, scratch = tmp_path / "bin", tmp_path / "scratch"
    for folder in (tools, scratch / "nanochat" / "runs" / "b"):
        folder.mkdir(parents=True)
    (scratch / "nanochat.sif").write_text("")
    waiting = "7|nanochat-a|PENDING|Priority|N/A|1:00|gpu|"
    running = "8|nanochat-b|RUNNING|None|x|1:00|gpu|c1"
    for name, body in {
        "apptainer": 'words="$*"; echo "nanochat ${words##* nanochat }"\n'
        '[[ $words != *--json* ]] || echo "$APPTAINERENV_NANOCHAT_SQUEUE"\n'
        f"[ ! -e {tmp_path}/fails ] || exit 1",
        "id": "echo student",
        "scancel": f'echo "scancel $*"; touch {tmp_path}/cancelled',
        "squeue": f'[ ! -e {tmp_path}/cancelled ] || exit 0\ncase "$*" in '
        f'*name=nanochat-a*i\\|*) echo "{waiting}" ;; *name=nanochat-none*) ;; '
        f'*i\\|*) printf "%s\\n" "{waiting}" "{running}" 9 ;; '
        "*) printf '%s\\n' 3 5 7 ;; esac",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return {"PATH": path, "NANOCHAT_HOME": str(scratch / "nanochat")}


def nanochat_sh(login_node: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "infra" / "slurm" / "nanochat.sh"
    return subprocess.run(["bash", script, *words], env=login_node, capture_output=True, text=True)


def stand_in(login_node: dict[str, str], name: str, body: str) -> None:
    tool = Path(login_node["PATH"].partition(":")[0]) / name
    tool.write_text(f"#!/bin/bash\n{body}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("status", ["a: job 7 PENDING (Priority), 2 jobs ahead", "b: job 8 RUNNING", "nanochat"]),
        ("status a", ["a: job 7 PENDING (Priority), 2 jobs ahead"]),
        ("status --json a", ["nanochat status --json a", "a|7|PENDING|Priority|N/A|1:00|2"]),
        ("stop a", ["scancel --user=student --name=nanochat-a", "cancelled a: job 7"]),
        ("stop none", ["nanochat stop none"]),
        ("plan @configs/smoke.toml", ["nanochat plan @configs/smoke.toml"]),
    ],
)
def test_the_login_nodes_script(login_node: dict[str, str], words: str, said: list[str]) -> None:
    done = nanochat_sh(login_node, *words.split())
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and line != "queue:"]
    assert len(lines) == len(said), done.stdout
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("has_begun", [True, False], ids=["dead_node", "refused"])
def test_a_stop_that_fails_ends_the_chain_all_the_same(
    login_node: dict[str, str], tmp_path: Path, has_begun: bool
) -> None:
    """On a dead node nobody answers; a refused run has no more than slurm.jsonl."""
    run = tmp_path / "scratch" / "nanochat" / "runs" / "a"
    run.mkdir()
    (run / ("spec.json" if has_begun else "slurm.jsonl")).write_text("{}\n")
    (tmp_path / "fails").touch()
    done = nanochat_sh(login_node, "stop", "a")
    assert "scancel --user=student --name=nanochat-a" in done.stdout, done.stderr
    assert done.returncode == (1 if has_begun else 0)
    assert ("nanochat stop a" in done.stdout) == has_begun


def test_a_sif_is_made_beside_a_relative_path(tmp_path: Path) -> None:
    """Apptainer takes its folders from the environment, and changes its own."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "apptainer"
    folders = "$APPTAINER_TMPDIR $APPTAINER_CACHEDIR $TMPDIR"
    tool.write_text(
        f'#!/bin/bash\necho "{folders}" > {tmp_path}/seen\necho made > "${{@: -2:1}}"\n'
    )
    tool.chmod(0o755)
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        ["bash", ROOT / "infra" / "slurm" / "build_sif.sh", "docker://x/y", "../out/my.sif"],
        cwd=tmp_path / "cwd",
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text().split()
    assert all(folder.startswith(f"{tmp_path}/out/.sif.") for folder in seen)
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["my.sif", "my.sif.sha256"]


@pytest.mark.parametrize("words", ["status", "status b", "status --json b"])
def test_a_controller_that_does_not_answer_hides_no_run(
    login_node: dict[str, str], words: str
) -> None:
    stand_in(login_node, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    done = nanochat_sh(login_node, *words.split())
    assert done.returncode == 0 and f"nanochat {words}" in done.stdout
    stopped = nanochat_sh(login_node, "stop", "b")
    assert stopped.returncode == 1 and "scancel --name=nanochat-b" in stopped.stderr


def test_sbatch_gets_the_script_whatever_is_asked_for(
    login_node: dict[str, str], tmp_path: Path
) -> None:
    script, launch = "#SBATCH --job-name=nanochat-c", ("launch", "@c.toml", "--to", "slurm")
    stand_in(login_node, "apptainer", f"[[ $* != *--json* ]] && echo '{script}'")
    stand_in(login_node, "squeue", "exit 0")
    stand_in(login_node, "sbatch", f"cat > {tmp_path}/given; echo 7")
    done = nanochat_sh(login_node, *launch, "--json")
    assert (done.returncode, (tmp_path / "given").read_text()) == (0, f"{script}\n")
    refused = nanochat_sh(login_node, *launch, "--ssh", "me@login")
    assert refused.returncode == 78 and "without --ssh" in refused.stderr


def test_a_full_tmp_and_missing_data_are_not_in_the_way(
    login_node: dict[str, str], tmp_path: Path
) -> None:
    """What bash writes for a here-string lies on scratch; what is missing is named."""
    script = (
        "#!/bin/bash\n# Missing: a.parquet\n#SBATCH --job-name=nanochat-c\n\n# Missing: not this"
    )
    stand_in(login_node, "apptainer", f"echo '{script}'")
    stand_in(login_node, "squeue", "exit 0")
    stand_in(login_node, "sbatch", f"readlink /proc/self/fd/0 > {tmp_path}/read; echo 7")
    login_node["BASH_COMPAT"] = "5.0"
    done = nanochat_sh(login_node, "launch", "@c.toml", "--to", "slurm")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "nanochat.sh: a.parquet\n"
    assert (tmp_path / "read").read_text().startswith(f"{login_node['NANOCHAT_HOME']}/tmp/")


@pytest.mark.parametrize("visible", ["1,3", "GPU-aa", "", None])
def test_the_container_has_the_gpus_of_the_job(
    login_node: dict[str, str], visible: str | None
) -> None:
    seen = "${{{}ENV_CUDA_VISIBLE_DEVICES-unset}}"
    stand_in(
        login_node, "apptainer", f"echo {seen.format('APPTAINER')},{seen.format('SINGULARITY')}"
    )
    if visible is not None:
        login_node["CUDA_VISIBLE_DEVICES"] = visible
    done = nanochat_sh(login_node, "doctor")
    expected = "unset" if visible is None else visible
    assert (done.returncode, done.stdout) == (0, f"{expected},{expected}\n")


@pytest.mark.parametrize(
    ("words", "on_path", "used"),
    [
        ("doctor", "apptainer", "path"),
        ("doctor", "singularity", "apptainer"),
        ("launch @c.toml --to docker --module apptainer/1.4", "apptainer", "apptainer/1.4"),
        ("launch @c.toml --to docker --module=apptainer/1.4", "apptainer", "apptainer/1.4"),
        ("launch @c.toml --to docker --module gone/1", "apptainer", "path"),
        ("build_sif.sh", "apptainer", "path"),
        ("build_sif.sh", "singularity", "apptainer"),
    ],
)
def test_which_apptainer(
    login_node: dict[str, str], tmp_path: Path, words: str, on_path: str, used: str
) -> None:
    builds = '[ "$1" != build ] || : > "${@: -2:1}"\n'
    modules, login_node["BASH_FUNC_module%%"] = put_modules(tmp_path, on_path, builds)
    if words == "build_sif.sh":
        script = ROOT / "infra" / "slurm" / words
        command = ["bash", script, "docker://x/y", tmp_path / "my.sif"]
        done = subprocess.run(command, env=login_node, capture_output=True, text=True)
    else:
        done = nanochat_sh(login_node, *words.split())
    assert done.returncode == 0, done.stderr
    place = tmp_path / "bin" if used == "path" else modules / used
    assert f"used {place}\n" in done.stdout
    assert ("there is no module gone/1" in done.stderr) == ("gone" in words)
