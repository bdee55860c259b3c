"""`nanochat sync` with a stand-in for the wandb tool."""

from pathlib import Path

import pytest

from infra import sync
from nanochat.rundir import RunDir
from nanochat.spec import SpecError


def test_sync_pushes_what_is_not_pushed_and_keeps_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    for name, synced in (("1", True), ("2", False), ("3", False)):
        part = tmp_path / "wandb" / f"offline-run-{name}-abc"
        part.mkdir(parents=True)
        (part / f"run-abc.wandb{'.synced' if synced else ''}").write_text("")
    tool = tmp_path / "wandb-stand-in"
    tool.write_text('#!/bin/bash\necho "$@" >> "$(dirname "$0")/calls"\n[[ "$2" != *run-3* ]]\n')
    tool.chmod(0o755)
    pushed = sync.push(RunDir(tmp_path), (str(tool),))
    assert (pushed.pushed, pushed.waiting) == (["offline-run-2-abc"], ["offline-run-3-abc"])
    assert pushed.exit_code == 78
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_sync_without_a_key_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    with pytest.raises(SpecError, match="WANDB_API_KEY"):
        sync.push(RunDir(tmp_path), ("wandb",))
