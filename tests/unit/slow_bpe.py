"""Byte pair encoding as one would explain it: the oracle for rustbpe. Slow on purpose.

* Of the most frequent pairs of adjacent tokens the one with the smallest ids is merged.
* A text is split into pieces by the pattern; no token crosses the end of a piece.
"""

import collections
from collections.abc import Iterable

import regex

Pair = tuple[int, int]


def merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from left to right, replaced by `new_id`."""
    merged: list[int] = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged


def train(texts: Iterable[str], vocab_size: int, pattern: str) -> list[Pair]:
    """The merges; fewer than `vocab_size - 256` when no pair is left."""
    counts = collections.Counter(p for text in texts for p in regex.findall(pattern, text) if p)
    words = [(list(piece.encode()), count) for piece, count in counts.items()]
    merges: list[Pair] = []
    while 256 + len(merges) < vocab_size:
        pairs: collections.Counter[Pair] = collections.Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new_id = 256 + len(merges)
        words = [(merge(ids, best, new_id), count) for ids, count in words]
        merges.append(best)
    return merges


def encode(text: str, merges: list[Pair], pattern: str) -> list[int]:
    """Ids of a text: in each piece the earliest merge first, until none applies."""
    rank = {pair: i for i, pair in enumerate(merges)}
    out: list[int] = []
    for piece in regex.findall(pattern, text):
        ids = list(piece.encode())
        while True:
            known = [p for p in zip(ids, ids[1:], strict=False) if p in rank]
            if not known:
                break
            first = min(known, key=lambda pair: rank[pair])
            ids = merge(ids, first, 256 + rank[first])
        out += ids
    return out
