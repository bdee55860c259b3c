"""The transformer: nanochat's architecture of October 2025.

What is special here:
- RoPE and an RMS norm without weights on queries and keys ("QK norm"). nanochat rotates first; a
  rotation does not change the norm, and with the norm first the backward pass needs nothing
  but the product that is kept anyway: 10 KB less per token and block of d20.
- Untied embedding and head, an RMS norm behind the embedding and before the head, none of them
  with weights; no biases anywhere.
- relu(x)^2 in the MLP, of width 4 * n_embd; logits are soft-capped at 15.
- Grouped-query attention where n_kv_head < n_head.
- With targets, the loss never holds all logits (loss.py).
- Attention can be kept inside documents that share a row (`doc_ids`).

Parameters stay in the dtype they were made in; the compute dtype is autocast's where it is on.
`tests/unit/test_gpt.py` holds it to transformers' NanoChatForCausalLM.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nanochat.distributed import Dist
from nanochat.kvcache import KVCache
from nanochat.loss import Reduction, head_loss, softcap
from nanochat.scaling import GPTConfig

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6

Mask = Tensor | BlockMask | None


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) in nanochat's direction, pairing dimension i with i + head_dim / 2.

    x: [B, T, H, head_dim]; cos, sin: [B or 1, T, 1, head_dim / 2], float32.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_head != config.n_head
        self.widths = [n * config.head_dim for n in (config.n_head, *2 * [config.n_kv_head])]
        self.c_q, self.c_k, self.c_v = (
            nn.Linear(config.n_embd, width, bias=False) for width in self.widths
        )
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None
    ) -> Tensor:
        # One multiplication for all three; the weights stay apart: Muon orthogonalises each.
        weight = torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight))
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (t.view(heads) for t in F.linear(x, weight).split(self.widths, dim=-1))
        q = rotate(norm(q), cos, sin).to(v.dtype)
        k = rotate(norm(k), cos, sin).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal = mask is None and q.size(2) > 1
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=self.grouped)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
            )
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None
    ) -> Tensor:
        x = x + F.dropout(self.attn(norm(x), cos, sin, mask, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """Decoder-only language model; see the module text.

    Weights are random only after `init_weights`. Set `recompute` to trade one more forward pass
    for the activations of the blocks (activation checkpointing).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.compiled_by_block = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = self._rope_tables(self.wte.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        doc_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        logit_positions: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Loss where there are targets, else logits.

        idx: [B, T] int64, T <= seq_len. targets: [B, T] int64, -100 where no loss is wanted.
        doc_ids: [B, T] integers; a token sees only tokens of its own row with its own id.
        kv_cache: B rows; idx continues each of them, and the cache is longer by T afterwards.
        logit_positions: [B] or [B, K] int64, the positions per row whose logits are wanted.
        Returns the loss (see loss.head_loss; [B, T] for "none") or float32 logits
        [B, T, vocab_size] ([B, 1 or K, vocab_size] with logit_positions).
        """
        n_rows, n_tokens = idx.shape
        compiled = self.compiled_by_block or torch.compiler.is_compiling()
        if kv_cache is None:
            cos, sin = self.cos[None, :n_tokens, None], self.sin[None, :n_tokens, None]
            mask = None if doc_ids is None else document_mask(doc_ids, compiled)
        else:
            assert doc_ids is None and targets is None, "a KV cache is for generation"
            positions, mask = kv_cache.begin(n_tokens)
            cos, sin = self.cos[positions, None], self.sin[positions, None]
        assert cos.size(1) == n_tokens, f"{n_tokens} tokens exceed seq_len {self.config.seq_len}"

        x = norm(self.wte(idx))
        x = F.dropout(x.to(_compute_dtype(x)), self.config.dropout, self.training)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, None, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, kv_cache)
        x = norm(x)
        if kv_cache is not None:
            kv_cache.finish(n_tokens)

        if targets is not None:
            x, targets = x.flatten(0, 1), targets.flatten()
            loss = head_loss(x, self.lm_head.weight, targets, reduction, compiled=compiled)
            return loss.view(n_rows, n_tokens) if reduction == "none" else loss
        if logit_positions is not None:
            x = x[torch.arange(n_rows, device=x.device)[:, None], logit_positions.view(n_rows, -1)]
        logits = self.lm_head(x)
        return softcap(logits if logits.dtype == torch.float64 else logits.float())

    def compile_blocks(self) -> None:
        """torch.compile each block and the loss instead of the whole model.

        The blocks share one graph, so that the compiler works for one block's time; and what
        FSDP2 does between blocks stays outside of the graph. Call before shard_model.
        """
        for block in self.blocks:
            block.compile(fullgraph=True)
        self.compiled_by_block = True

    # -------------------------------------------------------------------------
    # Parameters

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill all weights, the same for every device, dtype and sharding.

        As nanochat: embedding N(0, 1); the head and the projections back into the residual stream
        0, so that every block starts as the identity; other matrices
        N(0, 1/fan_in * min(1, fan_out/fan_in)) (arXiv 2310.17813). Parameter i is drawn on the CPU
        from its own generator, so that a rank needs to hold only one whole matrix at a time.
        """
        for i, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                parameter.zero_()
                continue
            fan_out, fan_in = parameter.shape
            std = 1.0 if name == "wte.weight" else min(1.0, math.sqrt(fan_out / fan_in))
            std /= 1.0 if name == "wte.weight" else math.sqrt(fan_in)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
            _assign(parameter, torch.randn(parameter.shape, generator=generator) * std)
        for buffer, value in zip((self.cos, self.sin), self._rope_tables("cpu"), strict=True):
            buffer.copy_(value)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_matmul_params(self) -> int:
        """Parameters that a token is multiplied with: all but the embedding table."""
        return self.num_params() - self.wte.weight.numel()

    def _rope_tables(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin of every position and frequency, [seq_len, head_dim / 2], float32."""
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        positions = torch.arange(self.config.seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, ROPE_THETA**-exponents)
        return angles.cos(), angles.sin()


def shard_model(
    model: GPT, dist: Dist, *, recompute: bool, compute_dtype: torch.dtype | None
) -> None:
    """Leave every rank with 1 / world_size of each parameter, gradient and state (FSDP2).

    A block's weights are gathered when it is used and dropped afterwards. For a model that fits no
    single device: build it on the meta device, shard, `to_empty`, then `init_weights`.
    compute_dtype: dtype of the gathered weights, and of the activations (gradients are then
    averaged in float32); None for that of the parameters. Autocast is not needed.
    """
    model.recompute = recompute
    # RoPE's tables, an input of the blocks, must stay in float32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.mesh()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def document_mask(doc_ids: Tensor, is_compiled: bool = False) -> Tensor | BlockMask:
    """Causal attention inside documents: doc_ids [B, T] -> a mask for Attention.

    A compiled model on a GPU skips whole blocks of other documents (flex_attention); elsewhere the
    mask is dense, [B, 1, T, T] of bool, made once per forward pass.
    """
    if skips_blocks(doc_ids.device, is_compiled):
        return _document_block_mask(doc_ids)
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
    return same.tril()


def skips_blocks(device: torch.device, is_compiled: bool) -> bool:
    """Whether attention between documents is skipped; flex_attention needs a compiler for that."""
    return device.type == "cuda" and is_compiled


def _document_block_mask(doc_ids: Tensor) -> BlockMask:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])

    n_rows, n_tokens = doc_ids.shape
    return create_block_mask(visible, n_rows, None, n_tokens, n_tokens, device=doc_ids.device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _assign(parameter: Tensor, value: Tensor) -> None:
    """parameter[:] = value, also where the parameter is a DTensor and holds only its shard."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    parameter.copy_(value)


# -----------------------------------------------------------------------------
# Names in Hugging Face transformers (NanoChatForCausalLM)

HF_NAMES = {
    "wte": "model.embed_tokens",
    "lm_head": "lm_head",
    "blocks": "model.layers",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def hf_name(name: str) -> str:
    """`blocks.3.attn.c_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("blocks."):
        module, weight = name.split(".")
        return f"{HF_NAMES[module]}.{weight}"
    _, layer, part, matrix, weight = name.split(".")
    return f"{HF_NAMES['blocks']}.{layer}.{HF_NAMES[f'{part}.{matrix}']}.{weight}"


def hf_state_dict(model: GPT) -> dict[str, Tensor]:
    """The weights under transformers' names; the tensors are the model's own."""
    return {hf_name(name): weight for name, weight in model.state_dict().items()}


def load_hf_state_dict(model: GPT, state: dict[str, Tensor]) -> None:
    """Copy weights that stand under transformers' names.

    Raises ValueError that lists missing, unknown and misshapen weights.
    """
    own = hf_state_dict(model)
    wrong = [f"missing {name}" for name in own.keys() - state.keys()]
    wrong += [f"unknown {name}" for name in state.keys() - own.keys()]
    wrong += [
        f"{name} is {list(state[name].shape)}, the model has {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError("these weights do not fit the model: " + "; ".join(sorted(wrong)))
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state[name])
