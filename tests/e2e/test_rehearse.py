"""The rehearsal: the real model, sharded and not, with fake tensors, holds the plan's memory."""

from pathlib import Path
from typing import Any

import pytest

from infra.planner import make_plan
from nanochat.rehearse import rehearse
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
    ],
)
def test_memory_is_that_of_the_plan(offer: str, sharding: str, recompute: bool) -> None:
    spec, plan = planned(offer, *SMALL, "base_train.device_batch_size=4")
    plan |= {"sharding": sharding, "recompute": recompute}
    plan["stages"] = [_stage_with(spec, offer, sharding, recompute)]
    result = rehearse(spec, plan)
    assert result["ok"], result["memory_gib"]
    assert result["world_size"] == int(offer[0])
    for term in ("params", "grads", "optimizer"):
        both = result["memory_gib"][term]
        assert both["measured"] == pytest.approx(both["planned"], abs=1.1e-4)


def _stage_with(spec: RunSpec, offer_name: str, sharding: str, recompute: bool) -> dict[str, Any]:
    """The plan's entry for a layout that the planner would not choose for so small a model."""
    from infra.hardware import parse_offer
    from infra.layout import make_layout
    from infra.memory import step_memory
    from nanochat.scaling import gpt_config

    offer = parse_offer(offer_name)
    layout = make_layout(spec, offer, fsdp=sharding == "fsdp", recompute=recompute)
    memory = step_memory(gpt_config(spec.model), layout, 4, offer)
    return {
        "stage": "base_train",
        "device_batch_size": 4,
        "grad_accum_steps": 8,
        "seq_len": spec.model.seq_len,
        "memory_gib": memory.to_json(),
    }


def test_a_wrong_plan_is_found() -> None:
    spec, plan = planned("1xH100-SXM", *SMALL, "base_train.device_batch_size=4")
    plan["stages"] = plan["stages"][:1]
    plan["stages"][0]["memory_gib"]["activations"] *= 1.25
    result = rehearse(spec, plan)
    assert not result["ok"]
    assert not result["memory_gib"]["activations"]["ok"]


def test_a_shape_that_cannot_work_raises() -> None:
    spec, plan = planned("8xH100-SXM", *SMALL, "base_train.device_batch_size=4")
    plan["stages"] = plan["stages"][:1]
    plan["stages"][0]["seq_len"] = 4096
    with pytest.raises(AssertionError, match="seq_len"):
        rehearse(spec, plan)
