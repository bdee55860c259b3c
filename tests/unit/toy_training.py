"""trainer.fit on a model of a few thousand weights, with data that a test can poison."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint import Checkpointer
from nanochat.data import Loader, StepBatch
from nanochat.distributed import Dist
from nanochat.gpt import GPT, shard_model
from nanochat.metrics import Metrics
from nanochat.optim import build_optimizer
from nanochat.rundir import Outcome, RunDir
from nanochat.scaling import GPTConfig, resolve_stage
from nanochat.sources import ConversationSource
from nanochat.spec import RunSpec
from nanochat.storage import Storage
from nanochat.trainer import fit

STAGE = "base_train"
VOCAB = 32
NUM_DOCUMENTS = 97
CONFIG = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, seq_len=16, vocab_size=VOCAB)

Poison = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, loss) of a forward pass -> the loss that the training sees."""


def make_spec(**base_train: Any) -> RunSpec:
    """Four rows of 16 tokens per step; `base_train` are fields of that section."""
    stage = {"num_steps": 12, "total_batch_size": 64, "eval_every_steps": 4, "grad_clip": 1e9}
    return RunSpec.model_validate(
        {
            "name": "toy",
            "seed": 5,
            "model": {"depth": 1, "aspect_ratio": 16, "head_dim": 16, "seq_len": 16,
                      "vocab_size": VOCAB},
            "budget": {"max_hours": 1.0},
            "checkpoint": {"free_floor_gib": 0.0, "keep_last": 3},
            STAGE: stage | base_train,
        }
    )  # fmt: skip


def make_source(seed: int = 5, all_masked: bool = False) -> ConversationSource:
    """Documents of 3 to 40 tokens in which the next token mostly is the last one plus 7."""
    random = np.random.RandomState(0)
    rendered = []
    for _ in range(NUM_DOCUMENTS):
        length = random.randint(2, 40)
        strides = np.where(random.rand(length) < 0.8, 7, random.randint(31, size=length))
        ids = [0, *(1 + np.cumsum(strides) % 31)]
        rendered.append((ids, [0 if all_masked else 1] * len(ids)))
    return ConversationSource(rendered, bos_id=0, seed=seed)


class Trainee:
    """One process's worth of training in a run directory: everything that `fit` is given.

    poison: called with (inputs, loss) of every forward pass in training, returns the loss.
    """

    def __init__(
        self,
        run: RunDir,
        spec: RunSpec,
        dist: Dist | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        is_sharded: bool = False,
        dropout: float = 0.0,
        poison: Poison | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.run, self.spec, self.dist = run, spec, dist or Dist()
        settings = spec.base_train
        assert settings is not None
        self.settings = settings
        self.numbers = resolve_stage(spec, STAGE, self.dist.world_size, 1)
        config = replace(CONFIG, dropout=dropout)
        self.model = GPT(config).to(dtype)
        if is_sharded:
            shard_model(self.model, self.dist, recompute=False, compute_dtype=None)
        self.model.init_weights(spec.seed)
        self.poison = poison
        self.optimizer = build_optimizer(
            self.model,
            dist=self.dist,
            n_embd=config.n_embd,
            embedding_lr=settings.embedding_lr,
            unembedding_lr=settings.unembedding_lr,
            matrix_lr=settings.matrix_lr,
            weight_decay=settings.weight_decay,
        )
        self.checkpointer = Checkpointer(
            run.checkpoints_dir(STAGE),
            spec.checkpoint,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
            storage=storage,
        )
        self.source = make_source(spec.seed)
        self.batches: list[StepBatch] = []
        """What the loop has drawn, in order."""
        self.bpb: Callable[[], float] = lambda: 1.0

    def fit(self, **changes: Any) -> Outcome:
        arguments: dict[str, Any] = {
            "run": self.run,
            "stage": STAGE,
            "seed": self.spec.seed,
            "settings": self.settings,
            "numbers": self.numbers,
            "model": self.model,
            "train_model": self._forward,
            "optimizer": self.optimizer,
            "make_loader": self._loader,
            "validate": lambda: self.bpb(),
            "sample": None,
            "sample_every_steps": 1,
            "checkpointer": self.checkpointer,
            "checkpoint_every_s": 3600.0,
            "open_metrics": lambda step: Metrics(
                self.run, STAGE, resume_step=step, rank=self.dist.rank
            ),
            "dist": self.dist,
            "autocast": contextlib.nullcontext,
            "flops_per_token": 1000,
            "peak_flops": None,
        }
        self.model.train()
        return fit(**arguments | changes)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: w.detach().clone() for name, w in self.model.state_dict().items()}

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor, **kw: Any) -> torch.Tensor:
        loss = self.model(inputs, targets, **kw)
        return loss if self.poison is None else self.poison(inputs, loss)

    def _loader(self, cursor: dict[str, Any] | None) -> Loader:
        loader = Loader(
            self.source,
            seq_len=CONFIG.seq_len,
            rows_per_step=self.numbers.rows_per_step,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
            cursor=cursor,
            num_ahead=0,
        )
        return _Seen(loader, self.batches)  # type: ignore[return-value]


class _Seen:
    """A loader that notes what is drawn from it."""

    def __init__(self, loader: Loader, batches: list[StepBatch]) -> None:
        self._loader, self._batches = loader, batches

    def __next__(self) -> StepBatch:
        self._batches.append(next(self._loader))
        return self._batches[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def new_run(path: Path, spec: RunSpec) -> RunDir:
    run = RunDir(path)
    run.create()
    run.freeze_spec(spec)
    return run


def batch_inputs(number: int, rows: int = 4) -> torch.Tensor:
    """Inputs of the batch of that number (from 1) in an uninterrupted run."""
    with Loader(make_source(), seq_len=16, rows_per_step=rows, num_ahead=0) as loader:
        for _ in range(number):
            batch = next(loader)
    return batch.inputs


def latest(run: RunDir) -> int:
    """Step of the newest checkpoint."""
    return int((run.checkpoints_dir(STAGE) / "latest").read_text().removeprefix("step_"))


def steps_logged(run: RunDir) -> list[dict[str, Any]]:
    return [m for m in run.metrics() if "loss" in m]
