"""State dicts as safetensors files, and back, also on another number of ranks.

* Who writes what, and who needs which part of what was written, is planned by
  torch.distributed.checkpoint: replicated tensors are spread over the ranks, DTensors are written
  as the shards they are and cut anew on load.
* The files are our own: torch's writer keeps its index as a pickle, which runs code when loaded.
  Here each rank writes one plain safetensors file per top-level key of the state, and the index is
  JSON. Nothing in a checkpoint is ever unpickled.
* Numbers and strings in the state (a learning rate, betas) travel as JSON beside the tensors.
"""

import json
import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from typing_extensions import Buffer

from nanochat.checkpoint_dir import CheckpointError, DamagedCheckpoint
from nanochat.storage import FileRecord, Storage

State = dict[str, Any]
"""Nested dicts and lists; leaves are tensors (also DTensors) or JSON values."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format spells them."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


INDEX_BYTES = 512
"""Room for the entries of one box in the header of its file and in state.json."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the place of its bytes."""

    offset: list[int]
    """Of the box in the whole tensor."""
    shape: list[int]
    file: str
    start: int
    """First byte in the file; the elements follow in C order, little-endian."""


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor and the boxes it was written as."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


Index = dict[str, TensorRecord]


def index_from_json(raw: dict[str, Any]) -> Index:
    """The index of all tensors as it stands in state.json."""
    return {
        name: TensorRecord(r["dtype"], r["shape"], [Chunk(**c) for c in r["chunks"]])
        for name, r in raw.items()
    }


def index_to_json(index: Index) -> dict[str, Any]:
    """Inverse of index_from_json."""
    return {name: asdict(record) for name, record in index.items()}


# -----------------------------------------------------------------------------
# nested state <-> flat names


def _leaves(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(node, list | tuple) and any(isinstance(c, Tensor | dict) for c in node):
        for i, child in enumerate(node):
            yield from _leaves(child, (*path, i))
    else:
        yield path, node


def flatten(state: State) -> tuple[dict[str, Tensor], State]:
    """(tensors, JSON values) by their path, joined with dots.

    Raises CheckpointError for a leaf that is neither.
    """
    tensors: dict[str, Tensor] = {}
    values: State = {}
    for path, leaf in _leaves(state, ()):
        name = ".".join(map(str, path))
        assert name not in tensors and name not in values, f"two entries are called {name}"
        if isinstance(leaf, Tensor):
            if leaf.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{name} is {leaf.dtype}, which safetensors cannot hold")
            tensors[name] = leaf
        else:
            try:
                json.dumps(leaf)
            except TypeError:
                raise CheckpointError(
                    f"{name} is a {type(leaf).__name__}; a checkpoint holds tensors and JSON values"
                ) from None
            values[name] = leaf
    return tensors, values


def fill_values(state: State, values: State) -> None:
    """Put the JSON values of a checkpoint in their places. Raises CheckpointError if one lacks."""
    for path, leaf in list(_leaves(state, ())):
        if isinstance(leaf, Tensor):
            continue
        name = ".".join(map(str, path))
        if name not in values:
            raise CheckpointError(f"the checkpoint has no value {name}")
        node: Any = state
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = tuple(values[name]) if isinstance(leaf, tuple) else values[name]


# -----------------------------------------------------------------------------
# writing


@dataclass(frozen=True)
class WrittenFiles:
    """What one rank wrote."""

    files: dict[str, FileRecord]
    chunks: list[tuple[str, str, list[int], Chunk]]
    """(name, dtype, shape of the whole tensor, box)"""


def write_shards(
    items: list[WriteItem],
    resolve: Callable[[WriteItem], Tensor],
    folder: Path,
    rank: int,
    storage: Storage,
) -> WrittenFiles:
    """Write a rank's part: one safetensors file per top-level key, hashed while written.

    resolve: gives the data of an item, of the shape of its chunk, on any device.
    """
    by_group: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        by_group[item.index.fqn.split(".")[0]].append(item)
    written = WrittenFiles({}, [])
    for group, members in sorted(by_group.items()):
        name = f"{group}-{rank:05d}.safetensors"
        # Wide elements first: every tensor starts at a multiple of its element size.
        members.sort(key=lambda i: (-_dtype(i).itemsize, i.index.fqn, _box(i).offsets))
        header, chunks = _layout(members, name)
        with storage.new_file(folder / name) as f:
            f.write(header)
            for item in members:
                f.write(_as_bytes(resolve(item)))
        written.files[name] = f.record
        written.chunks.extend(chunks)
    return written


def plan_bytes(items: list[WriteItem]) -> int:
    """Bytes that a plan takes on the disk; its part of the indices is an upper bound."""
    return sum(math.prod(_box(i).sizes) * _dtype(i).itemsize + INDEX_BYTES for i in items)


def build_index(written: list[WrittenFiles]) -> Index:
    """The index of all tensors from what all ranks wrote."""
    index: Index = {}
    for name, dtype, shape, chunk in (c for w in written for c in w.chunks):
        index.setdefault(name, TensorRecord(dtype, shape, [])).chunks.append(chunk)
    return index


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _box(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _layout(
    items: list[WriteItem], file: str
) -> tuple[bytes, list[tuple[str, str, list[int], Chunk]]]:
    """Header of a safetensors file (length, JSON padded to 8 bytes) and where its parts lie."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, end = [], 0
    for item in items:
        assert item.tensor_data is not None
        box, fqn = _box(item), item.index.fqn
        whole = box.sizes == item.tensor_data.size
        begin, end = end, end + math.prod(box.sizes) * _dtype(item).itemsize
        entries[fqn if whole else f"{fqn}@{','.join(map(str, box.offsets))}"] = {
            "dtype": DTYPE_NAMES[_dtype(item)],
            "shape": list(box.sizes),
            "data_offsets": [begin, end],
        }
        placed.append((item, begin))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = [
        (
            item.index.fqn,
            DTYPE_NAMES[_dtype(item)],
            list(item.tensor_data.size if item.tensor_data else ()),
            Chunk(list(_box(item).offsets), list(_box(item).sizes), file, 8 + len(text) + begin),
        )
        for item, begin in placed
    ]
    return len(text).to_bytes(8, "little") + text, chunks


def _as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(cast(Buffer, flat.view(torch.uint8).numpy()))


# -----------------------------------------------------------------------------
# reading


class ShardReader:
    """Tensors of a checkpoint's files, mapped and not read until used."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self._index = index
        self._maps: dict[str, mmap.mmap] = {}

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """One box as a CPU tensor on the mapped file; writing to it does not touch the file."""
        dtype = DTYPES[self._index[name].dtype]
        count = math.prod(chunk.shape)
        if count == 0:
            return torch.empty(chunk.shape, dtype=dtype)
        flat = torch.frombuffer(self._map(chunk.file), dtype=dtype, count=count, offset=chunk.start)
        return flat.view(chunk.shape)

    def whole(self, name: str) -> Tensor:
        """A tensor put together from its boxes; a copy only where there is more than one."""
        record = self._index[name]
        if len(record.chunks) == 1:
            return self.chunk(name, record.chunks[0])
        tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for chunk in record.chunks:
            _box_of(tensor, chunk.offset, chunk.shape).copy_(self.chunk(name, chunk))
        return tensor

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy into these tensors (DTensors: the local shard), whatever ranks wrote them.

        Raises CheckpointError for a tensor that the checkpoint has not, or has otherwise.
        """
        for name, tensor in tensors.items():
            record = self._index.get(name)
            if record is None:
                raise CheckpointError(f"the checkpoint in {self._folder} has no tensor {name}")
            ours = (DTYPE_NAMES[tensor.dtype], list(tensor.shape))
            if ours != (record.dtype, record.shape):
                raise CheckpointError(
                    f"{name} is {record.dtype} {record.shape} in the checkpoint in {self._folder}, "
                    f"and {ours[0]} {ours[1]} here: the model or the optimizer of the spec differs"
                )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self._metadata(tensors), is_coordinator=True)
        places = {
            MetadataIndex(name, chunk.offset): chunk
            for name in tensors
            for chunk in self._index[name].chunks
        }
        for item in planner.create_local_plan().items:
            source = self.chunk(item.storage_index.fqn, places[item.storage_index])
            target = planner.resolve_tensor(item).detach()
            target.copy_(_box_of(source, item.storage_offsets, item.lengths))

    def _metadata(self, names: dict[str, Tensor]) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=DTYPES[self._index[name].dtype]),
                    size=torch.Size(self._index[name].shape),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape))
                        for c in self._index[name].chunks
                    ],
                )
                for name in names
            }
        )

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            try:
                with open(self._folder / file, "rb") as f:
                    self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as e:
                raise DamagedCheckpoint(f"{self._folder / file} is unreadable ({e})") from None
        return self._maps[file]


def _box_of(tensor: Tensor, offset: Any, shape: Any) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
