"""The rehearsal: the real model, sharded and not, with fake tensors, holds the plan's memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint import build_parser
from infra import memory, verbs
from infra.planner import make_plan
from nanochat.rehearse import rehearse
from nanochat.rundir import EXIT_SPEC
from nanochat.spec import RunSpec, load_spec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

REPO = Path(__file__).resolve().parents[2]


def planned(offer: str, *overrides: str, config: str = "d20") -> tuple[RunSpec, dict[str, Any]]:
    spec = load_spec(REPO / f"configs/{config}.toml", [f'offer="{offer}"', *overrides])
    return spec, make_plan(spec, look_further=False).to_json()


SMALL = ("model.depth=3", "model.vocab_size=4096", "budget.max_hours=1000.0")


@pytest.mark.parametrize(
    ("offer", "sharding", "recompute"),
    [
        ("1xH100-SXM", "replicated", False),
        ("8xH100-SXM", "fsdp", False),
        ("1xH100-SXM", "replicated", True),
        ("8xH100-SXM", "fsdp", True),
    ],
)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_memory_is_that_of_the_plan(
    offer: str, sharding: str, recompute: bool, compiled: bool
) -> None:
    compiles = f"runtime.compile={str(compiled).lower()}"
    spec, plan = planned(offer, *SMALL, "base_train.device_batch_size=4", compiles)
    plan |= {"sharding": sharding, "recompute": recompute}
    plan["stages"] = [_stage_with(spec, offer, sharding, recompute)]
    result = rehearse(spec, plan)
    assert result["ok"], result["memory_gib"]
    assert result["world_size"] == int(offer[0])
    assert result["recompute"] == recompute
    for term in ("params", "grads", "optimizer"):
        both = result["memory_gib"][term]
        assert both["measured"] == pytest.approx(both["planned"], abs=1.1e-4)
    activations = result["memory_gib"]["activations"]
    assert activations["measured"] == pytest.approx(activations["planned"], rel=0.05)


def _stage_with(spec: RunSpec, offer_name: str, sharding: str, recompute: bool) -> dict[str, Any]:
    """The plan's entry for a layout that the planner would not choose for so small a model."""
    from infra.hardware import parse_offer
    from infra.layout import make_layout
    from infra.memory import step_memory
    from nanochat.scaling import gpt_config

    offer = parse_offer(offer_name)
    layout = make_layout(spec, offer, fsdp=sharding == "fsdp", recompute=recompute)
    planned_memory = step_memory(gpt_config(spec.model), layout, 4, offer)
    return {
        "stage": "base_train",
        "device_batch_size": 4,
        "grad_accum_steps": 8,
        "seq_len": spec.model.seq_len,
        "memory_gib": planned_memory.to_json(),
    }


def test_a_wrong_plan_is_found() -> None:
    spec, plan = planned("1xH100-SXM", *SMALL, "base_train.device_batch_size=4")
    plan["stages"] = plan["stages"][:1]
    plan["stages"][0]["memory_gib"]["activations"] *= 1.25
    result = rehearse(spec, plan)
    assert not result["ok"]
    assert not result["memory_gib"]["activations"]["ok"]


def test_the_verb_refuses_a_plan_whose_memory_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real rehearsal, in its process, of a plan that was made wrong."""
    words = ["plan", "@configs/d20.toml", *SMALL, "base_train.device_batch_size=4", "--rehearse"]
    args = build_parser().parse_args([*words, "--json", "--on", "1xH100-SXM"])
    assert verbs.plan(args) == 0
    assert json.loads(capsys.readouterr().out)["rehearsal"]["ok"]
    truth = memory.layer_activations
    monkeypatch.setattr(memory, "layer_activations", lambda c, layout: 2 * truth(c, layout))
    assert verbs.plan(args) == EXIT_SPEC
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["rehearsal"]["ok"]) == ("refused", False)
    assert "activations" in document["reasons"][0]


def test_a_shape_that_cannot_work_raises() -> None:
    spec, plan = planned("8xH100-SXM", *SMALL, "base_train.device_batch_size=4")
    plan["stages"] = plan["stages"][:1]
    plan["stages"][0]["seq_len"] = 4096
    with pytest.raises(AssertionError, match="seq_len"):
        rehearse(spec, plan)


def test_d64_on_eight_ranks_is_rehearsed_at_full_size() -> None:
    """As asked for: sharded, its blocks recomputed, without a GPU; 25 to 40 s on two cores."""
    spec, plan = planned("8xH100-PCIE", config="d64_1000usd")
    assert (plan["sharding"], plan["recompute"]) == ("fsdp", True)
    result = rehearse(spec, plan)
    assert result["ok"], result["memory_gib"]
    assert (result["world_size"], result["device_batch_size"]) == (8, 32)
    memory = result["memory_gib"]
    for term in ("params", "grads", "optimizer"):
        assert memory[term]["measured"] == pytest.approx(memory[term]["planned"], abs=1.1e-4)
    assert memory["params"]["measured"] * 8 == pytest.approx(4 * plan["n_params"] / 2**30, rel=1e-4)
