"""The cluster in a box: real SLURM, munge and Apptainer on three containers of one image.

* login: slurmctld and sshd; on the cluster's network and on one that leads outside.
* c1, c2: slurmd, two cores each; on the cluster's network only, which has no way out.
* /scratch, and /small of SMALL_MIB, are shared by all. The home of the user `student` is a tmpfs of
  HOME_MIB, another one on each node, which is what a small quota looks like.

`python -m tests.twin.slurm.cluster up IMAGE` starts one to try the SLURM path by hand, with the SIF
made of that image; `down` removes it, and leaves the SIF for the next one. `make cluster` and
`make cluster-down` do the same.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, NotFound
from docker.models.containers import Container

from tests.twin.baseimage import ensure_base_image
from tests.twin.engine import BUILD_TIMEOUT_S, LABEL, ROOT, EngineError, wait_until

HERE = Path(__file__).resolve().parent
TAG = "nanochat-twin-slurm"
NODES = ("c1", "c2")
USER = "student"
SCRATCH = f"/scratch/{USER}"
HOME = f"{SCRATCH}/nanochat"
SIF = f"{SCRATCH}/nanochat.sif"
SIF_STORE = "/sif"
"""Of a cluster that is tried by hand: a volume that outlives it, since a SIF takes minutes."""
KIT = "/opt/kit"
HOME_MIB = 64
SMALL = "/small"
"""A scratch that fills up."""
SMALL_MIB = 64
START_S = 120.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
POLL_S = 1.0
"""Between two questions to SLURM, which answers by a process of its own."""
SIGNAL_S = 240
"""`--signal-s` of the jobs whose wall time `end_wall_time` ends."""
FAST_SIF = ("--mksquashfs-args", "-comp zstd -Xcompression-level 3")
"""A third of the time of the default gzip, at the same size."""
APPTAINER_IN_DOCKER: dict[str, Any] = {
    "devices": ["/dev/fuse"],
    "cap_add": ["SYS_ADMIN", "NET_ADMIN"],
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
}
"""And NET_ADMIN, so that a compute node can give its default route up."""
UNMASKED: dict[str, list[str]] = {"MaskedPaths": [], "ReadonlyPaths": []}
"""What --security-opt systempaths=unconfined stands for: Apptainer mounts a /proc of its own."""


@dataclass(frozen=True)
class Said:
    """What a command on a node has said."""

    exit_code: int
    output: str


def build_twin() -> str:
    """The image of the nodes, built where it has changed. Raises EngineError."""
    ensure_base_image("debian:trixie-slim")
    client = next(
        (c for c in _clients() if b"buildx" in _out(c, "buildx", "version") or _has_buildkit(c)),
        None,
    )
    if client is None:
        raise EngineError("the cluster in a box needs a Docker client with BuildKit")
    built = subprocess.run(
        [client, "build", "--tag", TAG, "--progress=plain", HERE],
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    if built.returncode:
        raise EngineError(f"{TAG} could not be built:\n{built.stdout[-4000:]}")
    return TAG


class Cluster:
    """Three nodes; `up` starts them, `down` removes everything."""

    def __init__(self, session: str = "", keeps_sif: bool = False) -> None:
        self.client = docker.from_env(timeout=300)
        self.session = session or uuid.uuid4().hex[:12]
        self.keeps_sif = keeps_sif
        self._labels = {LABEL: self.session}
        self._network: Any = None
        self.nodes: dict[str, Container] = {}

    def up(self) -> None:
        """Start the nodes and wait until both compute nodes are idle. Raises TimeoutError."""
        self._network = self.client.networks.create(
            self._name("net"), internal=True, labels=self._labels
        )
        for volume in ("scratch", "key"):
            self.client.volumes.create(self._name(volume), labels=self._labels)
        small = {"type": "tmpfs", "device": "tmpfs", "o": f"size={SMALL_MIB}m,mode=1777"}
        self.client.volumes.create(
            self._name("small"), driver="local", driver_opts=small, labels=self._labels
        )
        self._make_key()
        self.start_node("login")
        for name in NODES:
            self.start_node(name)
        wait_until(self._is_idle, START_S, f"idle nodes; sinfo: {self.sinfo()}")

    def start_node(self, name: str) -> None:
        """Start a node, also one that was removed."""
        role = "login" if name == "login" else "compute"
        api = self.client.api
        host = api.create_host_config(
            binds={
                self._name("scratch"): {"bind": "/scratch", "mode": "rw"},
                self._name("small"): {"bind": SMALL, "mode": "rw"},
                self._name("key"): {"bind": "/cluster", "mode": "ro"},
                str(ROOT): {"bind": KIT, "mode": "ro"},
            },
            tmpfs={f"/home/{USER}": f"size={HOME_MIB}m,uid=2001,gid=2001,mode=700"},
            network_mode=self._name("net"),
            **APPTAINER_IN_DOCKER,
        )
        if self.keeps_sif:  # made by the engine and without a label, so that `down` leaves it
            host["Binds"].append(f"{self._name('sif')}:{SIF_STORE}:rw")
        alone = api.create_endpoint_config(aliases=[name])
        made = api.create_container(
            TAG,
            [role],
            name=self._name(name),
            hostname=name,
            labels=self._labels,
            host_config={**host, **UNMASKED},
            networking_config=api.create_networking_config({self._name("net"): alone}),
        )
        container = self.client.containers.get(made["Id"])
        if name == "login":
            self.client.networks.get("bridge").connect(container)
        container.start()
        self.nodes[name] = container

    def down(self) -> None:
        """Remove containers, volumes and the network."""
        mine = {"label": f"{LABEL}={self.session}"}
        for container in self.client.containers.list(all=True, filters=mine):
            with contextlib.suppress(APIError):
                container.unpause()
            with contextlib.suppress(NotFound):
                container.remove(force=True, v=True)
        for volume in self.client.volumes.list(filters=mine):
            volume.remove(force=True)
        for network in self.client.networks.list(filters=mine):
            network.remove()
        self.client.close()

    def adopt(self) -> bool:
        """Take over the nodes of a cluster of this session that runs already."""
        mine = {"label": f"{LABEL}={self.session}"}
        for container in self.client.containers.list(filters=mine):
            self.nodes[container.name.rpartition("-")[2]] = container
        return set(self.nodes) == {"login", *NODES}

    # -- commands

    def run(self, script: str, node: str = "login", user: str = USER) -> Said:
        """A script in a login shell of a user."""
        code, output = self.nodes[node].exec_run(
            ["bash", "-lc", script],
            user=user,
            environment={"USER": user, "NANOCHAT_HOME": HOME, **_own_binds()},
            workdir="/" if user == "root" else f"/home/{user}",
        )
        return Said(code, output.decode(errors="replace"))

    def check(self, script: str, node: str = "login", user: str = USER) -> str:
        """Output of a script that has to succeed. Raises EngineError."""
        said = self.run(script, node, user)
        if said.exit_code:
            raise EngineError(f"on {node}: {script!r} ended with {said.exit_code}:\n{said.output}")
        return said.output

    def nanochat(self, words: str, variables: str = "") -> Said:
        """A verb as a student types it on the login node, perhaps with variables before it."""
        return self.run(f"cd {KIT} && {variables} infra/slurm/nanochat.sh {words}")

    def sinfo(self) -> str:
        return self.run("sinfo --noheader --Node --format='%N %T'", user="root").output

    def make_sif(self, image: str) -> str:
        """The SIF of an image of the engine, built by the student; its sha256.

        A cluster that keeps its SIF builds none where it has that of this image.
        """
        if not self.keeps_sif:
            return self._build_sif(image, SIF)
        image_id = self.client.images.get(image).id.partition(":")[2][:16]
        place = f"{SIF_STORE}/{image_id}.sif"
        if self.run(f"test -f {place}.sha256").exit_code:
            self.check(f"rm -f {SIF_STORE}/*.sif {SIF_STORE}/*.sha256")
            self._build_sif(image, place)
        self.check(f"ln -sf {place} {SIF} && ln -sf {place}.sha256 {SIF}.sha256")
        return self.check(f"head -c 64 {SIF}.sha256")

    def _build_sif(self, image: str, place: str) -> str:
        archive = f"{SCRATCH}/image.tar"
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            copied = subprocess.run(
                ["docker", "exec", "-i", "-u", USER, self.nodes["login"].id]
                + ["sh", "-c", f"cat > {archive}"],
                stdin=saved.stdout,
            )
        if saved.returncode or copied.returncode:
            raise EngineError(f"{image} could not be copied to the login node")
        options = " ".join(f"'{o}'" for o in FAST_SIF)
        try:
            self.check(f"{KIT}/infra/slurm/build_sif.sh {archive} {place} {options} 2>&1")
        finally:
            self.check(f"rm -f {archive}")
        return self.check(f"sha256sum {place}").split()[0]

    def serve(self, files: Mapping[str, bytes]) -> str:
        """Address of a hub on the login node, on the cluster's network, with these files.

        files: OWNER/NAME/PATH of a data set's file -> content. Raises TimeoutError with its log.
        """
        login = self.nodes["login"]
        for name, content in files.items():
            path = f"{SCRATCH}/hub/{name}"
            copy = f"mkdir -p {Path(path).parent} && cat > {path}"
            command = ["docker", "exec", "-i", "-u", USER, login.id, "sh", "-c", copy]
            subprocess.run(command, input=content, check=True)
        login.reload()
        address = login.attrs["NetworkSettings"]["Networks"][self._name("net")]["IPAddress"]
        log = f"{SCRATCH}/hub.log"
        self.check(f"rm -f {log}")
        server = f"python3 -B -m tests.twin.slurm.data_server {SCRATCH}/hub {address}"
        login.exec_run(
            ["bash", "-c", f"cd {KIT} && exec {server} > {log} 2>&1"], user=USER, detach=True
        )
        wait_until(lambda: self.run(f"grep ^http {log}").exit_code == 0, 30, "the hub", POLL_S)
        return self.check(f"grep -m 1 ^http {log}").strip()

    # -- jobs

    def job(self, job_id: str) -> dict[str, str]:
        """A job as `scontrol show job` has it; its comment may hold spaces."""
        text = self.run(f"scontrol show job {job_id}", user="root").output
        fields: dict[str, str] = {}
        for line in text.splitlines():
            line = line.strip()
            if line.startswith(("Comment=", "Reason=")):
                key, _, value = line.partition("=")
                fields[key] = value
                continue
            for word in line.split():
                key, equals, value = word.partition("=")
                if equals:
                    fields.setdefault(key, value)
        return fields

    def wait_for_job(self, job_id: str, timeout_s: float) -> dict[str, str]:
        """The job once it has ended for good. Raises TimeoutError with its log."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job.get("JobState") in ENDED:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} after {timeout_s} s: {job}\n{self.log(job_id)}")
            time.sleep(POLL_S)

    def end_wall_time(self, job_id: str, timeout_s: float) -> None:
        """Leave a running job two to three minutes and wait until SLURM has seen the end of it.

        SLURM looks every 30 s whether a job's signal is due, so it comes within that time where
        the job asks for it SIGNAL_S before its end; the rest is time to save. Once the job has been
        requeued, it has all its time again. Raises TimeoutError with its log.
        """
        before = self.job(job_id)
        h, m, _ = map(int, before["RunTime"].rpartition("-")[2].split(":"))
        self.check(f"scontrol update JobId={job_id} TimeLimit={h * 60 + m + 3}")

        def is_requeued() -> bool:
            job = self.job(job_id)
            if job["JobState"] in ENDED:
                raise EngineError(f"{job_id} has ended instead: {job}\n{self.log(job_id)}")
            return job["Restarts"] != before["Restarts"]

        wait_until(is_requeued, timeout_s, f"the requeue of job {job_id}", POLL_S)
        limit = before["TimeLimit"]
        self.check(f"scontrol update JobId={job_id} TimeLimit={limit}", user="root")

    def log(self, job_id: str) -> str:
        """What a job has written."""
        return self.run(f"cat {SCRATCH}/nanochat-*-{job_id}.out").output

    def packets_without_route(self, node: str) -> int:
        """The kernel's count of packets of a node that no route leads to, IPv4 and IPv6.

        SNMP's IpOutNoRoutes and Ip6OutNoRoutes; the second is 0 where the kernel has no IPv6.
        """
        files = "/proc/net/snmp $(ls /proc/net/snmp6 2>/dev/null)"
        rows = [r.split() for r in self.check(f"cat {files}", node, "root").splitlines()]
        names, values = [r for r in rows if r and r[0] == "Ip:"][:2]
        ip6 = [int(r[1]) for r in rows if r and r[0] == "Ip6OutNoRoutes"]
        return int(values[names.index("OutNoRoutes")]) + sum(ip6)

    # -- parts

    def _is_idle(self) -> bool:
        return self.sinfo().split() == ["c1", "idle", "c2", "idle"]

    def _make_key(self) -> None:
        self.client.containers.run(
            TAG,
            ["-c", "mungekey --create --keyfile /cluster/munge.key && chmod 644 /cluster/*"],
            entrypoint="bash",
            remove=True,
            network_mode="none",
            volumes={self._name("key"): {"bind": "/cluster", "mode": "rw"}},
        )

    def _name(self, what: str) -> str:
        return f"nanochat-{self.session}-{what}"


def _own_binds() -> dict[str, str]:
    """APPTAINER_BIND of the tests, also for jobs: a changed module without a new SIF, with
    /opt/kit/infra:/opt/nanochat/app/infra."""
    binds = os.environ.get("APPTAINER_BIND")
    return {"APPTAINER_BIND": binds} if binds else {}


def _clients() -> list[str]:
    found = subprocess.run(["which", "-a", "docker"], capture_output=True, text=True)
    return found.stdout.split()


def _out(client: str, *args: str) -> bytes:
    done = subprocess.run([client, *args], capture_output=True)
    return done.stdout if done.returncode == 0 else b""


def _has_buildkit(client: str) -> bool:
    """Clients up to 22 have it built in."""
    version = _out(client, "--version").decode().partition("version ")[2]
    return version.partition(".")[0] in ("18", "19", "20", "21", "22")


def main(argv: list[str]) -> int:
    """up IMAGE or down."""
    cluster = Cluster("try", keeps_sif=True)
    if argv[:1] == ["down"]:
        cluster.down()
        return 0
    build_twin()
    started_s = time.monotonic()
    if not cluster.adopt():
        cluster.up()
    if len(argv) > 1:
        print("the SIF: some minutes, unless that of this image was kept", file=sys.stderr)
        cluster.make_sif(argv[1])
    print(f"ready after {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    print(f"docker exec -it -u {USER} -w {KIT} -e NANOCHAT_HOME={HOME} nanochat-try-login bash -l")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
