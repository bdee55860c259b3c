"""The command line: help at once, wrong arguments are 78, facts as JSON on stdout alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import entrypoint

ROOT = Path(__file__).resolve().parent.parent.parent
VERBS = [
    "plan", "run", "launch", "status", "stop", "report", "compare", "fetch", "doctor",
    "chat", "serve", "export",
]  # fmt: skip
PLAN_KEYS = {
    "name", "offer", "n_params", "n_params_matmul", "usd_per_hour", "hours", "usd", "verdict",
    "reasons", "alternatives", "checkpoint_gib", "stages",
}  # fmt: skip
STAGE_KEYS = {
    "stage", "num_steps", "total_batch_size", "device_batch_size", "grad_accum_steps", "seq_len",
    "num_tokens", "tokens_per_param", "epochs", "flops", "tokens_per_s", "mfu", "hours", "usd",
    "memory_gib",
}  # fmt: skip


def nanochat(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "entrypoint.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_help_of_every_verb_imports_no_torch() -> None:
    code = (
        "import sys, entrypoint\n"
        "for verb in sys.argv[1:]:\n"
        "    try: entrypoint.main([verb, '--help'])\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    out = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr


def test_facts_need_no_torch() -> None:
    code = (
        "import sys, entrypoint\n"
        "assert entrypoint.main(['plan', '@configs/smoke.toml', '--json']) == 0\n"
        "assert entrypoint.main(['status', '--json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("arguments", "wants"),
    [
        (["fly"], ["'fly'", "plan", "run"]),
        (["run", "@configs/smok.toml"], ["configs/smok.toml", "did you mean", "smoke.toml"]),
        (["run", "configs/smoke.toml"], ["@FILE"]),
        (["plan", "@configs/smoke.toml", "model.dpth=3"], ["'dpth'", "'depth'"]),
        (["plan", "@configs/smoke.toml", "--on", "8xH10-SXM"], ["8xH100-SXM"]),
        (["plan"], ["@configs/smoke.toml"]),
        (["status", "nowhere"], ["nowhere", "no run directory"]),
        (["report", "nowhere"], ["nowhere", "no run directory"]),
        (["stop", "nowhere"], ["nowhere", "no run directory"]),
        (["chat", "nowhere"], ["nowhere"]),
    ],
)
def test_wrong_arguments_are_78_and_say_the_fix(arguments: list[str], wants: list[str]) -> None:
    out = nanochat(*arguments)
    assert out.returncode == 78, (out.stdout, out.stderr)
    assert out.stdout == ""
    assert "Traceback" not in out.stderr
    for want in wants:
        assert want in out.stderr


def test_configs_are_found_from_any_folder(tmp_path: Path) -> None:
    out = nanochat("plan", "@configs/smoke.toml", "--json", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["name"] == "smoke"


def test_plan_json_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.main(["plan", "@configs/e2e.toml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan.keys() >= PLAN_KEYS
    assert set(plan["checkpoint_gib"]) >= {"each", "kept", "written"}
    for stage in plan["stages"]:
        assert stage.keys() >= STAGE_KEYS
        assert set(stage["memory_gib"]) >= {
            "params", "grads", "optimizer", "activations", "logits", "overhead", "total",
            "available",
        }  # fmt: skip


def test_no_verb_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.main([]) == 78
    assert "plan" in capsys.readouterr().out


def test_help_is_quick() -> None:
    started = time.monotonic()
    assert nanochat("run", "--help").returncode == 0
    assert time.monotonic() - started < 1.0  # a ceiling of the contract


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "@configs/e2e.toml", "--json", "model.depth=3"]
    assert entrypoint.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["n_params"] > 163_840


def test_launch_dry_run_prints_what_would_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "@configs/e2e.toml", "--to", "docker", "--dry-run", "--json"]
    assert entrypoint.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["worst_case_usd"] == 0.0
    assert "@/run/nanochat/e2e.toml" in document["sent"]


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "entrypoint.py", "plan", "--fields"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
