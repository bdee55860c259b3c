"""What a training stage needs before its first step: device, model, optimizer, checkpoints.

The numbers come from plan.json where the plan was made for as many ranks, corrected by what a
former process of this run found out on this kind of device (a batch that did not fit).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import distributed
from nanochat.bpb import evaluate_bpb
from nanochat.checkpoint import Checkpointer, CheckpointError
from nanochat.data import ValidationSet
from nanochat.distributed import Dist
from nanochat.gpt import GPT, shard_model
from nanochat.metrics import Metrics
from nanochat.optim import Optimizer, build_optimizer
from nanochat.rundir import Outcome, RunDir
from nanochat.scaling import StageNumbers, flops_per_token, gpt_config, resolve_stage
from nanochat.spec import ChatRl, RunSpec, TrainStage
from nanochat.stage import StageFailed
from nanochat.tokenizer import TokenizerLike, load_tokenizer
from nanochat.trainer import is_stop_urgent
from nanochat.weights import load_model

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class _StopAsked(Exception):
    """Ends an evaluation on all ranks."""


@dataclass
class Prepared:
    """One training stage, ready for `trainer.fit`."""

    run: RunDir
    spec: RunSpec
    stage: str
    settings: TrainStage | ChatRl
    numbers: StageNumbers
    dist: Dist
    tokenizer: TokenizerLike
    model: GPT
    train_model: Callable[..., torch.Tensor]
    is_sharded: bool
    optimizer: Optimizer
    checkpointer: Checkpointer
    autocast: Callable[[], AbstractContextManager[Any]]
    metrics: Metrics | None = None

    def open_metrics(self, resume_step: int | None) -> Metrics:
        """The log of the stage, opened when it is known where the stage continues."""
        self.metrics = Metrics(
            self.run,
            self.stage,
            resume_step=resume_step,
            tensorboard=self.spec.runtime.tensorboard,
            wandb=self.spec.runtime.wandb,
            rank=self.dist.rank,
            gpu_uuids=gpu_uuids(self.dist),
        )
        return self.metrics

    def fit_arguments(self) -> dict[str, Any]:
        """The arguments of `trainer.fit` that are the same for every stage."""
        plan = self.run.plan()
        return {
            "run": self.run,
            "stage": self.stage,
            "seed": self.spec.seed,
            "settings": self.settings,
            "numbers": self.numbers,
            "model": self.model,
            "train_model": self.train_model,
            "optimizer": self.optimizer,
            "checkpointer": self.checkpointer,
            "checkpoint_every_s": self.spec.budget.checkpoint_every_s,
            "open_metrics": self.open_metrics,
            "dist": self.dist,
            "autocast": self.autocast,
            "flops_per_token": flops_per_token(self.model.config),
            "peak_flops": plan.get("peak_flops"),
        }

    def bits_per_byte(self, validation: ValidationSet) -> float | None:
        """Bits per byte of the model on a validation set, over all ranks.

        None where a stop is asked meanwhile: the grace is for the checkpoint.
        """
        token_bytes = self.tokenizer.token_bytes()

        def nll(inputs: torch.Tensor, targets: torch.Tensor, doc_ids: Any) -> torch.Tensor:
            if self.dist.is_main:
                self.run.give_sign_of_life(self.stage)
            if self.dist.broadcast_flag(int(is_stop_urgent(self.run))):
                raise _StopAsked
            with self.autocast():
                return self.model(inputs, targets, doc_ids=doc_ids, reduction="none")

        self.model.eval()
        try:
            return evaluate_bpb(
                nll, validation, token_bytes, self.dist.device, self.dist.all_reduce_sum
            )
        except _StopAsked:
            return None
        finally:
            self.model.train()

    def close(self, outcome: Outcome) -> None:
        """Write what waits and leave the other ranks.

        Where this rank alone gives up they are not left before the outcome is on the disk: they
        would fail at once and say so first.
        """
        if self.metrics is not None:
            self.metrics.close()
        if outcome.outcome != "again":
            distributed.shutdown()

    def eval_rows(self) -> int:
        """Rows of a validation batch: validation keeps no activations, so the training's do."""
        return self.numbers.device_batch_size


@contextlib.contextmanager
def _room_for_the_model() -> Iterator[None]:
    """Raises StageFailed where memory runs out in here: no smaller batch would help."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise StageFailed(
            f"out of memory while the model is built: {e}. Use a smaller model.depth, or a GPU "
            "with more memory"
        ) from e


@_room_for_the_model()
def prepare(run: RunDir, stage: str, weights_from: str | None = None) -> Prepared:
    """Build everything for a training stage of a run.

    weights_from: the stage before, whose weights this one begins with; not read where this one has
    a checkpoint of its own, from which it goes on.

    Raises RunDirError, SpecError, CheckpointError when there is nothing to start from, or
    StageFailed when there is no memory for it.
    """
    spec, plan = run.spec(), run.plan()
    dist = distributed.init(distributed.pick_device(spec.runtime.device))
    distributed.seed_rank(spec.seed, dist.rank)
    if spec.runtime.deterministic:
        # cuBLAS is deterministic with a workspace of its own (CUDA's documentation of cuBLAS)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    settings: TrainStage | ChatRl = getattr(spec, stage)
    dtype = compute_dtype(spec.runtime.dtype, dist.device)
    model, train_model, is_sharded = _build_model(spec, plan, dist, dtype)
    checkpointer = Checkpointer(
        run.checkpoints_dir(stage), spec.checkpoint, rank=dist.rank, world_size=dist.world_size
    )
    if weights_from is not None and not checkpointer.has_any():
        load_stage_weights(run, weights_from, model)
    optimizer = build_optimizer(
        model,
        dist=dist,
        n_embd=model.config.n_embd,
        embedding_lr=settings.embedding_lr,
        unembedding_lr=settings.unembedding_lr,
        matrix_lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
    )
    return Prepared(
        run=run,
        spec=spec,
        stage=stage,
        settings=settings,
        numbers=resolve_stage(spec, stage, dist.world_size, _device_batch(run, plan, stage, dist)),
        dist=dist,
        tokenizer=load_tokenizer(run.tokenizer_dir),
        model=model,
        train_model=train_model,
        is_sharded=is_sharded,
        optimizer=optimizer,
        checkpointer=checkpointer,
        autocast=lambda: autocast(dist.device, torch.float32 if is_sharded else dtype),
    )


def _build_model(
    spec: RunSpec, plan: dict[str, Any], dist: Dist, dtype: torch.dtype
) -> tuple[GPT, Callable[..., torch.Tensor], bool]:
    """(model with fresh weights, what to call in training, whether FSDP2 shards it)."""
    config = gpt_config(spec.model)
    sharding = spec.runtime.sharding
    if sharding == "auto":
        sharding = plan.get("sharding", "replicated")
    is_sharded = sharding == "fsdp" and dist.world_size > 1
    recompute = bool(plan.get("recompute", False))
    if not is_sharded:
        model = GPT(config).to(dist.device)
        model.recompute = recompute
        model.init_weights(spec.seed)
        return model, torch.compile(model) if spec.runtime.compile else model, False
    with torch.device("meta"):
        model = GPT(config)
    if spec.runtime.compile:
        model.compile_blocks()
    half = dtype if dtype != torch.float32 else None
    shard_model(model, dist, recompute=recompute, compute_dtype=half)
    model.to_empty(device=dist.device)
    model.init_weights(spec.seed)
    return model, model, True


def load_stage_weights(run: RunDir, stage: str, model: GPT) -> None:
    """Fill the model with the best weights of a stage, or its latest where none was validated."""
    load_model(run.checkpoints_dir(stage), model.state_dict(), "best")


def device_name(device: torch.device) -> str:
    """Name of the kind of device, e.g. "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpu_uuids(dist: Dist) -> list[str]:
    """NVML's names of the GPUs of this node, for the statistics; empty without CUDA."""
    if dist.device.type != "cuda":
        return []
    count = min(torch.cuda.device_count(), dist.world_size)
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Precision of the matrix products. A CPU without AMX runs bf16 at half the speed of fp32."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to bf16, or nothing at fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: of a device, or of the host, which has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)


def note_out_of_memory(prepared: Prepared, error: RuntimeError) -> Outcome:
    """Halve the device batch for the next process of this stage; total_batch_size stays.

    An error that is none of memory is raised again.
    Called by the rank that ran out; the others wait for it, and are ended by the supervisor. The
    memory of a process that ran out is fragmented, so a new one is started. Raises StageFailed
    where there is nothing to halve.
    """
    if not is_out_of_memory(error):
        raise error
    with contextlib.suppress(CheckpointError):  # of a save that the next process tries again
        prepared.checkpointer.wait()
    numbers = prepared.numbers
    smaller = numbers.device_batch_size // 2
    if smaller == 0:
        raise StageFailed(
            f"out of memory at one row of {numbers.seq_len} tokens per rank: {error}. Use a "
            "smaller model.depth or model.seq_len, or a GPU with more memory"
        ) from error
    reason = f"out of memory at {numbers.device_batch_size} rows per rank"
    prepared.run.append_resolved(
        "fit",
        stage=prepared.stage,
        device=device_name(prepared.dist.device),
        world_size=prepared.dist.world_size,
        device_batch_size=smaller,
        reason=reason,
    )
    return Outcome(
        stage=prepared.stage,
        outcome="again",
        message=f"{reason}; next: {smaller} rows per rank, at the same total_batch_size",
    )


def _device_batch(run: RunDir, plan: dict[str, Any], stage: str, dist: Dist) -> int | None:
    """What the plan chose, or what a former process on such a device had to fall back to."""
    for fit in reversed(run.resolved("fit")):
        if (fit["stage"], fit["device"], fit["world_size"]) == (
            stage,
            device_name(dist.device),
            dist.world_size,
        ):
            return int(fit["device_batch_size"])
    planned = next((s for s in plan.get("stages", []) if s["stage"] == stage), None)
    if planned is None or plan.get("world_size", 1) != dist.world_size:
        return None
    return int(planned["device_batch_size"])
