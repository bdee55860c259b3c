"""Training on conversations: what mid_train and chat_sft share.

The two stages differ in their mixture, their learning rates and in whose weights they start from.
"""

import torch

from nanochat.data import Loader, validation_set
from nanochat.prepare import Prepared, note_out_of_memory, prepare
from nanochat.rundir import Outcome, RunDir
from nanochat.scaling import num_steps_of_epochs
from nanochat.sources import ConversationSource
from nanochat.spec import ChatStage, SpecError
from nanochat.tasks import Split, mixture
from nanochat.tokenizer import render_conversation
from nanochat.trainer import fit

HELD_OUT_PER_TASK = 64
"""Held-out conversations per task for the validation loss of a chat stage."""


def train_on_conversations(run: RunDir, stage: str, weights_from: str) -> Outcome:
    """Train on the stage's mixture; the loss is taken on the assistant's tokens only."""
    p = prepare(run, stage, weights_from=weights_from)
    settings = p.settings
    assert isinstance(settings, ChatStage)
    train = _source(p, dict(settings.mixture), "train", seed=p.spec.seed)
    held_out = _source(
        p, {task: HELD_OUT_PER_TASK for task in settings.mixture}, "validation", seed=None
    )
    if settings.num_epochs is not None:
        num_steps = num_steps_of_epochs(settings, train.num_tokens)
        p.numbers = p.numbers.with_steps(num_steps)
        if p.dist.is_main:
            run.append_resolved("num_steps", stage=stage, num_steps=num_steps)
    validation = validation_set(
        held_out,
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
    except torch.OutOfMemoryError as e:
        outcome = note_out_of_memory(p, e)
    p.close(outcome)
    return outcome


def _source(
    p: Prepared, tasks: dict[str, int], split: Split, seed: int | None
) -> ConversationSource:
    """Rendered conversations. Raises SpecError where one is longer than the context."""
    seq_len = p.numbers.seq_len
    rendered = [
        render_conversation(p.tokenizer, c, max_tokens=seq_len)
        for c in mixture(tasks, split, p.spec.seed)
    ]
    if not any(any(mask) for _, mask in rendered):
        raise SpecError(f"no conversation of {p.stage} fits model.seq_len = {seq_len}")
    return ConversationSource(rendered, bos_id=p.tokenizer.bos_id, seed=seed)
