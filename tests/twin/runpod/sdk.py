"""A Python that has the RunPod SDK beside the packages of the kit, as in the environment of
`make cloud-venv`; made once in build/.

The SDK's dependencies and the kit's lock do not fit into one environment (dateutil), so the SDK has
its own, which finds everything else in the environment of the tests.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.twin.engine import ROOT

LOCK = Path(__file__).with_name("sdk.lock")


def python_with_sdk() -> Path:
    """Its interpreter. Raises CalledProcessError where the registry does not answer."""
    folder = ROOT / "build" / "runpod-sdk"
    python, done = folder / "bin" / "python", folder / "lock"
    if done.exists() and done.read_bytes() == LOCK.read_bytes():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = ["uv", "pip", "install", "--quiet", "--require-hashes", "-r", str(LOCK)]
    subprocess.run([sys.executable, "-m", *install, "--python", str(python)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # behind its own packages, which win
    (site / "zz_kit.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done.write_bytes(LOCK.read_bytes())
    return python
