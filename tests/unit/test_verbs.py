"""What the verbs work out by themselves."""

from pathlib import Path

from infra.verbs import SAVES_IN_GRACE, _stop_grace_s
from nanochat.rundir import RunDir, atomic_write_json
from tests.unit.test_supervisor import make_spec


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
