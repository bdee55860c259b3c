"""Conversations as tokens on disk, mapped into every rank instead of held by each of them.

* A mixture is rendered in blocks of CHUNK conversations, shared out over the ranks; a block that is
  there from a former process is not made again. d20's mixture is some 500 M tokens: 2 GB on the
  volume while the stage lasts, and next to nothing in the ranks' memory.
* A block is one file: a header line of JSON, the offsets as int64, then per token a uint32 whose
  highest bit says whether the assistant must produce it.
"""

import bisect
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.distributed import Dist
from nanochat.rundir import fsync_dir
from nanochat.tasks import Mixture
from nanochat.tokenizer import TokenizerLike, render_conversation

CHUNK = 2048
TARGET_BIT = np.uint32(1 << 31)
HEADER_BYTES = 512


@dataclass(frozen=True)
class Block:
    """Consecutive conversations in one file."""

    path: Path
    num_conversations: int
    num_tokens: int
    digest: str

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_conversations + 1]."""
        shape = (self.num_conversations + 1,)
        return np.memmap(self.path, np.int64, "r", offset=HEADER_BYTES, shape=shape)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """uint32 [num_tokens], with TARGET_BIT."""
        start = HEADER_BYTES + 8 * (self.num_conversations + 1)
        return np.memmap(self.path, np.uint32, "r", offset=start, shape=(self.num_tokens,))


class Rendered(Sequence[tuple[np.ndarray, np.ndarray]]):
    """(ids int32, mask uint8) of every conversation; reading one touches its own pages only."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = list(blocks)
        self._ends = np.cumsum([b.num_conversations for b in blocks]).tolist()
        self.num_tokens = sum(b.num_tokens for b in blocks)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [number of conversations]: tokens of each."""
        return np.concatenate([np.diff(b.offsets) for b in self._blocks])

    @property
    def fingerprint(self) -> str:
        """Differs when any token or mask does."""
        digests = "".join(block.digest for block in self._blocks)
        return hashlib.sha256(digests.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} conversations: {index}")
        number = bisect.bisect_right(self._ends, index)
        block = self._blocks[number]
        at = index - (self._ends[number] - block.num_conversations)
        start, stop = int(block.offsets[at]), int(block.offsets[at + 1])
        both = block.tokens[start:stop]
        mask = (both >> 31).astype(np.uint8)
        return (both & ~TARGET_BIT).astype(np.int32), mask


def render(
    mixture: Mixture,
    tokenizer: TokenizerLike,
    folder: Path,
    dist: Dist,
    on_progress: Callable[[float], None],
) -> Rendered:
    """All conversations of a mixture, whole; the ranks share the work.

    folder: on a volume that all ranks share; blocks of another mixture there are removed.
    on_progress: told the share that is done. Every rank has to call it.
    """
    key = json.dumps([mixture.key, tokenizer.fingerprint])
    home = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if dist.is_main:
        for other in folder.glob("*"):
            if other != home:
                shutil.rmtree(other, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    starts = range(0, len(mixture), CHUNK)
    paths = [home / f"block_{number:05d}" for number in range(len(starts))]
    own = range(dist.rank, len(starts), dist.world_size)
    for number in own:
        if _read_block(paths[number]) is None:
            indices = range(starts[number], min(starts[number] + CHUNK, len(mixture)))
            rendered = [render_conversation(tokenizer, mixture[i]) for i in indices]
            _write_block(paths[number], rendered)
        on_progress((number + 1) / len(starts))
    if own:
        fsync_dir(home)
    dist.barrier()
    found = [_read_block(path) for path in paths]
    blocks = [block for block in found if block is not None]
    assert len(blocks) == len(paths), f"{home} is not on a volume that all ranks share"
    return Rendered(blocks)


def _write_block(path: Path, rendered: list[tuple[list[int], list[int]]]) -> None:
    """Write a file under its final name only when all of it is on disk."""
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rendered)], dtype=np.int64)
    tokens = np.empty(int(offsets[-1]), dtype=np.uint32)
    for (ids, mask), start in zip(rendered, offsets.tolist(), strict=False):
        tokens[start : start + len(ids)] = np.asarray(ids, np.uint32) | (
            np.asarray(mask, np.uint32) << np.uint32(31)
        )
    body = offsets.tobytes() + tokens.tobytes()
    facts = {
        "num_conversations": len(rendered),
        "num_tokens": len(tokens),
        "digest": hashlib.blake2b(body, digest_size=16).hexdigest(),
    }
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(staged, "wb") as f:
        f.write(json.dumps(facts).encode().ljust(HEADER_BYTES - 1) + b"\n")
        f.write(body)
        f.flush()
        os.fsync(f.fileno())
    os.replace(staged, path)


def _read_block(path: Path) -> Block | None:
    """The block in a file, None where there is none, or not a whole one."""
    try:
        with open(path, "rb") as f:
            facts = json.loads(f.read(HEADER_BYTES))
        block = Block(path, **facts)
        size = HEADER_BYTES + 8 * (block.num_conversations + 1) + 4 * block.num_tokens
        return block if path.stat().st_size == size else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
