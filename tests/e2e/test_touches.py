"""The list of touches is the truth: each stage opens what it declares, all of it, and nothing else.

Every stage of d20, made small, runs on files in the publishers' formats, beside files that it has
no business with. The kernel tells what is opened, whatever library does it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.planner import make_plan
from nanochat import touches
from nanochat.rundir import RunDir
from nanochat.spec import RunSpec
from tests.twin import bundle, published
from tests.twin.opens import Opens

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's"),
]

ROOT = Path(__file__).resolve().parents[2]
AUDITED = """
import runpy, sys
stage, run, log = sys.argv[1:]
out = open(log, "a")
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and "w" not in str(args[1] or "r"):
        out.write(args[0] + "\\n")
        out.flush()
sys.addaudithook(hook)
sys.argv = [stage, run]
runpy.run_module(stage, run_name="__main__")
"""
"""Runs a stage and notes what Python itself opens for reading, anywhere."""
ANYWHERE = ("/opt/nanochat/", "/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib/", "/tmp/")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NANOCHAT_HOME with all sets, more shards than the spec reads, and what nobody may read."""
    home = tmp_path_factory.mktemp("touches")
    published.place(home / "data", num_shards=bundle.NUM_SHARDS + 2, locked=True)
    (home / "data" / "secret").mkdir()
    (home / "data" / "secret" / "notes.txt").write_text("mine")
    user = home / "user"
    (user / ".cache" / "huggingface").mkdir(parents=True)
    (user / ".cache" / "huggingface" / "token").write_text("hf_mine")
    (user / ".netrc").write_text("machine example.org login me")
    return home


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return bundle.small_spec()


@pytest.fixture(scope="module")
def run(home: Path, spec: RunSpec) -> RunDir:
    run = RunDir(home / "run")
    run.create()
    run.freeze_spec(spec)
    run.freeze_plan(make_plan(spec).to_json())
    return run


def declared(spec: RunSpec, stage: str) -> tuple[set[str], set[str]]:
    """(what a stage must open, what it may open), relative to the data folder."""
    every = touches.touched_files(spec)
    own = [t for t in every if t.stage == stage]
    must = {t.path for t in own if t.required}
    # data_fetch notes for the report what the locks say of every source
    locks = {f"{t.source}/{touches.LOCK_NAME}" for t in (every if stage == "data_fetch" else own)}
    return must, must | {t.path for t in own} | locks


def audited(stage: str, run: RunDir, home: Path) -> tuple[set[str], list[str]]:
    """Run a stage: (files of the data folder that were opened, other files outside of its own)."""
    log = home / f"{stage}.opened"
    data, user = home / "data", home / "user"
    env = {**os.environ, "NANOCHAT_HOME": str(home), "HOME": str(user), "NANOCHAT_OFFLINE": "1"}
    env = {k: v for k, v in env.items() if not k.startswith(("HF_", "XDG_"))}
    with Opens(data, user) as opens:
        done = subprocess.run(
            [sys.executable, "-c", AUDITED, f"nanochat.stages.{stage}", str(run.path), str(log)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0 and run.is_done(stage), f"{done.stderr}\n{run.outcome(stage)}"
    of_data = {str(p.relative_to(data)) for p in opens.opened if p.is_relative_to(data)}
    of_user = [str(p) for p in opens.opened if p.is_relative_to(user)]
    inside = (*ANYWHERE, str(ROOT), str(home), sys.prefix, sys.base_prefix)
    elsewhere = {line for line in log.read_text().splitlines() if line.startswith("/")}
    return of_data, of_user + sorted(p for p in elsewhere if not p.startswith(inside))


@pytest.mark.parametrize("stage", bundle.small_spec().stages)
def test_a_stage_opens_what_it_declares_and_nothing_else(
    stage: str, run: RunDir, home: Path, spec: RunSpec
) -> None:
    must, may = declared(spec, stage)
    opened, elsewhere = audited(stage, run, home)
    assert opened - may == set(), f"{stage} opens what touched_files does not name"
    assert must - opened == set(), f"{stage} names what it does not open"
    assert elsewhere == []


def test_every_set_is_in_the_list_of_d20(spec: RunSpec) -> None:
    """Shrinking left nothing out: the small run reads every source of d20 itself."""
    from nanochat.spec import load_spec

    large = {t.path for t in touches.touched_files(load_spec(ROOT / "configs" / "d20.toml"))}
    small = {t.path for t in touches.touched_files(spec)}
    assert {p for p in large - small if not p.startswith("fineweb_edu/")} == set()
    assert {t.partition("/")[0] for t in small} == {t.partition("/")[0] for t in large}


def test_what_is_opened_is_seen_whatever_opens_it(tmp_path: Path) -> None:
    """The watch itself: by Python, by Arrow's own file system, by another process."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / "in" / name).write_bytes(json.dumps([name]).encode())
    import pyarrow as pa

    with Opens(tmp_path) as opens:
        (tmp_path / "in" / "a").read_text()
        pa.memory_map(str(tmp_path / "in" / "b")).close()
        subprocess.run(["cat", tmp_path / "in" / "c"], check=True, stdout=subprocess.DEVNULL)
    assert {p.name for p in opens.opened} == {"a", "b", "c"}
