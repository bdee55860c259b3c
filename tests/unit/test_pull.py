"""`pull` brings whole, verified weights and nothing of the optimizer, also over a broken line."""

import argparse
from pathlib import Path

import pytest

from infra import cloud
from infra import pull as pulling
from infra.pull import Folder, Host, open_source, pull
from nanochat.checkpoint_dir import CheckpointDir, DamagedCheckpoint, Manifest, utc_now
from nanochat.rundir import RunDir, RunDirError

FILES = {
    "model-0.bin": b"weights" * 1000,
    "optim-0.bin": b"momentum" * 1000,
    "state.json": b"{}",
}


def save(run: RunDir, stage: str, step: int, val_bpb: float | None) -> None:
    checkpoints = CheckpointDir(run.checkpoints_dir(stage))
    checkpoints.path.mkdir(parents=True, exist_ok=True)
    checkpoints.stage(step)
    folder = checkpoints.staged(step)
    content = {name: data + str(step).encode() for name, data in FILES.items()}
    content["state.json"] = b"{}"
    files = {n: checkpoints.storage.write_new(folder / n, data) for n, data in content.items()}
    metrics = {} if val_bpb is None else {"val_bpb": val_bpb}
    checkpoints.commit(Manifest(step, "full", 1, None, files, utc_now(), metrics))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    (made.path / "spec.json").write_text('{"name": "t"}')
    (made.path / "tokenizer").mkdir(exist_ok=True)
    (made.path / "tokenizer" / "tokenizer.json").write_text("{}")
    save(made, "base_train", 10, 0.5)
    save(made, "mid_train", 20, 1.0)
    save(made, "mid_train", 30, 1.2)
    return made


@pytest.fixture
def over_a_shell(run: RunDir) -> Host:
    """As over ssh: a command that runs a script somewhere else."""
    return Host(["sh", "-c"], str(run.path))


def quiet(_: str) -> None: ...


@pytest.mark.parametrize(("best", "step"), [(True, 20), (False, 30)])
@pytest.mark.parametrize("remote", [True, False], ids=["ssh", "folder"])
def test_the_last_stage_s_weights_come_without_the_optimizer(
    run: RunDir, over_a_shell: Host, tmp_path: Path, best: bool, step: int, remote: bool
) -> None:
    to = tmp_path / "to"
    pulled = pull(over_a_shell if remote else Folder(run.path), to, best, quiet)
    assert (pulled.stage, pulled.step) == ("mid_train", step)
    folder = to / "checkpoints" / "mid_train" / f"step_{step:06d}"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "model-0.bin",
        "state.json",
    ]
    manifest = Manifest.read(folder)
    assert manifest.kind == "weights"
    manifest.check(folder, manifest.files, sha256=True)
    assert (to / "tokenizer" / "tokenizer.json").exists()
    assert [p.name for p in (to / "checkpoints").iterdir()] == ["mid_train"]
    assert (folder.parent / "best").read_text().strip() == folder.name


def test_a_broken_line_goes_on_where_it_stopped(over_a_shell: Host, tmp_path: Path) -> None:
    folder = tmp_path / "to" / "checkpoints" / "mid_train" / "step_000020"
    folder.mkdir(parents=True)
    (folder / "model-0.bin").write_bytes(FILES["model-0.bin"][:3000])
    asked: list[str] = []
    over_a_shell.command = ["sh", "-c", f'echo "$0" >> {tmp_path}/asked; eval "$0"']
    pull(over_a_shell, tmp_path / "to", True, quiet)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert any(line.startswith("tail -c +3001 ") for line in asked)


def test_a_part_of_another_file_is_noticed_and_brought_anew(
    over_a_shell: Host, tmp_path: Path
) -> None:
    folder = tmp_path / "to" / "checkpoints" / "mid_train" / "step_000020"
    folder.mkdir(parents=True)
    (folder / "model-0.bin").write_bytes(b"x" * 3000)
    pull(over_a_shell, tmp_path / "to", True, quiet)
    assert (folder / "model-0.bin").read_bytes() == FILES["model-0.bin"] + b"20"


def test_weights_that_are_damaged_at_the_source_are_no_model(run: RunDir, tmp_path: Path) -> None:
    weights = run.checkpoints_dir("mid_train") / "step_000020" / "model-0.bin"
    weights.write_bytes(b"y" * weights.stat().st_size)
    with pytest.raises(DamagedCheckpoint, match="model-0.bin"):
        pull(Folder(run.path), tmp_path / "to", True, quiet)
    assert not list((tmp_path / "to").rglob("manifest.json"))


def test_a_run_without_a_checkpoint_and_a_host_that_refuses_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirError, match="no complete checkpoint yet"):
        pull(Folder(tmp_path / "empty"), tmp_path / "to", True, quiet)
    with pytest.raises(RunDirError, match="no route"):
        Host(["sh", "-c", "echo no route >&2; exit 255"], "/x").files("checkpoints")
    with pytest.raises(RunDirError, match="does not come through"):
        Host(["false"], "/x").copy("a", tmp_path / "a")


def test_hosts_are_told_from_names() -> None:
    host = open_source("root@10.0.0.1:22022:/workspace/nanochat/runs/d20/")
    assert isinstance(host, Host)
    assert host.command[-3:] == ["-p", "22022", "root@10.0.0.1"]
    assert host.path == "/workspace/nanochat/runs/d20"
    assert pulling._shell_path("~/a b") == "~/'a b'"
    with pytest.raises(RunDirError):
        open_source("no-such-run")


def test_a_run_is_not_pulled_onto_itself(run: RunDir) -> None:
    before = sorted(p for p in run.path.rglob("*") if p.is_file())
    with pytest.raises(RunDirError, match="is the run itself"):
        pull(Folder(run.path), run.path / ".." / "run", best=True, say=quiet)
    assert sorted(p for p in run.path.rglob("*") if p.is_file()) == before
    manifests = list(run.path.rglob("manifest.json"))
    assert manifests and all(Manifest.read(file.parent) for file in manifests)


def test_an_older_pull_in_the_folder_does_not_hide_the_pod(
    run: RunDir, over_a_shell: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pull d20 --best --to d20`, given again for newer weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cloud, "connect", lambda: None)
    monkeypatch.setattr(cloud.sky_cluster, "files_of", lambda name: over_a_shell)
    args = argparse.Namespace(run_dir="d20", to="d20", best=False)
    assert cloud.pull_verb(args).step == 30
    save(run, "mid_train", 40, 0.9)
    assert cloud.pull_verb(args).step == 40
    monkeypatch.setattr(cloud.sky_cluster, "files_of", lambda name: None)
    with pytest.raises(RunDirError, match="is the run itself"):
        cloud.pull_verb(args)
    assert Manifest.read(tmp_path / "d20/checkpoints/mid_train/step_000040").step == 40
