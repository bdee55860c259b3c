"""The forward pass of generation: a GPT's weights, arranged once for many small steps.

- One product gives queries, keys and values; the weights of all three lie in one matrix.
- On a CPU the products go to oneDNN with weights packed beforehand. torch's own choice, MKL, is 2
  to 3 times slower on AMD's processors, for one row as for many. On Intel's it is the faster one
  in float32 for one and two rows (1.8 against 2.5 ms for the weights of a d6 on Sapphire Rapids)
  and the slower one for more (7.5 against 6.1 ms for 16 rows).
- The weights are a copy in the compute dtype, made when the object is: what is trained afterwards
  is not seen.

The arithmetic is that of gpt.py; `tests/unit/test_inference.py` holds it to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.distributed import is_amd_cpu
from nanochat.gpt import GPT, NORM_EPS, Block, norm
from nanochat.kvcache import KVCache

Append = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, new keys, new values) -> all keys, all values; as KVCache.append."""

PLAIN_ROWS, MANY_ROWS = 2, 64
"""Where ByRows changes over, and what it packs for. PackedProduct's 16 was best for 1 to 64 rows on
Zen 4; for 8 and 16 rows on Sapphire Rapids 64 was 10 to 25 % faster."""


EPS = torch.tensor(NORM_EPS)


class Product(Protocol):
    """Multiplication with a weight of shape [out, in]."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [..., out] plus the product."""


@dataclass(frozen=True)
class PlainProduct:
    """By torch, on any device."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + F.linear(x, self.weight)


class PackedProduct:
    """By oneDNN, with the operators that torch's own compiler uses on CPUs."""

    def __init__(self, weight: Tensor, for_rows: int = 16) -> None:
        """for_rows: rows that oneDNN chooses its layout for."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, for_rows)

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._packed, None, "add"
        )
        return product


class ByRows:
    """By torch for few rows, by oneDNN for many."""

    def __init__(self, weight: Tensor) -> None:
        self._few, self._many = PlainProduct(weight), PackedProduct(weight, MANY_ROWS)

    def _pick(self, x: Tensor) -> Product:
        return self._few if x.numel() <= PLAIN_ROWS * x.size(-1) else self._many

    def __call__(self, x: Tensor) -> Tensor:
        return self._pick(x)(x)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._pick(x).added_to(residual, x)


def make_product(weight: Tensor) -> Product:
    """The fastest product there is for the weight's device and dtype.

    By the processor's name and not by a timing, so that a resumed evaluation rounds as before.
    """
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        return PlainProduct(weight)
    if weight.dtype == torch.float32 and not is_amd_cpu():
        return ByRows(weight)
    return PackedProduct(weight)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's operators, and this processor those of the dtype."""
    operators = torch.ops.mkldnn
    has_them = torch.backends.mkldnn.is_available() and hasattr(operators, "_reorder_linear_weight")
    if not has_them or dtype != torch.bfloat16:
        return has_them
    return bool(operators._is_mkldnn_bf16_supported())


def norm_by_few(x: Tensor) -> Tensor:
    """gpt.norm of float32 in four small operations; torch's own is ten of them on a CPU, which for
    one row is all that it costs (6.7 against 3.9 us on Zen 5)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(EPS, length, length, value=1 / x.size(-1)).rsqrt_()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """gpt.rotate in three operations. cos, sin: over the whole head_dim, as `whole_head` gives."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def whole_head(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of RoPE, [seq_len, head_dim / 2], as `turn` wants them: [seq_len, head_dim]."""
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


@dataclass(frozen=True)
class Layer:
    """The products of one block."""

    qkv: Product
    out: Product
    up: Product
    down: Product


class Inference:
    """Logits of a GPT for generation; see the module text."""

    def __init__(
        self, model: GPT, dtype: torch.dtype, *, compile: bool = False, keep_weights: bool = True
    ) -> None:
        """dtype: of the weights here and of the KV cache. compile: `decode_rows` by torch.compile,
        which then chooses the products. keep_weights: False empties the model, so that its weights
        are not in memory twice."""
        self.config = model.config
        self.dtype = dtype
        self.cos, self.sin = whole_head(model.cos, model.sin)
        is_plain = dtype == torch.float32 and self.cos.device.type == "cpu" and not compile
        self._norm = norm_by_few if is_plain else norm
        self.decode_rows: Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor] = (
            torch.compile(self._decode_rows, fullgraph=True, dynamic=False)
            if compile
            else self._decode_rows
        )

        def arranged(*weights: Tensor) -> Product:
            parts = [w.detach().to(dtype) for w in weights]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            if not keep_weights:
                for w in weights:
                    w.data = w.data.new_empty(0)
            return PlainProduct(whole) if compile else make_product(whole)

        self.embedding = model.wte.weight.detach().to(dtype)
        self.layers: list[Layer] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            qkv = arranged(attn.c_q.weight, attn.c_k.weight, attn.c_v.weight)
            out = arranged(attn.c_proj.weight)
            self.layers.append(
                Layer(qkv, out, arranged(mlp.c_fc.weight), arranged(mlp.c_proj.weight))
            )
        self.head = arranged(model.lm_head.weight)

    def __call__(self, idx: Tensor, last: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, vocab_size] (float32) of the tokens behind positions `last` of idx, without
        the soft cap, which changes no order (sampling.py has it).

        idx: [B, T] int64. last: [B] int64, below T; or [B, K], and the logits are
        [B, K, vocab_size]. cache: its B rows are continued by idx.
        """
        n_tokens = idx.size(1)
        if cache is None:
            cos, sin, mask = self.cos[None, :n_tokens], self.sin[None, :n_tokens], None
        else:
            positions, mask = cache.begin(n_tokens)
            cos, sin = self.cos[positions], self.sin[positions]
        append = None if cache is None else cache.append
        x = self._features(idx, cos, sin, mask, append)
        if cache is not None:
            cache.finish(n_tokens)
        if n_tokens > 1 or last.dim() == 2:
            rows = torch.arange(x.size(0), device=x.device)
            x = x[rows[:, None] if last.dim() == 2 else rows, last]
        else:
            x = x[:, 0]
        return self.head(self._norm(x)).float()

    def _decode_rows(
        self, idx: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """One token for every row of a cache, in shapes that hardly change (for torch.compile).

        idx: [B] int64, B all rows of the cache. positions: [B] int64, where the tokens go. keys,
        values: the cache's, per layer, cut behind the longest row or later. Rows not in use are
        computed too; what they leave behind their own length is never seen. Returns logits
        [B, vocab_size] as above.
        """
        rows = torch.arange(idx.size(0), device=idx.device)
        places = torch.arange(keys[0].size(2), device=idx.device)
        mask = (places <= positions[:, None])[:, None, None]

        def append(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys[layer][rows, :, positions] = k[:, :, 0]
            values[layer][rows, :, positions] = v[:, :, 0]
            return keys[layer], values[layer]

        cos, sin = self.cos[positions, None], self.sin[positions, None]
        x = self._features(idx[:, None], cos, sin, mask, append)
        return self.head(self._norm(x[:, 0])).float()

    def _features(
        self, idx: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, append: Append | None
    ) -> Tensor:
        """What the last block gives, [B, T, n_embd]. cos, sin: [B or 1, T, head_dim]."""
        cos, sin = cos[:, None], sin[:, None]
        x = self._norm(F.embedding(idx, self.embedding))
        for i, layer in enumerate(self.layers):
            q, k, v = self._queries_keys_values(layer.qkv(self._norm(x)), cos, sin)
            if append is not None:
                k, v = append(i, k, v)
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and q.size(2) > 1,
                enable_gqa=self.config.n_head != self.config.n_kv_head,
            )
            x = layer.out.added_to(x, y.transpose(1, 2).reshape(x.shape))
            x = layer.down.added_to(x, layer.up(self._norm(x)).relu_().square_())
        return x

    def _queries_keys_values(
        self, qkv: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, n_head, T, head_dim], k and v [B, n_kv_head, T, head_dim] of a qkv product."""
        n_head, n_kv_head = self.config.n_head, self.config.n_kv_head
        heads = qkv.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        qk, v = heads.split((n_head + n_kv_head, n_kv_head), dim=1)
        qk = self._norm(turn(qk, cos, sin)).to(v.dtype)
        q, k = qk.split((n_head, n_kv_head), dim=1)
        return q, k, v
