"""Ranks that act together: what one of them cannot do, none of them believes done.

Messages go over a gloo group of its own, so that a thread may use it while the loop computes.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """Something failed on a rank; raised on all of them, the message names the rank."""


class LostRank(RankError):
    """A rank no longer answers: not a fault of what was done, and a new start may go on."""


class Agreement:
    """Calls that every rank makes in the same order, from one thread at a time.

    With world_size > 1 the constructor makes a process group: every rank has to construct it.
    timeout: longest wait for the slowest rank.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None

    def gather(self, mine: T) -> list[T]:
        """What every rank gives, in order of rank. Raises LostRank when a rank is gone."""
        if self._group is None:
            return [mine]
        gathered: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(gathered, mine, group=self._group)
        except RuntimeError as e:
            raise LostRank(f"a rank is gone: {e}") from e
        return gathered

    def all_ranks(self, act: Callable[[], T]) -> list[T]:
        """Do something on every rank; raises RankError on all when it failed on one.

        With one rank the error itself is raised.
        """
        if self.world_size == 1:
            return [act()]
        result: T | None = None
        error: Exception | None = None
        try:
            result = act()
        except Exception as e:
            error = e
        message = None if error is None else f"{type(error).__name__}: {error}"
        outcomes = self.gather((result, message))
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise RankError(f"rank {rank}: {message}") from error
        return [cast(T, result) for result, _ in outcomes]
