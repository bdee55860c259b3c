"""Training on conversations: what mid_train and chat_sft share.

The two stages differ in their mixture, their learning rates and in whose weights they start from.
"""

import math
import shutil
from pathlib import Path

from nanochat.data import Loader, validation_set
from nanochat.packing import num_rows
from nanochat.prepare import Prepared, note_out_of_memory, prepare
from nanochat.rendered import Rendered, render
from nanochat.rundir import Outcome, RunDir
from nanochat.sources import ConversationSource
from nanochat.spec import ChatStage
from nanochat.tasks import Mixture, Split
from nanochat.trainer import fit

HELD_OUT_PER_TASK = 64
"""Held-out conversations per task for the validation loss of a chat stage."""


def train_on_conversations(run: RunDir, stage: str, weights_from: str) -> Outcome:
    """Train on the stage's mixture; the loss is taken on the assistant's tokens only."""
    p = prepare(run, stage, weights_from=weights_from)
    settings = p.settings
    assert isinstance(settings, ChatStage)
    rendered = _render(p, dict(settings.mixture), "train")
    held_out = _render(p, dict.fromkeys(settings.mixture, HELD_OUT_PER_TASK), "validation")
    train = _source(p, rendered)
    if settings.num_epochs is not None:
        lengths = rendered.lengths
        in_order = (lengths[train.order(epoch)] for epoch in range(settings.num_epochs))
        num_steps = math.ceil(num_rows(in_order, p.numbers.seq_len) / p.numbers.rows_per_step)
        p.numbers = p.numbers.with_steps(num_steps)
        if p.dist.is_main:
            run.append_resolved("num_steps", stage=stage, num_steps=num_steps)
    validation = validation_set(
        _source(p, held_out),
        seq_len=p.numbers.seq_len,
        max_tokens=settings.eval_tokens,
        batch_rows=p.eval_rows(),
        rank=p.dist.rank,
        world_size=p.dist.world_size,
        packing="documents",
    )
    try:
        outcome = fit(
            **p.fit_arguments(),
            make_loader=lambda cursor: Loader(
                train,
                seq_len=p.numbers.seq_len,
                rows_per_step=p.numbers.rows_per_step,
                rank=p.dist.rank,
                world_size=p.dist.world_size,
                packing="documents",
                cursor=cursor,
                pin_memory=p.dist.device.type == "cuda",
            ),
            validate=lambda: p.bits_per_byte(validation),
            sample=None,
            sample_every_steps=1,
        )
    except RuntimeError as e:
        outcome = note_out_of_memory(p, e)
    if outcome.outcome == "done" and p.dist.is_main:
        shutil.rmtree(_folder(p), ignore_errors=True)
    p.close(outcome)
    return outcome


def _folder(p: Prepared) -> Path:
    return p.run.path / "conversations" / p.stage


def _render(p: Prepared, sizes: dict[str, int], split: Split) -> Rendered:
    """The stage's conversations of a split."""

    def say(fraction: float) -> None:
        if p.dist.is_main:
            p.run.write_progress(p.stage, "tokenize", fraction=round(fraction, 4))

    mixture = Mixture(sizes, split, p.spec.seed)
    return render(mixture, p.tokenizer, _folder(p) / split, p.dist, say)


def _source(p: Prepared, rendered: Rendered) -> ConversationSource:
    """In an order of its own for every epoch; the first epoch's, for what is held out."""
    return ConversationSource(
        rendered, bos_id=p.tokenizer.bos_id, seed=p.spec.seed, fingerprint=rendered.fingerprint
    )
