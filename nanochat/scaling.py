"""Every number that follows from a spec: shape, parameters, FLOPs, steps, schedule.

One author for derived numbers: the planner prices with them and the stages train with them. Plain
arithmetic, no torch, so that a plan costs milliseconds and a laptop can plan for eight GPUs.
"""

import functools
import math
from dataclasses import dataclass, replace

from nanochat.spec import TRAIN_STAGES, ChatRl, ChatStage, Model, RunSpec, SpecError, TrainStage

AUTO_MICRO_BATCH_TOKENS = 16_384
"""Tokens of a forward pass where nothing but the schedule bounds it: enough to fill a CPU."""

CONVERSATION_TOKENS = {"smoltalk": 900, "mmlu_aux": 140, "gsm8k": 250}
"""Rough tokens per conversation, for plans only: a stage packs what it has rendered."""
DEFAULT_CONVERSATION_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the transformer, in GPT-2's names."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    seq_len: int
    vocab_size: int
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def gpt_config(model: Model) -> GPTConfig:
    """Width aspect_ratio * depth, heads of head_dim (or the nearest width that divides).

    Raises SpecError where grouped-query attention does not divide the heads.
    """
    n_embd = model.aspect_ratio * model.depth
    n_head = _num_heads(n_embd, model.head_dim)
    n_kv_head = model.num_kv_heads or n_head
    if n_head % n_kv_head:
        raise SpecError(
            f"model.num_kv_heads = {n_kv_head} does not divide the {n_head} heads of width "
            f"{n_embd}; divisors: {', '.join(str(d) for d in divisors(n_head))}"
        )
    return GPTConfig(
        n_layer=model.depth,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        seq_len=model.seq_len,
        vocab_size=model.vocab_size,
        dropout=model.dropout,
    )


@functools.lru_cache(maxsize=1024)
def _num_heads(n_embd: int, head_dim: int) -> int:
    """Heads of an even width (RoPE turns pairs) whose number is nearest to n_embd / head_dim."""
    ideal = n_embd / head_dim
    able = [h for h in divisors(n_embd) if (n_embd // h) % 2 == 0]
    return min(able, key=lambda h: (abs(h - ideal), -h))


@functools.lru_cache(maxsize=1024)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return (*small, *(n // d for d in reversed(small) if d * d != n))


def num_params_per_layer(c: GPTConfig) -> int:
    """Weights of one block: q, k, v, output projection and the 4x MLP; no biases, no norms."""
    kv_width = c.n_kv_head * c.head_dim
    return 2 * c.n_embd * c.n_embd + 2 * c.n_embd * kv_width + 8 * c.n_embd * c.n_embd


def num_params(c: GPTConfig) -> int:
    """All parameters: blocks, token embedding and untied output head."""
    return c.n_layer * num_params_per_layer(c) + 2 * c.vocab_size * c.n_embd


def num_params_matmul(c: GPTConfig) -> int:
    """Parameters that take part in a matrix product: all but the token embedding (a look-up)."""
    return num_params(c) - c.vocab_size * c.n_embd


def flops_per_token(c: GPTConfig) -> int:
    """Training FLOPs (forward and backward) of a token: 6 N + 12 L D T (PaLM, appendix B).

    Recomputed activations are not counted: MFU measures useful work only.
    """
    return 6 * num_params_matmul(c) + 12 * c.n_layer * c.n_embd * c.seq_len


def checkpoint_bytes(c: GPTConfig) -> tuple[int, int]:
    """(model, optimizer) bytes of a checkpoint: fp32 weights; Muon momentum, two AdamW moments."""
    matrices = c.n_layer * num_params_per_layer(c)
    embeddings = 2 * c.vocab_size * c.n_embd
    return 4 * (matrices + embeddings), 4 * matrices + 8 * embeddings


@dataclass(frozen=True, kw_only=True)
class StageNumbers:
    """What a training stage does, for one world size."""

    stage: str
    num_steps: int | None
    """None where the horizon is the budget: the plan estimates it, the clock decides."""
    total_batch_size: int
    """Tokens per step over all ranks."""
    rows_per_step: int
    """Rows of seq_len tokens per step over all ranks."""
    device_batch_size: int
    """Rows per rank and forward pass."""
    grad_accum_steps: int
    seq_len: int

    @property
    def num_tokens(self) -> int | None:
        return None if self.num_steps is None else self.num_steps * self.total_batch_size

    def with_steps(self, num_steps: int) -> "StageNumbers":
        """The same batches for another number of steps."""
        return replace(self, num_steps=num_steps)


def resolve(
    spec: RunSpec, world_size: int, device_batch_sizes: dict[str, int] | None = None
) -> list[StageNumbers]:
    """Numbers of every training stage that is switched on.

    `device_batch_sizes` holds what the plan or the fit chose for stages with "auto".
    Raises SpecError where a batch cannot be cut as asked.
    """
    chosen = device_batch_sizes or {}
    return [
        resolve_stage(spec, name, world_size, chosen.get(name))
        for name in TRAIN_STAGES
        if getattr(spec, name) is not None
    ]


def resolve_stage(
    spec: RunSpec, name: str, world_size: int, device_batch_size: int | None = None
) -> StageNumbers:
    """Numbers of one training stage; `device_batch_size` overrules "auto". Raises SpecError.

    A row of chat_rl is a rollout, and total_batch_size the most tokens that all of them can have.
    """
    stage: TrainStage | ChatRl = getattr(spec, name)
    if isinstance(stage, ChatRl):
        rows = stage.prompts_per_step * stage.samples_per_prompt
        total_batch_size = rows * spec.model.seq_len
        if stage.prompts_per_step % world_size:
            raise SpecError(
                f"{name}.prompts_per_step = {stage.prompts_per_step} prompts cannot be shared "
                f"evenly by {world_size} ranks"
            )
    else:
        rows = stage.total_batch_size // spec.model.seq_len
        total_batch_size = stage.total_batch_size
        if rows % world_size:
            raise SpecError(
                f"{name}.total_batch_size = {stage.total_batch_size} is {rows} rows of "
                f"{spec.model.seq_len} tokens, which {world_size} ranks cannot share evenly"
            )
    rows_per_rank = rows // world_size
    able = divisors(rows_per_rank)
    if stage.device_batch_size == "auto":
        most = device_batch_size or max(1, AUTO_MICRO_BATCH_TOKENS // spec.model.seq_len)
        batch = max(d for d in able if d <= most)
    else:
        batch = min(stage.device_batch_size, rows_per_rank)
        if rows_per_rank % batch:
            near = sorted(able, key=lambda d: abs(d - batch))[:3]
            raise SpecError(
                f"{name}.device_batch_size = {batch} does not divide the {rows_per_rank} rows of "
                f"a rank and step; near: {', '.join(str(d) for d in sorted(near))}"
            )
        if device_batch_size is not None:
            batch = max(d for d in able if d <= min(batch, device_batch_size))
    return StageNumbers(
        stage=name,
        num_steps=_num_steps(spec, name),
        total_batch_size=total_batch_size,
        rows_per_step=rows,
        device_batch_size=batch,
        grad_accum_steps=rows_per_rank // batch,
        seq_len=spec.model.seq_len,
    )


def _num_steps(spec: RunSpec, name: str) -> int | None:
    stage = getattr(spec, name)
    if stage.num_steps is not None:
        return int(stage.num_steps)
    if isinstance(stage, ChatStage):
        assert stage.num_epochs is not None
        num_tokens = stage.num_epochs * mixture_tokens(stage.mixture)
        return max(1, math.ceil(num_tokens / stage.total_batch_size))
    if stage.horizon == "budget":
        return None
    num_tokens = stage.tokens_per_param * num_params(gpt_config(spec.model))
    return max(1, int(num_tokens // stage.total_batch_size))


def mixture_tokens(mixture: dict[str, int]) -> int:
    """Estimated tokens of one pass over a mixture."""
    return sum(
        n * CONVERSATION_TOKENS.get(t, DEFAULT_CONVERSATION_TOKENS) for t, n in mixture.items()
    )


def lr_scale(start: float, end: float, stage: TrainStage) -> float:
    """Learning-rate factor of a step that covers [start, end] of the horizon (0 to 1).

    Linear warm-up that is above zero in the first step, constant, linear warm-down to
    final_lr_frac (the trapezoid of nanochat; Hägele et al. 2024 call it WSD).
    """
    if start < stage.warmup_ratio:
        return min(1.0, end / stage.warmup_ratio)
    left = 1.0 - start
    if left >= stage.warmdown_ratio:
        return 1.0
    share = max(0.0, left / stage.warmdown_ratio)
    return share + (1.0 - share) * stage.final_lr_frac
