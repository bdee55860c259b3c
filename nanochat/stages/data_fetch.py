"""Make the data of the spec present and check all of it against its lock.

The embedded corpus and a text file become parquet shards here. Web shards are brought beforehand
(`nanochat fetch`); this stage needs no network and names what is missing.
"""

import time
from typing import Any

from nanochat.corpus import ensure
from nanochat.rundir import RunDir
from nanochat.stage import run_stage
from nanochat.touches import FINEWEB, fetched_entry, published_paths


def main(run: RunDir) -> dict[str, Any]:
    """Facts for the report: place, bytes and sha256 of the text, and by path the sha256 of what the
    later stages read besides, None where no lock knows it. Raises SpecError."""
    spec = run.spec()
    data = spec.data
    started = time.monotonic()
    files = ensure(data)
    seconds = time.monotonic() - started
    facts = {
        "source": data.source,
        "folder": str(files.train[0].path.parent),
        "train_shards": len(files.train),
        "train_bytes": sum(file.size for file in files.train),
        "val_shards": len(files.val),
        "val_bytes": sum(file.size for file in files.val),
        "sha256": {file.path.name: file.sha256 for file in files.train + files.val},
        "published_sha256": {
            path: (fetched_entry(path) or {}).get("sha256")
            for path in published_paths(spec)
            if not path.startswith(f"{FINEWEB}/")
        },
    }
    print(
        f"data: {facts['train_bytes']:,} bytes in {facts['train_shards']} training and "
        f"{facts['val_bytes']:,} in {facts['val_shards']} validation shards checked in "
        f"{seconds:.1f} s ({facts['folder']})",
        flush=True,
    )
    return facts


if __name__ == "__main__":
    run_stage("data_fetch", main)
