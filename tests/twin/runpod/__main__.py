"""Serve the cloud in a box until Ctrl-C: `python -m tests.twin.runpod [IMAGE] [PORT]`."""

import signal
import sys

from tests.twin.engine import image_tag
from tests.twin.runpod.cloud import Cloud

if __name__ == "__main__":
    image = sys.argv[1] if len(sys.argv) > 1 else image_tag()
    with Cloud(image, port=int(sys.argv[2]) if len(sys.argv) > 2 else 8899) as cloud:
        print(f"RUNPOD_API_BASE_URL={cloud.url} RUNPOD_API_KEY={cloud.account.key}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
