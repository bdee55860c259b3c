"""Mid-training: the base model learns the form of a conversation and the tasks in it."""

from nanochat.conversations import train_on_conversations
from nanochat.rundir import Outcome, RunDir
from nanochat.stage import run_stage

STAGE = "mid_train"


def main(run: RunDir) -> Outcome:
    """Continue from the base weights on the stage's mixture."""
    return train_on_conversations(run, STAGE, weights_from="base_train")


if __name__ == "__main__":
    run_stage(STAGE, main)
