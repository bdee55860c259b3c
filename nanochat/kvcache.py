"""Keys and values of past tokens, preallocated, for rows of different lengths.

Continuous batching as the engine uses it: requests in flight occupy rows 0 .. n-1 without gaps.

    cache = KVCache(config, n_rows=16, max_len=2048, device=device, dtype=dtype)
    model(prompt, kv_cache=cache.rows(n, n + 1))      a request joins in row n (prefill)
    model(last_tokens, kv_cache=cache.rows(0, n + 1)) one token for every row (decode)
    cache.copy_row(source=n, to=i)                    row i has left: the last row fills its place
    cache.set_length(n, 0)

`copy_row` is also how many answers share one prompt, and `set_length` how a row forgets its end
(or the padding of a prefill whose prompts were of different lengths, padded on the right).
"""

import torch
from torch import Tensor

from nanochat.scaling import GPTConfig


class KVCache:
    """Keys and values, per layer [n_rows, n_kv_head, max_len, head_dim], and every row's length.

    A tensor per layer, so that a compiled step writes into each where it lies. `lengths` (CPU
    int64, [n_rows]) counts the valid tokens of each row; what lies behind them is never attended
    to. A view made by `rows` shares storage and lengths with its parent.
    """

    def __init__(
        self,
        config: GPTConfig,
        n_rows: int,
        max_len: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Raises ValueError where max_len exceeds seq_len, the last position that RoPE knows."""
        if max_len > config.seq_len:
            raise ValueError(
                f"a KV cache of {max_len} tokens is longer than the model's seq_len "
                f"{config.seq_len}; ask for at most {config.seq_len}"
            )
        shape = (n_rows, config.n_kv_head, max_len, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        self.lengths = torch.zeros(n_rows, dtype=torch.int64)
        self._positions = torch.empty(0, 0, dtype=torch.int64)
        self._uniform_start: int | None = 0
        self._stop = 0

    @property
    def n_rows(self) -> int:
        return len(self.lengths)

    @property
    def max_len(self) -> int:
        return self.keys[0].size(2)

    # -------------------------------------------------------------------------
    # For the engine

    def rows(self, start: int, stop: int) -> "KVCache":
        """View of rows start .. stop - 1."""
        assert 0 <= start < stop <= self.n_rows
        if stop - start == self.n_rows:
            return self
        view = object.__new__(KVCache)
        view.keys = [k[start:stop] for k in self.keys]
        view.values = [v[start:stop] for v in self.values]
        view.lengths = self.lengths[start:stop]
        return view

    def copy_row(self, *, source: int, to: int) -> None:
        """Overwrite row `to` with the tokens of row `source`."""
        length = int(self.lengths[source])
        for stored in (*self.keys, *self.values):
            stored[to, :, :length] = stored[source, :, :length]
        self.lengths[to] = length

    def set_length(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; 0 frees it."""
        assert 0 <= length <= self.max_len
        self.lengths[row] = length

    # -------------------------------------------------------------------------
    # For the model: begin, append per layer, finish

    def begin(self, n_new: int) -> tuple[Tensor, Tensor | None]:
        """Prepare for n_new tokens per row.

        Returns their positions [n_rows or 1, n_new] (int64, on the cache's device) and the mask
        [n_rows or 1, 1, n_new, stop], True where a key may be seen; None where the new tokens are
        the whole sequence (plain causal attention) or may see every key.
        Raises ValueError where a row would outgrow max_len.
        """
        self._stop = int(self.lengths.max()) + n_new
        if self._stop > self.max_len:
            raise ValueError(
                f"a row of {self._stop} tokens does not fit the KV cache of {self.max_len}"
            )
        shortest = self._stop - n_new
        uniform = bool((self.lengths == shortest).all())
        self._uniform_start = shortest if uniform else None
        starts = self.lengths[:1] if uniform else self.lengths
        positions = (starts[:, None] + torch.arange(n_new)).to(self.keys[0].device)
        self._positions = positions
        if uniform and (shortest == 0 or n_new == 1):
            return positions, None
        keys = torch.arange(self._stop, device=positions.device)
        return positions, (keys <= positions[:, :, None])[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [n_rows, n_kv_head, n_new, head_dim]; return all keys and values of the
        layer, [n_rows, n_kv_head, stop, head_dim]."""
        keys, values = self.keys[layer], self.values[layer]
        if self._uniform_start is not None:
            keys[:, :, self._uniform_start : self._stop] = k
            values[:, :, self._uniform_start : self._stop] = v
        else:
            row = torch.arange(self.n_rows, device=keys.device)[:, None]
            keys.transpose(1, 2)[row, self._positions] = k.transpose(1, 2).to(keys.dtype)
            values.transpose(1, 2)[row, self._positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self._stop], values[:, :, : self._stop]

    def finish(self, n_new: int) -> None:
        """Count the n_new tokens that every layer has appended."""
        self.lengths += n_new
