"""What the emulated provider rents, and SkyPilot's catalog (schema v8) of the same.

Prices are per machine and hour, of the list in infra/hardware.py.
"""

from dataclasses import dataclass

from infra.hardware import GPUS

ZONES = {"CA-MTL-1": "CA", "EU-NL-1": "NL", "US-KS-2": "US"}
SPOT_PART = 0.65
SKY_NAMES = {
    "H100-SXM": "H100-SXM",
    "H100-PCIE": "H100",
    "A100-80GB": "A100-80GB-SXM",
    "A100-80GB-PCIE": "A100-80GB",
    "H200": "H200-SXM",
    "RTX-4090": "RTX4090",
}
"""Our name -> SkyPilot's."""
CPUS = {"cpu3c-2-4": 0.06, "cpu3c-4-8": 0.12, "cpu3g-2-8": 0.08, "cpu5c-2-4": 0.07}


@dataclass(frozen=True)
class GpuType:
    """A GPU type as the API knows it."""

    id: str
    memory_gb: int
    usd_per_hour: float


GPU_TYPES = {
    f"NVIDIA {gpu.driver_names[0]}": GpuType(
        f"NVIDIA {gpu.driver_names[0]}", round(gpu.memory_gib + 0.8), gpu.usd_per_hour
    )
    for gpu in GPUS
}


def vms_csv() -> str:
    """runpod/vms.csv: one row per instance type and zone, COMMUNITY dearer in no case."""
    rows = [
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Region,SpotPrice,Price,"
        "AvailabilityZone,GpuInfo"
    ]
    for zone, region in ZONES.items():
        for gpu in GPUS:
            name = SKY_NAMES.get(gpu.name)
            if name is None:
                continue
            for n in (1, 2, 4, 8):
                for kind, part in (("SECURE", 1.0), ("COMMUNITY", 0.9)):
                    usd = n * gpu.usd_per_hour * part
                    info = _gpu_info(name, n, gpu.memory_gib)
                    rows.append(
                        f"{n}x_{name}_{kind},{name},{n}.0,{16.0 * n},{120.0 * n},{region},"
                        f"{usd * SPOT_PART:.4f},{usd:.4f},{zone},{info}"
                    )
        for instance, usd in CPUS.items():
            _, vcpus, gib = instance.split("-")
            rows.append(f"{instance},,,{vcpus}.0,{gib}.0,{region},,{usd},{zone},")
    return "\n".join(rows) + "\n"


def _gpu_info(name: str, count: int, memory_gib: float) -> str:
    mib = int(memory_gib * 1024)
    inner = f"{{'Name': '{name}', 'Count': {count}.0, 'MemoryInfo': {{'SizeInMiB': {mib}}}}}"
    return f"\"{{'Gpus': [{inner}], 'TotalGpuMemoryInMiB': {mib * count}}}\""


def accelerators_csv() -> str:
    """common/accelerators.csv."""
    return "AcceleratorName,Clouds\n" + "".join(f"{n},['RunPod']\n" for n in SKY_NAMES.values())


def metadata_csv() -> str:
    """common/metadata.csv."""
    rows = "".join(
        f"{SKY_NAMES[g.name]},{round(g.memory_gib)},NVIDIA\n" for g in GPUS if g.name in SKY_NAMES
    )
    return "GPU,MemoryGB,Manufacturer\n" + rows


def files() -> dict[str, str]:
    """Path below catalogs/v8/ -> content."""
    return {
        "runpod/vms.csv": vms_csv(),
        "common/accelerators.csv": accelerators_csv(),
        "common/metadata.csv": metadata_csv(),
    }
