"""Supervised finetuning: a smaller mixture at smaller learning rates, after mid-training."""

from nanochat.conversations import train_on_conversations
from nanochat.rundir import Outcome, RunDir
from nanochat.stage import run_stage

STAGE = "chat_sft"


def main(run: RunDir) -> Outcome:
    """Continue from the weights of mid-training, or of base training where that is left out."""
    before = "mid_train" if run.spec().mid_train is not None else "base_train"
    return train_on_conversations(run, STAGE, weights_from=before)


if __name__ == "__main__":
    run_stage(STAGE, main)
