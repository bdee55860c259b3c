"""The hub of the cluster in a box: `python3 -m tests.twin.slurm.data_server FOLDER ADDRESS`.

Runs on the login node. What lies in FOLDER/OWNER/NAME/… are the files of the data set OWNER/NAME.
Prints its URL, for HF_ENDPOINT, then serves. Needs nothing but Python.
"""

import sys
import threading
from pathlib import Path

from tests.twin.hub import Hub


def main(argv: list[str]) -> None:
    """Serve until killed."""
    folder, address = Path(argv[0]), argv[1]
    with Hub(address=address, store_name=address) as hub:
        for file in folder.glob("*/*/**/*"):
            if file.is_file():
                owner, name, *rest = file.relative_to(folder).parts
                hub.repositories[f"{owner}/{name}"]["/".join(rest)] = file.read_bytes()
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
