"""Build step: bring the data of one choice into a cache folder and copy it to what becomes a layer.

What this imports, the configs and data.lock.json are all that the data depends on: the Dockerfile
copies just those files here (tests/unit/test_image.py compares), so that other code can change and
neither a fetch nor the copy of what may be tens of GB is done again.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

from infra.fetch import fetch
from infra.fetch_progress import progress_here
from nanochat.rundir import EXIT_DONE, EXIT_SPEC
from nanochat.spec import SpecError, load_spec
from nanochat.touches import LOCK_NAME

LOCK = Path("nanochat") / LOCK_NAME
CONFIG_OF = {"cpu": "cpu_small"}
"""Choices that are no config's name."""
SECRET = Path("/run/secrets/HF_TOKEN")
NOT_DATA = shutil.ignore_patterns(".fetch.lock", ".*.part")


def main() -> int:
    """Exit code of the fetch; the build fails where it is not 0."""
    # From the folder that the Dockerfile has copied nanochat, infra and configs to.
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("choice", help="smoke, cpu, d20, none or the name of a config")
    parser.add_argument("cache", type=Path, help="folder that outlives the build")
    parser.add_argument("target", type=Path, help="what becomes /opt/nanochat/data")
    args = parser.parse_args()
    if args.choice == "none":
        return EXIT_DONE
    if SECRET.is_file():
        os.environ["HF_TOKEN"] = SECRET.read_text().strip()
    config = Path("configs") / f"{CONFIG_OF.get(args.choice, args.choice)}.toml"
    try:
        spec = load_spec(config)
        folder = args.cache / f"{config.stem}-{_key(config)}"
        result = fetch(spec, folder, progress=progress_here())
    except SpecError as e:
        sys.stderr.write(f"{e}\n")
        return EXIT_SPEC
    sys.stderr.write(result.render() + "\n")
    if result.exit_code == EXIT_DONE:
        shutil.copytree(folder, args.target, symlinks=True, ignore=NOT_DATA)
        _make_read_only(args.target)
    return result.exit_code


def _key(config: Path) -> str:
    """Of a list of files and a hub: what another build has brought is not this one's data."""
    parts = (config.read_bytes(), LOCK.read_bytes(), os.environ.get("HF_ENDPOINT", ""))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _make_read_only(folder: Path) -> None:
    """Readable by any --user, writable by none."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        path.chmod(0o555 if path.is_dir() else 0o444)


if __name__ == "__main__":
    sys.exit(main())
