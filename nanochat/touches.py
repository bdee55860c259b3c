"""Every file from outside that a stage opens: the one list for plan, preflight, fetch and stages.

* A path is relative to a data folder: `SOURCE/FILE`, FILE as the publisher names it. Data folders
  are the image's /opt/nanochat/data, looked in first, and NANOCHAT_HOME/data, which is written.
* `data.lock.json` beside this module says where each source comes from and what was read of its
  files at the publisher; a `data.lock.json` in a source's folder says what was fetched.
* Folders that stages make themselves (shards of the embedded corpus, token caches) are `made`.

No torch here, also indirectly.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.rundir import IMAGE_DATA, nanochat_home, read_json
from nanochat.spec import GENERATED_TASKS, Data, RunSpec, SpecError

LOCK_NAME = "data.lock.json"
LOCK_FORMAT = 1

FINEWEB = "fineweb_edu"
FINEWEB_LAST_SHARD = 1_822
"""karpathy/fineweb-edu-100b-shuffle has shards 0 to 1822; the last is the validation split."""

VOCABULARIES = ("tokenizers/gpt2.tiktoken", "tokenizers/cl100k_base.tiktoken")
"""Published vocabularies that tok_train compares with, where somebody has put them there."""

TEXT_STAGES = ("data_fetch", "tok_train", "base_train")

Split = Literal["train", "validation", "test"]

ONE = "00000-of-00001.parquet"
TASK_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "arc_easy": {s: (f"arc/ARC-Easy/{s}-{ONE}",) for s in ("train", "validation", "test")},
    "arc_challenge": {
        s: (f"arc/ARC-Challenge/{s}-{ONE}",) for s in ("train", "validation", "test")
    },
    # no validation file: a part of the training file is held out by hash
    "gsm8k": {
        "train": (f"gsm8k/main/train-{ONE}",),
        "validation": (f"gsm8k/main/train-{ONE}",),
        "test": (f"gsm8k/main/test-{ONE}",),
    },
    "mmlu": {"test": (f"mmlu/all/test-{ONE}",)},
    "mmlu_aux": {
        "train": (f"mmlu/all/auxiliary_train-{ONE}",),
        "validation": (f"mmlu/all/validation-{ONE}",),
    },
    "humaneval": {"test": (f"humaneval/openai_humaneval/test-{ONE}",)},
    "smoltalk": {
        "train": tuple(f"smoltalk/data/train-{i:05d}-of-00004.parquet" for i in range(4)),
        "validation": (f"smoltalk/data/test-{ONE}",),
    },
    "core": {"test": ("core/eval_bundle.zip",)},
}
"""Files of the published tasks by split; a split that is not there does not exist."""


@dataclass(frozen=True)
class Touch:
    """A file, or a folder of files, that a stage opens."""

    stage: str
    path: str
    """Relative to a data folder, or absolute for a file of the user's own."""
    required: bool = True
    """Without it the stage cannot run."""

    @property
    def source(self) -> str:
        """The first part of the path: the source in data.lock.json."""
        return self.path.partition("/")[0]


def touched_files(spec: RunSpec) -> list[Touch]:
    """Files of every stage that is switched on, in run order; what two stages read is there twice.

    Raises SpecError for a task that has no such split, or for more shards than there are.
    """
    return list(_touches(*_reads(spec)))


def published_paths(spec: RunSpec) -> tuple[str, ...]:
    """Paths without which a stage cannot run and that a publisher has, each once, in run order."""
    return _published(*_reads(spec))


Reads = tuple[tuple[str, ...], tuple[tuple[str, str, Split], ...]]
"""Files of the text; (stage, task, split) for every other stage, `` for the task of the text."""


def _reads(spec: RunSpec) -> Reads:
    """What of a spec its files follow from: little and hashable, since a plan asks for every model
    that it tries, and hundreds of shards are the same for all of them."""
    reads: list[tuple[str, str, Split]] = []
    for stage in spec.stages:
        if stage in TEXT_STAGES:
            reads.append((stage, "", "train"))
        reads += [(stage, task, split) for task, split in task_splits(spec, stage)]
    return _text_files(spec.data), tuple(reads)


@functools.lru_cache(maxsize=64)
def _touches(text: tuple[str, ...], reads: tuple[tuple[str, str, Split], ...]) -> tuple[Touch, ...]:
    touches = []
    for stage, task, split in reads:
        paths = task_files(task, split) if task else text
        touches += [Touch(stage, path) for path in paths]
        if stage == "tok_train":
            touches += [Touch(stage, path, required=False) for path in VOCABULARIES]
    return tuple(touches)


@functools.lru_cache(maxsize=64)
def _published(text: tuple[str, ...], reads: tuple[tuple[str, str, Split], ...]) -> tuple[str, ...]:
    needed = (touch.path for touch in _touches(text, reads) if touch.required)
    return tuple(dict.fromkeys(path for path in needed if not Path(path).is_absolute()))


def task_splits(spec: RunSpec, stage: str) -> list[tuple[str, Split]]:
    """What a stage reads of which tasks."""
    if stage in ("mid_train", "chat_sft"):
        mixture = getattr(spec, stage).mixture
        return [(task, split) for task in mixture for split in ("train", "validation")]
    if stage == "chat_rl" and spec.chat_rl is not None:
        return [(spec.chat_rl.task, "train"), (spec.chat_rl.task, "validation")]
    if stage == "evaluate" and spec.evaluate is not None:
        return [(task, "test") for task in spec.evaluate.tasks]
    return []


def task_files(task: str, split: Split) -> tuple[str, ...]:
    """Files of a task's split; none for a generated task. Raises SpecError for an unknown split."""
    if task in GENERATED_TASKS:
        return ()
    splits = TASK_FILES[task]
    if split not in splits:
        hint = "; mmlu_aux is the set to train on" if task == "mmlu" else ""
        raise SpecError(f"{task} has no {split} split (it has {', '.join(splits)}){hint}")
    return splits[split]


@functools.lru_cache(maxsize=64)
def fineweb_files(num_shards: int) -> tuple[tuple[str, ...], str]:
    """(training shards, validation shard). Raises SpecError for more shards than there are."""
    if num_shards > FINEWEB_LAST_SHARD:
        raise SpecError(
            f"data.num_shards = {num_shards}: fineweb_edu has {FINEWEB_LAST_SHARD} training shards"
        )
    return tuple(_shard(i) for i in range(num_shards)), _shard(FINEWEB_LAST_SHARD)


def _shard(index: int) -> str:
    return f"{FINEWEB}/shard_{index:05d}.parquet"


def _text_files(data: Data) -> tuple[str, ...]:
    if data.source == "fineweb_edu":
        train, val = fineweb_files(data.num_shards)
        return (*train, val)
    if data.source == "text" and data.path is not None:
        return (str(Path(data.path).absolute()),)
    return ()


def made_folders(data: Data) -> tuple[str, ...]:
    """Folders of a data folder that the stages fill themselves."""
    made = {"embedded": ("embedded",), "text": ("text",), "fineweb_edu": ()}[data.source]
    return (*made, "tokens") if data.cache else made


# -- places


def data_roots() -> tuple[Path, ...]:
    """Data folders in the order in which they are looked at; the last one is written."""
    return IMAGE_DATA, nanochat_home() / "data"


def roots_text(roots: tuple[Path, ...] | None = None) -> str:
    """The data folders, for messages."""
    return " and ".join(str(root) for root in roots or data_roots())


def find(path: str, roots: tuple[Path, ...] | None = None) -> Path | None:
    """Where a path of the list lies; an absolute one lies where it says."""
    for root in roots or data_roots():
        if (root / path).exists():
            return root / path
    return None


def require(path: str) -> Path:
    """`find`; raises SpecError where it is nowhere."""
    found = find(path)
    if found is None:
        raise SpecError(
            f"{path} is missing (looked in {roots_text()}). Bring it on a machine with network: "
            "nanochat fetch @CONFIG"
        )
    return found


def missing_files(spec: RunSpec) -> dict[str, list[str]]:
    """What is not there, or has not the size that its lock says, by the stage that opens it first.

    The entries name the file; one of the wrong size has that added.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for touch in touched_files(spec):
        if not touch.required or touch.path in seen or _is_cut(spec.data, touch):
            continue
        seen.add(touch.path)
        if problem := _problem(touch.path):
            found.setdefault(touch.stage, []).append(problem)
    return found


def _problem(path: str) -> str | None:
    place = find(path)
    if place is None:
        return path
    source, _, name = path.partition("/")
    shipped = (package_lock().get(source) or {}).get("files") or {}
    entry = fetched_entry(path) or shipped.get(name) or {}
    size = place.stat().st_size
    if entry.get("size") not in (None, size):
        return f"{path} (has {size} bytes, its lock says {entry['size']})"
    return None


def _is_cut(data: Data, touch: Touch) -> bool:
    """Whether shards were already made from a text file that has since gone."""
    if data.source != "text" or not Path(touch.path).is_absolute():
        return False
    stem = Path(touch.path).stem
    folders = [folder for root in data_roots() for folder in root.glob(f"text/{stem}-*")]
    return any((folder / LOCK_NAME).exists() for folder in folders)


@dataclass(frozen=True)
class SourceFacts:
    """One source of a spec, for the plan."""

    source: str
    licence: str | None
    revision: str | None
    """Commit at the publisher; None until a first fetch has settled it."""
    files: int
    missing: int
    bytes: int
    """Of all files; what no lock knows is estimated."""
    missing_bytes: int
    first_seen: int
    """Files that no list of the kit knows: what a first fetch brings is trusted, and noted."""


def source_facts(spec: RunSpec) -> list[SourceFacts]:
    """What the stages of a spec read from publishers, source by source."""
    found, all_roots = [], data_roots()
    for source, paths in _by_source(published_paths(spec)):
        roots = tuple(root for root in all_roots if (root / source).exists())
        places = [find(path, roots) if roots else None for path in paths]
        sizes = tuple(None if place is None else place.stat().st_size for place in places)
        revision = package_lock()[source].get("revision") or _fetched_revision(source, roots)
        found.append(_source_facts(source, paths, sizes, revision))
    return found


@functools.lru_cache(maxsize=64)
def _by_source(paths: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    by_source: dict[str, list[str]] = {}
    for path in paths:
        by_source.setdefault(path.partition("/")[0], []).append(path)
    return tuple((source, tuple(found)) for source, found in by_source.items())


@functools.lru_cache(maxsize=64)
def _source_facts(
    source: str, paths: tuple[str, ...], sizes: tuple[int | None, ...], revision: str | None
) -> SourceFacts:
    """sizes: of each path in bytes, None where it is missing."""
    shipped = package_lock()[source]
    total_bytes = missing_bytes = missing = first_seen = 0
    for path, there in zip(paths, sizes, strict=True):
        entry = shipped["files"].get(path.partition("/")[2], {})
        size = there or entry.get("size") or shipped["about_bytes_per_file"]
        total_bytes += size
        first_seen += entry.get("sha256") is None
        if there is None:
            missing += 1
            missing_bytes += size
    return SourceFacts(
        source=source,
        licence=shipped["licence"],
        revision=revision,
        files=len(paths),
        missing=missing,
        bytes=total_bytes,
        missing_bytes=missing_bytes,
        first_seen=first_seen,
    )


def _fetched_revision(source: str, roots: tuple[Path, ...]) -> str | None:
    for root in roots:
        lock = read_json(root / source / LOCK_NAME)
        if isinstance(lock, dict) and isinstance(lock.get("revision"), str):
            return str(lock["revision"])
    return None


# -- locks


@functools.cache
def package_lock() -> dict[str, Any]:
    """Source -> {hub or url, revision, licence, files, …} as shipped with the kit."""
    text = Path(__file__).with_name(LOCK_NAME).read_text(encoding="utf-8")
    sources: dict[str, Any] = json.loads(text)["sources"]
    return sources


def folder_lock(folder: Path) -> dict[str, Any]:
    """`files` of the lock in a source's folder: name -> {size, sha256, …}; empty without one."""
    lock = read_json(folder / LOCK_NAME)
    files = lock.get("files") if isinstance(lock, dict) else None
    return files if isinstance(files, dict) else {}


def fetched_entry(path: str, roots: tuple[Path, ...] | None = None) -> dict[str, Any] | None:
    """What the lock beside a fetched file says about it; None where it says nothing."""
    source, _, name = path.partition("/")
    for root in roots or data_roots():
        if (root / path).exists():
            entry = folder_lock(root / source).get(name)
            return entry if isinstance(entry, dict) else None
    return None
