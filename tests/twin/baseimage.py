"""Debian's images without a registry: what `FROM` of a Dockerfile finds on this machine.

* debian:bookworm-slim is the product's, debian:trixie-slim that of the SLURM twin.
* An image of that name that is there already, or that a registry gives, is used as it is.
* Else mmdebstrap makes one from the Debian archive in about 15 s. The host's own certificate
  authorities go into it, because behind a TLS-inspecting proxy (companies, CI) a client in a
  container needs them; the product's Dockerfile knows nothing of this.

Run as a program it makes the image: `python -m tests.twin.baseimage`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BASE_IMAGE = "debian:bookworm-slim"
HOST_CERTIFICATES = Path("/usr/local/share/ca-certificates")
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
BUNDLE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
PULL_TIMEOUT_S = 20.0


class BaseImageError(RuntimeError):
    """There is no base image, and none can be made here; the message says what to install."""


def ensure_base_image(tag: str = BASE_IMAGE) -> str:
    """The tag debian:SUITE-slim, made if need be. Raises BaseImageError."""
    if _is_there(tag) or _pulled(tag):
        return tag
    if shutil.which("mmdebstrap") is None:
        raise BaseImageError(
            f"{tag} is neither here nor in a registry; to make one from the Debian "
            "archive: apt-get install mmdebstrap"
        )
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "base.tar"
        _bootstrap(archive, tag)
        _import(archive, tag)
    return tag


def _is_there(tag: str) -> bool:
    return _docker("image", "inspect", tag).returncode == 0


def _pulled(tag: str) -> bool:
    try:
        return _docker("pull", "--quiet", tag, timeout_s=PULL_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _bootstrap(archive: Path, tag: str) -> None:
    suite = tag.removeprefix("debian:").removesuffix("-slim")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates"]
    if _has_own_certificates():
        command += [
            f"--customize-hook=copy-in {HOST_CERTIFICATES} {HOST_CERTIFICATES.parent}",
            '--customize-hook=chroot "$1" update-ca-certificates',
        ]
    made = subprocess.run([*command, suite, str(archive)], capture_output=True, text=True)
    if made.returncode:
        raise BaseImageError(f"mmdebstrap could not make {tag}:\n{made.stderr[-2000:]}")


def _import(archive: Path, tag: str) -> None:
    changes = ['--change=CMD ["bash"]']
    if _has_own_certificates():
        changes += [f"--change=ENV {name}={BUNDLE}" for name in BUNDLE_VARIABLES]
    imported = _docker("import", *changes, str(archive), tag)
    if imported.returncode:
        raise BaseImageError(f"docker import failed: {imported.stderr.strip()}")


def _has_own_certificates() -> bool:
    return any(HOST_CERTIFICATES.glob("*.crt"))


def _docker(*args: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *args], capture_output=True, text=True, timeout=timeout_s)


if __name__ == "__main__":
    try:
        print(ensure_base_image(*sys.argv[1:]))
    except BaseImageError as e:
        sys.exit(str(e))
