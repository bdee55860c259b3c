"""Offers: names people type, numbers with a source, and this machine's own."""

import json
from types import SimpleNamespace

import pynvml
import pytest

from infra import hardware
from infra.hardware import (
    GPUS,
    OFFERS,
    cpu_offer,
    expected_cpu_flops,
    num_ranks,
    offers_json,
    parse_offer,
    priced,
    render_offers,
    world_size,
)
from nanochat.spec import Runtime, SpecError


@pytest.mark.parametrize(
    "name", ["8xH100-SXM", "8xH100-PCIE", "8xA100-40GB", "8xA100-80GB", "1xH200"]
)
def test_the_contracts_offers_exist(name: str) -> None:
    offer = parse_offer(name)
    assert offer.name == name
    assert world_size(offer) == int(name[0])
    assert offer.usd_per_hour > 0 and offer.price_source and offer.peak_source


def test_names_are_read_without_regard_to_case_and_blanks() -> None:
    assert parse_offer(" 8xh100-sxm ") is OFFERS["8xH100-SXM"]


@pytest.mark.parametrize("text", ["8xH100SXM", "8 x H100-SXM", "8xH100", "8xh100-sxm5"])
def test_a_near_miss_is_named(text: str) -> None:
    with pytest.raises(SpecError, match="Did you mean 8xH100-SXM"):
        parse_offer(text)


def test_an_unknown_offer_lists_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        parse_offer("abacus")
    message = str(caught.value)
    assert "cpu" in message
    assert all(gpu.name in message for gpu in GPUS)


def test_three_gpus_are_no_offer() -> None:
    with pytest.raises(SpecError, match="1, 2, 4, 8"):
        parse_offer("3xH100-SXM")


def test_rates_are_possible_and_each_has_a_source() -> None:
    for gpu in GPUS:
        assert gpu.matmul_source and gpu.link_source
        assert 0.5 * gpu.peak_flops < gpu.matmul_flops < gpu.peak_flops
        assert gpu.attention_flops < gpu.matmul_flops
        assert (gpu.link_bytes_per_s > 100e9) == gpu.has_nvlink


def test_prices_are_those_of_the_whole_machine() -> None:
    assert OFFERS["8xH100-SXM"].usd_per_hour == 21.52
    assert OFFERS["4xH100-SXM"].usd_per_hour == pytest.approx(10.76)


def test_the_cpu_is_this_machine() -> None:
    offer = parse_offer("cpu")
    assert offer.cpu and offer.name == "cpu"
    assert offer.usd_per_hour == 0.0
    assert 1e9 < offer.peak_flops < 1e14
    assert offer.peak_flops >= expected_cpu_flops() / 2
    assert 0.25 < offer.memory_gib < 1e5
    assert world_size(offer) == 1
    assert cpu_offer() is parse_offer("CPU")


def test_the_price_of_the_spec_replaces_the_list() -> None:
    offer = OFFERS["8xH100-SXM"]
    assert priced(offer, None) is offer
    assert priced(offer, 32.0).usd_per_hour == 32.0
    assert "spec" in priced(offer, 32.0).price_source


def test_ranks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [hardware.GpuHere("NVIDIA H100 80GB HBM3", 79.6, 79.0)] * 4
    monkeypatch.setattr(hardware, "gpus_here", lambda: gpus)
    assert num_ranks(Runtime()) == 4
    assert num_ranks(Runtime(device="cpu")) == 1
    assert num_ranks(Runtime(num_ranks=2)) == 2
    monkeypatch.setattr(hardware, "gpus_here", list)
    assert num_ranks(Runtime()) == 1


def test_the_list_prints_as_table_and_json() -> None:
    offers = json.loads(json.dumps(offers_json()))
    assert {o["offer"] for o in offers} == {*OFFERS, "cpu"}
    lines = render_offers(offers).splitlines()
    assert len(lines) == len(offers) + 1
    assert any(line.startswith("8xH100-SXM") and "21.52" in line for line in lines)


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "driver_here", lambda: None)
    assert hardware.gpus_here() == []


UUIDS = ("GPU-aa11", "GPU-bb22", "GPU-cc33")
SLICE = "MIG-dd44"


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML with three GPUs and a slice."""
    names = {**dict(enumerate(UUIDS)), SLICE: SLICE}

    def by_uuid(uuid: str) -> str:
        if uuid not in (*UUIDS, SLICE):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    monkeypatch.setattr(hardware, "driver_here", lambda: "580.1")
    for name, function in {
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": names.__getitem__,
        "nvmlDeviceGetName": names.__getitem__,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=2**30, free=2**30),
    }.items():
        monkeypatch.setattr(pynvml, name, function)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, UUIDS),
        ("1,2", UUIDS[1:]),
        ("2, 0", (UUIDS[2], UUIDS[0])),
        ("0,7", UUIDS[:1]),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("GPU-bb22,GPU-aa11", (UUIDS[1], UUIDS[0])),
        ("GPU-cc", UUIDS[2:]),
        (SLICE, (SLICE,)),
        (f"{SLICE},MIG-ee55", (SLICE,)),  # a process has one slice
        ("MIG-GPU-aa11/1/0", UUIDS[:1]),  # unknown to NVML: as many as are named
        ("GPU-ff66,GPU-ff77", (UUIDS[0], UUIDS[0])),
    ],
)
def test_the_gpus_that_this_process_may_use(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: tuple[str, ...]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tuple(gpu.name for gpu in hardware.gpus_here()) == names
    assert num_ranks(Runtime()) == max(1, len(names))
