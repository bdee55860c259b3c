"""The hub of the cluster in a box, on the login node: `python3 -m tests.twin.slurm.data_server`.

It has GSM8K's files by name; what is in them matters to nobody who never opens them. Prints the
address for HF_ENDPOINT, then serves.
"""

import threading

from tests.twin.hub import Hub

FILES = ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet")
FILE_BYTES = 3_000_000


def main() -> None:
    """Serve until killed."""
    with Hub() as hub:
        for name in FILES:
            hub.repositories["openai/gsm8k"][name] = name.encode() * (FILE_BYTES // len(name))
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
