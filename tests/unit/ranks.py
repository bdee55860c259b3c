"""Start a function on several ranks of this machine, for tests: real processes, gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from nanochat import distributed

# A server that imports the slow modules once, and forks: ranks start in a fraction of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["nanochat.gpt", "nanochat.optim", "nanochat.checkpoint", "torch._dynamo", "pytest"]
)


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(dist, *args) on every rank; what each returned. An error on a rank is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _context.Pool(world_size, maxtasksperchild=1) as pool:
        jobs = [(rank, world_size, port, function, args) for rank in range(world_size)]
        results = pool.starmap_async(_run, jobs, chunksize=1).get(timeout=60)
    return [pickle.loads(result) for result in results]


def _run(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    """The pickled result; the pool itself would send tensors by files of the sender, which ends."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.joined("cpu") as dist:
        return pickle.dumps(function(dist, *args))


def exit_codes(world_size: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """function(dist, *args) on every rank, each of which may be killed; their exit codes.

    function is a module's own, importable by name. The ranks end without the interpreter's
    clean-up, since the peers of a killed one hang in it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        _context.Process(target=_run_and_exit, args=(rank, world_size, port, function, args))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=300)
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def _run_and_exit(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        _run(rank, world_size, port, function, args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
