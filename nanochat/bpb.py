"""Bits per byte: of a model, and of a bigram model as the bar that it has to pass.

Bits per byte do not depend on the vocabulary: the bits of all targets divided by the bytes that
they stand for. Special tokens stand for no bytes and are left out on both sides of the fraction.
"""

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanochat.data import IGNORE_INDEX, ValidationSet

log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_bpb(
    nll: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    validation: ValidationSet,
    token_bytes: np.ndarray,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], object] | None = None,
) -> float:
    """Bits per byte on the validation set; NaN where none of its targets stands for bytes.

    nll: (inputs, targets, doc_ids) -> [B, T] negative log-likelihood in nats per target (any value
    where the target is IGNORE_INDEX). token_bytes: [vocab_size], UTF-8 bytes of a token, 0 for
    special tokens. sum_over_ranks: all-reduces a float64 CPU tensor in place. Sums are float64 on
    the CPU, so the result hardly depends on batch size and number of ranks.
    """
    lengths = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
    totals = torch.zeros(2, dtype=torch.float64)  # nats, bytes
    for inputs, targets, doc_ids in validation:
        ids = None if doc_ids is None else doc_ids.to(device)
        nats = nll(inputs.to(device), targets.to(device), ids).float().cpu().double()
        counted = targets != IGNORE_INDEX
        num_bytes = torch.where(counted, lengths[targets.clamp(min=0)], 0)
        totals[0] += nats[num_bytes > 0].sum()
        totals[1] += num_bytes.sum()
    if sum_over_ranks is not None:
        sum_over_ranks(totals)
    nats_total, bytes_total = totals.tolist()
    if bytes_total == 0:
        log.warning("the validation rows hold no targets: give the stage more eval_tokens")
        return math.nan
    return float(nats_total / math.log(2) / bytes_total)


def bigram_bpb(
    train: np.ndarray, val: np.ndarray, token_bytes: np.ndarray, vocab_size: int
) -> float:
    """Bits per byte on `val` of a bigram model counted on `train`.

    Interpolated with Witten-Bell smoothing (Witten and Bell 1991), which has nothing to tune:
    P(b | a) = (c(a, b) + u(a) P(b)) / (c(a) + u(a)), with u(a) the number of different tokens seen
    after a, and P(b) = (c(b) + 1) / (N + vocab_size). train, val: integer token streams [n].
    """
    train = np.asarray(train, dtype=np.int64)
    val = np.asarray(val, dtype=np.int64)
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    context = np.bincount(train[:-1], minlength=vocab_size)

    first, second = val[:-1], val[1:]
    wanted = first * vocab_size + second
    at = np.minimum(np.searchsorted(pairs, wanted), max(0, len(pairs) - 1))
    seen = np.where(pairs[at] == wanted, counts[at], 0) if len(pairs) else np.zeros(len(wanted))
    u, c = followers[first], context[first]
    unseen_context = c + u == 0
    smoothed = (seen + u * unigram[second]) / np.maximum(c + u, 1)
    probability = np.where(unseen_context, unigram[second], smoothed)

    num_bytes = np.asarray(token_bytes, dtype=np.int64)[second]
    bits = -np.log2(probability[num_bytes > 0]).sum()
    return float(bits / num_bytes.sum())
