"""What would make a run fail here is found before it starts, with the right exit code and a fix."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import hardware, preflight
from infra.hardware import GpuHere
from infra.planner import Plan, make_plan
from nanochat import sandbox
from nanochat.rundir import EXIT_SPEC, EXIT_UNFIT_NODE, Outcome, RunDir
from nanochat.spec import RunSpec, SpecError, load_spec

REPO = Path(__file__).resolve().parents[2]
H100 = GpuHere("NVIDIA H100 80GB HBM3", 79.6, 79.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[GpuHere]:
    """A machine with eight H100, a new driver and room for everything."""
    here = [H100] * 8
    monkeypatch.setattr(hardware, "gpus_here", lambda: here)
    monkeypatch.setattr(hardware, "driver_here", lambda: "580.95.05")
    monkeypatch.setattr(preflight, "cuda_version", lambda: "13.0.48")
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000 * 2**30)
    )
    room = SimpleNamespace(f_frsize=4096, f_bavail=2**22)
    monkeypatch.setattr(preflight.os, "statvfs", lambda _: room)
    monkeypatch.setattr(preflight, "missing_files", lambda _: {})
    return here


def d20(*overrides: str) -> tuple[RunSpec, Plan]:
    spec = load_spec(REPO / "configs/d20.toml", overrides)
    return spec, make_plan(spec, look_further=False)


def messages(spec: RunSpec, plan: Plan, run: RunDir) -> list[tuple[int, str]]:
    return [(p.exit_code, p.message) for p in preflight.preflight(spec, plan, run)]


def test_the_toy_run_can_start_here(home: Path) -> None:
    spec = load_spec(REPO / "configs/e2e.toml")
    assert preflight.preflight(spec, make_plan(spec), RunDir(home / "runs/e2e")) == []


def test_an_environment_without_torch_is_named_before_anything_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight._version
    monkeypatch.setattr(preflight, "_version", lambda p: None if p == "torch" else found(p))
    spec = load_spec(REPO / "configs/e2e.toml")
    [(code, text)] = messages(spec, make_plan(spec), RunDir(home / "runs/e2e"))
    assert code == EXIT_SPEC
    assert f"torch is not installed in {sys.prefix}" in text and "make setup" in text


def test_a_verb_that_needs_a_missing_package_is_refused() -> None:
    preflight.need_packages("torch", "rustbpe")
    with pytest.raises(SpecError, match="no-such-package is not installed in .*; make setup"):
        preflight.need_packages("torch", "no-such-package")


def test_d20_can_start_on_its_machine(home: Path, gpus: list[GpuHere]) -> None:
    spec, plan = d20()
    assert messages(spec, plan, RunDir(home / "runs/d20")) == []


def test_no_gpus_is_an_unfit_node(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpus_here", list)
    [(code, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert code == EXIT_UNFIT_NODE
    assert "8xH100-SXM" in text and 'offer="cpu"' in text


def test_a_smaller_gpu_is_an_unfit_node(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus[3] = GpuHere("NVIDIA H100 80GB HBM3", 79.6, 12.0)
    [(code, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert code == EXIT_UNFIT_NODE
    assert "12.0 GiB free" in text


def test_an_old_driver_is_an_unfit_node(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "driver_here", lambda: "550.54.15")
    [(code, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert code == EXIT_UNFIT_NODE
    assert "580.65.06" in text and "13.0.48" in text
    assert "make image REQUIREMENTS=requirements-cuda12.lock" in text
    assert (REPO / "requirements-cuda12.lock").is_file()
    monkeypatch.setattr(hardware, "driver_here", lambda: "470.82.01")
    [(_, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert "REQUIREMENTS" not in text, "CUDA 12 does not run there either"


def test_an_old_driver_is_told_first_and_its_code_wins(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever brings the data first has it on a machine where nothing can run."""
    monkeypatch.setattr(hardware, "driver_here", lambda: "550.54.15")
    monkeypatch.setattr(preflight, "missing_files", lambda _: {"data_fetch": ["a.parquet"]})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    spec, plan = d20()
    problems = preflight.preflight(spec, plan, RunDir(home / "runs/d20"))
    assert [p.name for p in problems] == ["driver", "data", "volume"]
    assert preflight.exit_code(problems) == EXIT_UNFIT_NODE
    assert preflight.exit_code(problems[1:]) == EXIT_SPEC
    facts = preflight.doctor(spec)
    assert [f.name for f in facts].count("driver") == 1 and facts[0].name == "driver"
    assert preflight.exit_code(facts) == EXIT_UNFIT_NODE


def test_an_old_driver_does_not_matter_to_a_run_on_the_cpu(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "driver_here", lambda: "550.54.15")
    spec = load_spec(REPO / "configs/e2e.toml")
    assert messages(spec, make_plan(spec), RunDir(home / "runs/e2e")) == []


def test_little_shared_memory_is_an_unfit_node(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = SimpleNamespace(f_frsize=4096, f_bavail=2**14)  # Docker's default of 64 MiB
    monkeypatch.setattr(preflight.os, "statvfs", lambda _: docker)
    [(code, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert code == EXIT_UNFIT_NODE
    assert "--shm-size" in text


def test_a_full_volume_is_the_specs_business(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    [(code, text)] = messages(*d20(), RunDir(home / "runs/d20"))
    assert code == EXIT_SPEC
    assert "1.0 GiB free" in text and "keep_last" in text


def test_checkpoints_that_are_there_count_as_space(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    before = preflight.free_gib(run)
    folder = tmp_path / "run/checkpoints/base_train/step_000001"
    folder.mkdir(parents=True)
    with open(folder / "weights", "wb") as f:
        f.truncate(3 * 2**30)  # sparse: takes no space
    assert preflight.free_gib(run) == pytest.approx(before + 3.0, abs=0.5)


def test_missing_data_says_who_reads_it_and_how_to_bring_it(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    overrides = ['data.source="fineweb_edu"', "data.num_shards=4"]
    spec = load_spec(REPO / "configs/e2e.toml", overrides)
    [(code, text)] = messages(spec, make_plan(spec), RunDir(home / "runs/x"))
    assert code == EXIT_SPEC
    assert "data_fetch needs fineweb_edu/shard_00000.parquet" in text
    assert "2 more" in text and "nanochat fetch" in text


def test_without_a_sandbox_humaneval_is_refused_before_the_training(
    home: Path, gpus: list[GpuHere], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "problem", lambda: "darwin has no seccomp")
    overrides = ['evaluate.tasks=["spelling", "humaneval"]']
    spec = load_spec(REPO / "configs/e2e.toml", overrides)
    found = messages(spec, make_plan(spec), RunDir(home / "runs/x"))
    ((code, text),) = [m for m in found if "sandbox" in m[1]]
    assert code == EXIT_SPEC and "darwin has no seccomp" in text
    assert "'evaluate.tasks=[\"spelling\"]'" in text


def test_a_missing_text_file_names_data_path(home: Path) -> None:
    overrides = ['data.source="text"', 'data.path="/nowhere/combined_output.txt"']
    spec = load_spec(REPO / "configs/e2e.toml", overrides)
    [(code, text)] = messages(spec, make_plan(spec), RunDir(home / "runs/x"))
    assert code == EXIT_SPEC
    assert "/nowhere/combined_output.txt" in text and "data.path" in text


def test_data_of_finished_stages_is_not_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(REPO / "configs/e2e.toml")
    run = RunDir(home / "runs/x")
    run.create()
    monkeypatch.setattr(preflight, "missing_files", lambda _: {"data_fetch": ["a.parquet"]})
    assert len(preflight.preflight(spec, make_plan(spec), run)) == 1
    for stage in ("data_fetch", "tok_train", "base_train"):
        run.write_outcome(Outcome(stage=stage, outcome="done"))
    assert preflight.preflight(spec, make_plan(spec), run) == []


def test_no_compiler_is_an_unfit_node(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda _: None)
    spec = load_spec(REPO / "configs/e2e.toml", ["runtime.compile=true"])
    [(code, text)] = messages(spec, make_plan(spec), RunDir(home / "runs/x"))
    assert code == EXIT_UNFIT_NODE
    assert "g++" in text and "runtime.compile=false" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_home_is_the_specs_business(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    spec = load_spec(REPO / "configs/e2e.toml")
    [(code, text), *_] = messages(spec, make_plan(spec), RunDir(locked / "runs/x"))
    assert code == EXIT_SPEC and "cannot be written" in text


def test_a_file_where_the_home_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = load_spec(REPO / "configs/e2e.toml")
    found = messages(spec, make_plan(spec), RunDir(tmp_path / "file/runs/x"))
    assert any(code == EXIT_SPEC and "cannot be written" in text for code, text in found)


def test_a_clock_in_the_past_is_an_unfit_node(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.time, "time", lambda: 86_400.0)
    spec = load_spec(REPO / "configs/e2e.toml")
    [(code, text)] = messages(spec, make_plan(spec), RunDir(home / "runs/x"))
    assert code == EXIT_UNFIT_NODE and "clock" in text


def test_doctor_needs_no_spec() -> None:
    facts = preflight.doctor(None)
    names = {f.name for f in facts}
    assert {"processor", "memory", "GPUs", "home", "clock", "/dev/shm", "Python"} <= names
    text = preflight.render_doctor(facts)
    assert len(text.splitlines()) >= len(facts)


def test_doctor_with_a_spec_says_what_is_missing() -> None:
    spec = load_spec(REPO / "configs/d20.toml", ['offer="cpu"'])
    facts = preflight.doctor(spec)
    bad = [f for f in facts if f.level == "bad"]
    assert {"plan", "data"} <= {f.name for f in bad}
    assert all(f.fix and f.exit_code for f in bad)


def test_doctor_of_the_toy_run_is_well() -> None:
    facts = preflight.doctor(load_spec(REPO / "configs/e2e.toml"))
    assert [f for f in facts if f.level == "bad" and f.name != "tokenizer"] == []


def test_doctor_is_quiet_about_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    [network] = [f for f in preflight.doctor(None) if f.name == "network"]
    assert "not to be used" in network.value
