"""One account of the emulated provider: pods, volumes, prices, faults, and what was billed."""

import math
import shlex
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from tests.twin.runpod.catalog import CPUS, GPU_TYPES, SPOT_PART
from tests.twin.runpod.pods import Pods

Json = dict[str, Any]
DEPLOYS = ("podFindAndDeployOnDemand", "deployCpuPod", "podRentInterruptable")
NO_CAPACITY = "There are no longer any instances available with the requested specifications."


class Refused(Exception):
    """The API answers with this error, in GraphQL's `errors` or as an HTTP status."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """What goes wrong with the next calls of one operation."""

    times: int = 1
    message: str = NO_CAPACITY
    status: int = 200
    """HTTP status; 200 puts the message into GraphQL's `errors`."""


@dataclass
class Pod:
    """A pod, also after its end; billed from `born` to `ended`."""

    id: str
    name: str
    image: str
    asked: Json
    usd_per_hour: float
    spot: bool
    born: float
    container: str | None = None
    ready_at: float = 0.0
    """No ports before."""
    status: str = "RUNNING"
    ended: float | None = None
    ended_by: str | None = None
    """Address that asked for the end, or `preempted`."""
    bills: list[tuple[float, float]] = field(default_factory=list)
    """(since, USD per hour), the price moves."""

    def spent_usd(self, now: float) -> float:
        """What it has been billed so far: by the second (docs.runpod.io/pods/pricing, and of every
        charge accounts-billing/billing), a begun one whole."""
        until = self.born + math.ceil((self.ended or now) - self.born)
        total = 0.0
        for (since, usd), following in zip(
            self.bills, [*(b[0] for b in self.bills[1:]), until], strict=True
        ):
            total += usd / 3600.0 * max(0.0, min(following, until) - since)
        return total


class Account:
    """State behind the API. `price_factor` makes everything dearer, for budgets of some cents."""

    def __init__(self, pods: Pods, image: str, url_for_pods: str) -> None:
        self.key = "rpa_EMULATED_KEY"
        self.engine = pods
        self.image = image
        self.url_for_pods = url_for_pods
        self.pods: dict[str, Pod] = {}
        self.volumes: dict[str, Json] = {}
        self.faults: dict[str, Fault] = {}
        self.calls: list[Json] = []
        self.price_factor = 1.0
        self.dearer: dict[str, float] = {}
        """Instance or GPU type -> times what the list says, for one whose price has risen."""
        self.boot_s = 0.0
        """Slow boots: so long a pod has no port."""
        self.fails_to_boot: dict[str, int] = {}
        """Instance or GPU type -> of how many of its next pods the container never starts."""
        self.on_start: str | None = None
        """A shell command run in every new pod, e.g. one that breaks its set-up."""
        self.extra_env: dict[str, str] = {}
        """Added to the environment of every pod, by the test."""
        self._templates: dict[str, Json] = {}
        self._auths: dict[str, str] = {}
        self._lock = threading.RLock()

    # -- the API

    def resolve(self, operation: str, given: Json, caller: str) -> Any:
        """One field of a query or mutation. Raises Refused."""
        with self._lock:
            self.calls.append(
                {"time": time.time(), "operation": operation, "input": given, "from": caller}
            )
            self._fail(operation)
            deploys = operation in DEPLOYS
            if deploys:
                self._fail("deploy")
        if deploys:  # starting a container takes seconds, in which others may ask
            return self._deploy(given, spot=operation == "podRentInterruptable")
        with self._lock:
            if operation == "podTerminate":
                return self.terminate(str(given["podId"]), caller)
            if operation == "pod":
                pod = self.pods.get(str(given["podId"]))
                return self._shown(pod) if pod and pod.ended is None else None
            if operation == "myself":
                return self._myself()
            if operation == "gpuTypes":
                return self._gpu_types(given.get("id"))
            if operation == "updateUserSettings":
                return {"id": "user_1", "pubKey": given.get("pubKey")}
            if operation == "saveRegistryAuth":
                self._auths[given["name"]] = f"auth_{uuid.uuid4().hex[:8]}"
                return {"id": self._auths[given["name"]], "name": given["name"]}
            if operation == "saveTemplate":
                self._templates[given["name"]] = {"id": f"template_{given['name']}", **given}
                return self._templates[given["name"]]
            if operation == "deleteTemplate":
                self._templates.pop(str(given.get("templateName")), None)
                return None
            if operation == "deleteRegistryAuth":
                login = given.get("registryAuthId")
                self._auths = {n: i for n, i in self._auths.items() if i != login}
                return None
            raise Refused(f'Cannot query field "{operation}" on type "Query".')

    def _fail(self, operation: str) -> None:
        fault = self.faults.get(operation)
        if fault is None or fault.times <= 0:
            return
        fault.times -= 1
        raise Refused(fault.message, fault.status)

    def _deploy(self, given: Json, spot: bool) -> Json:
        gpu_count = int(given.get("gpuCount") or 0)
        gpu_type = given.get("gpuTypeId")
        if gpu_type:
            kind = GPU_TYPES.get(str(gpu_type))
            if kind is None:
                raise Refused(f"GPU type {gpu_type!r} does not exist")
            usd = gpu_count * kind.usd_per_hour * (SPOT_PART if spot else 1.0)
        else:
            gpu_count = 0
            if given.get("instanceId") not in CPUS:
                raise Refused(f"instance {given.get('instanceId')!r} does not exist")
            usd = CPUS[given["instanceId"]]
        what = str(gpu_type or given.get("instanceId"))
        usd *= self.dearer.get(what, 1.0)
        mounts = self._mounts(given)
        pod_id = uuid.uuid4().hex[:14]
        now = time.time()
        pod = Pod(
            id=pod_id,
            name=str(given["name"]),
            image=str(given["imageName"]),
            asked=given,
            usd_per_hour=usd * self.price_factor,
            spot=spot,
            born=now,
            ready_at=now + self.boot_s,
        )
        pod.bills.append((now, pod.usd_per_hour))
        env = {e["key"]: e["value"] for e in given.get("env") or []}
        env |= {
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_API_KEY": self.key,
            "RUNPOD_API_BASE_URL": self.url_for_pods,
            "RUNPOD_DC_ID": str(given.get("dataCenterId") or ""),
            **self.extra_env,
        }
        with self._lock:
            self.pods[pod_id] = pod
            if self.fails_to_boot.get(what, 0) > 0:
                self.fails_to_boot[what] -= 1
                return self._shown(pod)
        pod.container = self.engine.start(
            f"runpod-{pod_id}",
            self.image,
            shlex.split(given.get("dockerArgs") or ""),
            env,
            mounts,
            (gpu_count, str(gpu_type or "")),
        )
        if self.on_start:
            self.engine.run(pod.container, "sh", "-c", self.on_start)
        if pod.ended is not None:  # in the meantime
            self.engine.kill(pod.container)
        return self._shown(pod)

    def _mounts(self, given: Json) -> dict[str, str]:
        volume_id = given.get("networkVolumeId")
        if not volume_id:
            return {}
        volume = self.volumes.get(str(volume_id))
        if volume is None:
            raise Refused(f"network volume {volume_id} does not exist")
        if given.get("cloudType") == "COMMUNITY":  # a CPU pod is asked for with ALL
            raise Refused("network volumes are for secure cloud only")
        centres = str(given.get("dataCenterId") or "").split(",")
        if volume["dataCenterId"] not in centres:
            raise Refused(NO_CAPACITY)
        return {volume["docker"]: str(given.get("volumeMountPath") or "/runpod-volume")}

    def terminate(self, pod_id: str, by: str) -> None:
        """End a pod and its billing. Raises Refused for one that is not there."""
        pod = self.pods.get(pod_id)
        if pod is None or pod.ended is not None:
            raise Refused(f"pod not found: {pod_id}")
        self._end(pod, by)

    def _end(self, pod: Pod, by: str) -> None:
        pod.ended, pod.ended_by, pod.status = time.time(), by, "TERMINATED"
        if pod.container:
            # not in the request's own time: the caller may be in the pod
            threading.Thread(target=self.engine.kill, args=(pod.container,), daemon=True).start()

    def _myself(self) -> Json:
        return {
            "id": "user_1",
            "pubKey": "",
            "email": "nobody@example.com",
            "pods": [self._shown(p) for p in self.alive()],
            "networkVolumes": list(self.volumes.values()),
            "podTemplates": list(self._templates.values()),
        }

    def _shown(self, pod: Pod) -> Json:
        return {
            "id": pod.id,
            "name": pod.name,
            "imageName": pod.image,
            "desiredStatus": pod.status,
            "costPerHr": pod.usd_per_hour,
            "uptimeSeconds": int(time.time() - pod.born),
            "gpuCount": int(pod.asked.get("gpuCount") or 0),
            "vcpuCount": 4,
            "env": [f"{e['key']}={e['value']}" for e in pod.asked.get("env") or []],
            "machineId": "machine_1",
            "machine": {"podHostId": f"{pod.id}-host", "gpuDisplayName": "emulated"},
            "networkVolumeId": pod.asked.get("networkVolumeId"),
            "containerRegistryAuthId": None,
            "ports": pod.asked.get("ports"),
            "runtime": self._runtime(pod),
        }

    def _runtime(self, pod: Pod) -> Json | None:
        if pod.status != "RUNNING" or pod.container is None or time.time() < pod.ready_at:
            return None
        port, internal = self.engine.address(pod.container)
        if port is None:
            return None
        private = {"ip": internal, "isIpPublic": False, "privatePort": 8266, "publicPort": 8266}
        public = {"ip": "127.0.0.1", "isIpPublic": True, "privatePort": 22, "publicPort": port}
        return {"ports": [{**private, "type": "http"}, {**public, "type": "tcp"}]}

    def _gpu_types(self, wanted: Any) -> list[Json]:
        return [
            {
                "id": g.id,
                "displayName": g.id,
                "memoryInGb": g.memory_gb,
                "maxGpuCount": 8,
                "secureCloud": True,
                "securePrice": g.usd_per_hour * self.price_factor,
                "lowestPrice": {
                    "minimumBidPrice": g.usd_per_hour * SPOT_PART,
                    "uninterruptablePrice": g.usd_per_hour,
                },
            }
            for g in GPU_TYPES.values()
            if wanted in (None, g.id)
        ]

    # -- volumes (REST)

    def make_volume(self, name: str, data_center: str, size_gb: int) -> Json:
        """A network volume, pinned to its data centre."""
        volume_id = uuid.uuid4().hex[:10]
        docker_name = self.engine.make_volume(f"runpod-{volume_id}")
        self.volumes[volume_id] = {
            "id": volume_id,
            "name": name,
            "dataCenterId": data_center,
            "size": size_gb,
            "docker": docker_name,
        }
        return self.volumes[volume_id]

    def remove_volume(self, volume_id: str) -> None:
        """Delete it. Raises Refused while a pod has it."""
        if any(p.asked.get("networkVolumeId") == volume_id for p in self.alive()):
            raise Refused("the network volume is in use")
        self.engine.remove_volume(self.volumes.pop(volume_id)["docker"])

    # -- what a test does to the account

    def alive(self) -> list[Pod]:
        """Pods that are billed now."""
        return [p for p in list(self.pods.values()) if p.ended is None]

    def preempt(self, pod_id: str) -> None:
        """A spot host is taken back: the pod vanishes with its processes."""
        with self._lock:
            self._end(self.pods[pod_id], "preempted")

    def exit_pod(self, pod_id: str) -> None:
        """Stopped in the console or outbid: EXITED, still there and billed for its disk."""
        pod = self.pods[pod_id]
        self.move_price(pod_id, 0.01)
        pod.status = "EXITED"
        if pod.container:
            self.engine.stop(pod.container)

    def logins(self) -> list[str]:
        """Names of the logins for registries that the account has now."""
        return list(self._auths)

    def login_of(self, template_id: str) -> str:
        """Name of the login with which the image of a template is pulled."""
        (template,) = (t for t in self._templates.values() if t["id"] == template_id)
        names = {i: name for name, i in self._auths.items()}
        return names[template["containerRegistryAuthId"]]

    def move_price(self, pod_id: str, usd_per_hour: float) -> None:
        """From now on the pod costs this."""
        pod = self.pods[pod_id]
        pod.bills.append((time.time(), usd_per_hour))
        pod.usd_per_hour = usd_per_hour

    def spent_usd(self) -> float:
        """What all pods have been billed up to now."""
        now = time.time()
        return sum(p.spent_usd(now) for p in list(self.pods.values()))

    def state(self) -> Json:
        """Everything that can be seen, as JSON."""
        now = time.time()
        return {
            "pods": [
                {
                    **self._shown(p),
                    "ended": p.ended,
                    "ended_by": p.ended_by,
                    "usd": p.spent_usd(now),
                }
                for p in self.pods.values()
            ],
            "volumes": list(self.volumes.values()),
            "spent_usd": self.spent_usd(),
            "calls": self.calls,
        }
