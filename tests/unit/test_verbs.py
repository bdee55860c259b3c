"""What the verbs work out by themselves."""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from entrypoint import build_parser
from infra import budget, hardware, planner, verbs
from infra.console import Console
from infra.meter import Price
from infra.pointer import point_to
from infra.supervisor import Supervisor
from infra.verbs import SAVES_IN_GRACE, _stop_grace_s
from nanochat.rundir import RunDir, RunDirError, atomic_write_json, read_jsonl
from nanochat.spec import load_spec
from tests.unit.test_supervisor import make_spec

ROOT = Path(__file__).resolve().parents[2]


def test_a_stop_waits_for_a_fresh_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    run.freeze_spec(make_spec())
    run.freeze_plan({"stop": {"save_s": 345.0}})
    assert _stop_grace_s(run, None) == SAVES_IN_GRACE * 345.0, "as planned"
    atomic_write_json(run.progress_file("base_train"), {"save_s": 100.0})
    assert _stop_grace_s(run, "base_train") == SAVES_IN_GRACE * 100.0, "as measured"
    atomic_write_json(run.progress_file("base_train"), {"save_s": 0.01})
    assert _stop_grace_s(run, "base_train") == run.spec().stop_grace_s


def test_a_stop_without_a_name_is_of_the_run_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a hook of sky/*.yaml says, whatever the run is called and whoever shares the volume."""
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    ours, other = (RunDir(tmp_path / "runs" / name) for name in ("d20b", "d24"))
    for run in (ours, other):
        run.create()
        run.freeze_spec(make_spec())
        run.freeze_plan({})
        run.write_status({"name": run.path.name, "state": "RUNNING", "heartbeat": time.time()})
    unnamed = argparse.Namespace(run_dir=None)
    with pytest.raises(RunDirError, match="no run has been started on this machine"):
        verbs.stop(unnamed)
    point_to(tmp_path, ours.path)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another-pod")
        point_to(tmp_path, other.path)
    assert verbs.stop(unnamed) == 0
    assert ours.stop_request() is not None and other.stop_request() is None
    assert f"{ours.path} has stopped" in capsys.readouterr().err


def test_the_budget_covers_the_volume_that_the_plan_has_priced(tmp_path: Path) -> None:
    """The ledger's price is of machine and volume, and its cap therefore of both."""
    spec = load_spec(verbs.APP_DIR / "configs" / "d20.toml")
    plan = planner.make_plan(spec, hardware.parse_offer("8xH100-SXM")).to_json()
    price = verbs._quoted(plan)
    assert price.all_usd_per_hour * plan["hours"] == pytest.approx(plan["usd"], rel=1e-4)
    assert price.storage_usd_per_hour > 0.0
    run = RunDir(tmp_path / "run")
    run.create()
    console = Console(run, spec.stages, stream=io.StringIO())
    Supervisor(spec, run, plan, price, 8, console)._ledger("start")
    (line,) = read_jsonl(run.ledger_file)
    left_s = budget.time_left_s(
        spec.budget.model_copy(update={"max_hours": None}), [line], line["time"]
    )
    assert left_s == pytest.approx(3600 * 100.0 / price.all_usd_per_hour)


@pytest.mark.parametrize("is_near", [True, False])
def test_a_rehearsal_that_counts_other_memory_refuses_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_near: bool
) -> None:
    def rehearsed(_spec: Any, document: dict[str, Any]) -> dict[str, Any]:
        planned = document["stages"][0]["memory_gib"]["activations"]
        activations = {"planned": planned, "measured": 2.0 + planned, "ok": is_near}
        return {
            "ok": is_near,
            "stage": "base_train",
            "device_batch_size": 32,
            "memory_gib": {"params": {"ok": True}, "activations": activations},
        }

    monkeypatch.setattr(verbs, "_rehearse", rehearsed)
    args = build_parser().parse_args(["plan", "@configs/d20.toml", "--rehearse", "--json"])
    code = verbs.plan(args)
    document = json.loads(capsys.readouterr().out)
    assert document["rehearsal"]["ok"] == is_near
    assert (code == 78, document["verdict"] == "refused") == (not is_near, not is_near)
    if not is_near:
        assert "the rehearsal of base_train" in document["reasons"][0]
        assert "base_train.device_batch_size below the planned 32" in document["reasons"][0]


def test_machines_that_cannot_run_it_use_the_budget_too(tmp_path: Path) -> None:
    """A controller that tries one unfit pod after the other has no other bound."""
    run, now = RunDir(tmp_path / "r"), time.time()
    spec = load_spec(ROOT / "configs" / "smoke.toml", ["budget.max_usd=5.0"])

    def unfit(pod: str | None) -> bool:
        price = Price(21.52, "plan", pod, billed_from=now - 600.0)
        return verbs._is_spent_unstarted(spec, run, price)

    assert not unfit(None), "a machine that is not rented costs nothing"
    assert not list(read_jsonl(run.ledger_file))
    assert [unfit(f"p{n}") for n in range(3)] == [False, True, True]
    usd, _ = budget.spent(read_jsonl(run.ledger_file), time.time())
    assert usd == pytest.approx(3 * 21.52 / 6, rel=0.15)
