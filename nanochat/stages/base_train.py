"""Base training: the model learns to continue text."""

import contextlib

from nanochat.bpb import bigram_bpb
from nanochat.corpus import locate
from nanochat.data import Loader, flat_tokens, validation_set
from nanochat.engine import Engine
from nanochat.prepare import note_out_of_memory, prepare
from nanochat.rundir import Outcome, RunDir
from nanochat.sources import make_source
from nanochat.spec import BaseTrain, SpecError
from nanochat.stage import run_stage
from nanochat.tokenizer import TokenizerLike
from nanochat.trainer import fit

STAGE = "base_train"
BIGRAM_TRAIN_TOKENS = 20_000_000
"""Enough to fill the counts of a bigram table; more hardly moves its bits per byte."""
SAMPLE_PROMPTS = ("def ", "import ", "The ", "Return the ", "class ", "If ")
SAMPLE_TOKENS = 48


def main(run: RunDir) -> Outcome:
    """Train on the text of the spec's data; see trainer.fit for the loop."""
    p = prepare(run, STAGE)
    data, settings = p.spec.data, p.settings
    assert isinstance(settings, BaseTrain)
    files = locate(data)
    train = make_source(files.train, p.tokenizer, data, run=run, seed=p.spec.seed)
    held_out = make_source(files.val, p.tokenizer, data, run=run, seed=None)
    validation = validation_set(
        held_out,
        seq_len=p.numbers.seq_len,
        max_tokens=settings.eval_tokens,
        batch_rows=p.eval_rows(),
        rank=p.dist.rank,
        world_size=p.dist.world_size,
        packing=data.packing,
    )

    # the bar that a model of one token of context sets
    bigram = None
    if p.dist.is_main:
        bigram = bigram_bpb(
            flat_tokens(train, BIGRAM_TRAIN_TOKENS),
            flat_tokens(held_out, settings.eval_tokens),
            p.tokenizer.token_bytes(),
            p.tokenizer.vocab_size,
        )

    def sample(step: int) -> None:
        """Greedy continuations of fixed prompts, for the report."""
        if not p.dist.is_main or p.metrics is None or p.is_sharded:
            return
        prompts = sample_prompts(p.tokenizer, p.numbers.seq_len)
        engine = Engine(p.model, p.tokenizer, max_batch=len(prompts))
        answers = engine.generate([*prompts.values()], max_tokens=SAMPLE_TOKENS, temperature=0.0)
        for prompt, ids in zip(prompts, answers, strict=True):
            p.metrics.log_sample(step, prompt, p.tokenizer.decode(ids))

    try:
        outcome = fit(
            **p.fit_arguments(),
            make_loader=lambda cursor: Loader(
                train,
                seq_len=p.numbers.seq_len,
                rows_per_step=p.numbers.rows_per_step,
                rank=p.dist.rank,
                world_size=p.dist.world_size,
                packing=data.packing,
                cursor=cursor,
                pin_memory=p.dist.device.type == "cuda",
            ),
            validate=lambda: p.bits_per_byte(validation),
            sample=sample,
            sample_every_steps=settings.sample_every_steps,
        )
    except RuntimeError as e:
        outcome = note_out_of_memory(p, e)
    if outcome.outcome == "done":
        sample(outcome.step or 0)
        outcome.facts["bigram_bpb"] = bigram
    p.close(outcome)
    return outcome


def sample_prompts(tokenizer: TokenizerLike, seq_len: int) -> dict[str, list[int]]:
    """Prompt -> ids behind <|bos|>. A prompt that leaves no room in seq_len tokens, or of whose
    letters a vocabulary of characters has not all, is left out; without any, from nothing."""
    prompts = {}
    for text in SAMPLE_PROMPTS:
        with contextlib.suppress(SpecError):
            prompts[text] = [tokenizer.bos_id, *tokenizer.encode(text)]
    fitting = {text: ids for text, ids in prompts.items() if len(ids) < seq_len}
    return fitting or {"": [tokenizer.bos_id]}


if __name__ == "__main__":
    run_stage(STAGE, main)
