"""Laws for configs/*.toml: what a person finds in each of them."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from infra.hardware import parse_offer
from infra.planner import make_plan
from nanochat.scaling import gpt_config, num_params
from nanochat.spec import load_spec
from nanochat.touches import touched_files

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))
SHIPPED = {
    "e2e", "smoke", "cpu_tiny", "cpu_small", "cpu_medium", "cpu_large", "d20", "d24",
    "d32_1000usd", "d64_1000usd", "ptolemy_d20",
}  # fmt: skip
PARAMS_M = {
    "cpu_tiny": 3.4, "cpu_small": 12.2, "cpu_medium": 29.4, "cpu_large": 97.5, "d20": 561,
    "d24": 881, "d32_1000usd": 1879, "d64_1000usd": 12885, "ptolemy_d20": 561,
}  # fmt: skip


def test_all_are_there() -> None:
    assert {p.stem for p in CONFIGS} == SHIPPED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_name_is_that_of_the_file(path: Path) -> None:
    assert load_spec(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_section_that_people_override_is_there(path: Path) -> None:
    tree = tomllib.loads(path.read_text())
    assert {"budget", "checkpoint", "data", "model", "runtime"} <= tree.keys()
    assert "report" in tree
    load_spec(path, ["runtime.compile=false", "budget.max_hours=0.5", "data.num_shards=1"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_first_lines_say_what_how_long_and_how_much(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = " ".join(line[1:] for line in lines[:7] if line.startswith("#"))
    assert re.search(r"seconds|minutes|hours|\bs\b|night|evening", comment)
    if path.stem not in ("e2e",):
        assert re.search(r"free|\$", comment)
        assert re.search(r"param|million", comment)


@pytest.mark.parametrize("name", PARAMS_M)
def test_sizes(name: str) -> None:
    spec = load_spec(next(p for p in CONFIGS if p.stem == name))
    assert num_params(gpt_config(spec.model)) / 1e6 == pytest.approx(PARAMS_M[name], rel=0.01)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_what_it_reads_is_known(path: Path) -> None:
    spec = load_spec(path)
    stages = {touch.stage for touch in touched_files(spec)}
    assert stages <= set(spec.stages)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("cpu_tiny", 0.05, 0.6),
        ("cpu_small", 0.3, 2.0),
        ("cpu_medium", 1.0, 8.0),
        ("cpu_large", 8, 48),
    ],
)
def test_cpu_tiers_take_as_long_as_they_say(name: str, low: float, high: float) -> None:
    """On eight cores of 100 GFLOP/s each, about a desktop's."""
    desktop = replace(parse_offer("cpu"), peak_flops=800e9, matmul_flops=800e9, memory_gib=32.0)
    plan = make_plan(load_spec(next(p for p in CONFIGS if p.stem == name)), desktop)
    assert low < plan.hours < high
    assert plan.verdict != "refused"


def test_paid_runs_are_bounded() -> None:
    for path in CONFIGS:
        spec = load_spec(path)
        if spec.offer != "cpu" and spec.budget.usd_per_hour != 0.0:
            assert spec.budget.max_usd is not None and spec.budget.max_hours is not None


def test_every_web_run_reads_less_than_one_pass() -> None:
    for name in ("d20", "d24", "d32_1000usd", "ptolemy_d20"):
        plan = make_plan(load_spec(next(p for p in CONFIGS if p.stem == name)))
        assert plan.stages[0].epochs is not None and plan.stages[0].epochs <= 1.0


def test_d64_guards_against_its_small_data() -> None:
    spec = load_spec(next(p for p in CONFIGS if p.stem == "d64_1000usd"))
    assert spec.model.dropout > 0
    assert spec.base_train is not None
    assert spec.base_train.weight_decay > 0
    assert spec.base_train.early_stop_patience is not None
    assert spec.checkpoint.keep_best
    assert (spec.budget.max_usd, spec.budget.max_hours) == (1000.0, 31.0)
